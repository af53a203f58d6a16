"""Hugging Face datasets on disk: Parquet files with embedded audio, or the Arrow files that ``save_to_disk`` writes."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_distill.first_line import first_line
from ray_distill.pipeline.corpus.formats.hidden import hidden, visible
from ray_distill.pipeline.corpus.formats.huggingface import arrow_bytes
from ray_distill.pipeline.corpus.formats.text_lines import SPEAKERS, TEXTS, first_of, is_text, text_of, words_of_pieces
from ray_distill.pipeline.corpus.found import FoundFile, Search, without_suffix
from ray_distill.pipeline.corpus.splits import split_of_folders
from ray_distill.teacher_cache.sources.address import AudioAddress

_IDS = ("id", "utt_id", "utterance_id", "segment_id", "key")
_SUFFIXES = (".parquet", ".arrow")


def matches(path: Path) -> bool:
    """Return whether a file, or the first Parquet or Arrow file below a folder, has a column with the bytes of audio."""
    return any(_audio_columns(file) for file in visible(_files(path, 1), path))


def has_tables(path: Path) -> bool:
    """Return whether there are Parquet or Arrow files, with audio or without."""
    return bool(visible(_files(path, 1), path))


def _files(path: Path, most: int | None = None) -> list[Path]:
    """Return the Parquet and Arrow files, or the first ones that are not hidden, without a look at deeper folders."""
    if path.is_file():
        return [path] if path.suffix in _SUFFIXES else []
    files = []
    # Not os.walk, since a folder with millions of audio files shall be told apart quickly.
    for pattern in (f"{folders}*{suffix}" for folders in ("", "*/", "*/*/", "*/*/*/") for suffix in _SUFFIXES):
        files += [file for file in path.glob(pattern) if not file.name.startswith(("cache-", "tmp"))]
        if most is not None and visible(files, path):
            return sorted(visible(files, path))[:most]
    return sorted(files)


def _schema(file: Path) -> pa.Schema:
    try:
        return pq.read_schema(file) if file.suffix == ".parquet" else arrow_bytes.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} can't be read ({first_line(error)})") from error


def _audio_columns(file: Path) -> list[str]:
    """Return the names of the columns with the bytes of audio: structs with a field ``bytes``."""
    try:
        schema = _schema(file)
    except ValueError:
        return []
    return [
        field.name
        for field in schema
        if pa.types.is_struct(field.type) and any(_is_bytes(field.type.field(n)) for n in range(field.type.num_fields))
    ]


def _audio_column(file: Path, schema: pa.Schema) -> str:
    """Return the name of the column of audio: ``audio``, or the only one with bytes."""
    names = _audio_columns(file)
    if "audio" in names or len(names) == 1:
        return "audio" if "audio" in names else names[0]
    if names:
        raise ValueError(
            f"{file} has several columns of audio, {', '.join(names)}, of which one is used; rename it to audio, for example with "
            "rename_column of the library datasets"
        )
    raise ValueError(
        f"{file} has no column with the bytes of audio (a struct with a field 'bytes'); its columns are {', '.join(schema.names)}; "
        "save it with a column of type datasets.Audio at the top level, or write a manifest if it names files"
    )


def _is_bytes(field: pa.Field) -> bool:
    return bool(field.name == "bytes" and (pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)))


@dataclass(frozen=True)
class _Row:
    """A row: its file and number, the name of its audio, its labels, and the address of its bytes, if it has any."""

    file: Path
    number: int
    name: str
    labels: dict[str, Any]
    address: AudioAddress | None


def find(path: Path, search: Search) -> list[FoundFile]:
    """Return the rows of a file or of all files in a folder, up to three folders deep.

    The split is the column ``split`` if it has text, or else the beginning of a file's name, as in
    ``train-00000-of-00010.parquet``, or a folder. The id is a column ``id``
    (or ``utt_id``, ``utterance_id``, ``segment_id``, ``key``), or else the name of the audio without suffix if all are different,
    or else the file and the row. The transcript and the speaker are the first columns among ``text``, ``transcript``,
    ``transcription``, ``sentence``, ``normalized_text`` and ``raw_text``, and among ``speaker_id``, ``speaker``, ``spk_id`` and
    ``client_id``. A row without bytes names a file, which must be inside the folder.

    Raises:
        ValueError: There is no such file, one can't be read or has several columns of audio, none of which is ``audio``, or a row has
            no split, or neither bytes nor a file inside the folder.
    """
    every = _files(path)
    files = visible(every, path)
    search.skipped.extend(hidden(file) for file in every if file not in files)
    if not files:
        raise ValueError(f"{path} has no Parquet or Arrow file of a Hugging Face dataset")
    root = path if path.is_dir() else path.parent
    rows: list[_Row] = []
    pieces: set[str] = set()
    for file in files:
        schema = _schema(file)
        column = _audio_column(file, schema)
        rows += _parquet_rows(file, column) if file.suffix == ".parquet" else _arrow_rows(file, column)
        pieces.update(name for name in schema.names if words_of_pieces(name))
    if pieces:
        search.notes.append(
            f"the columns {', '.join(sorted(pieces))} of {path} are not used: each row's whole audio is an utterance; if it should be "
            "a piece, write a manifest with the columns start and end"
        )
    ids = _ids(rows, root)
    splits = _splits(files, root, search.wanted)
    return [_entry(row, id, splits[row.file], root) for row, id in zip(rows, ids, strict=True)]


def _entry(row: _Row, id: str, split: tuple[str | None, str], root: Path) -> FoundFile:
    path, address = row.file, row.address
    place = f"row {row.number} of {row.file}"
    if address is None:
        path = root / row.name
        if not row.name:
            raise ValueError(f"{place} has neither the bytes of audio nor the name of a file; remove the row")
        if not path.resolve().is_relative_to(root.resolve()):
            raise ValueError(
                f"{place} has no bytes of audio, but names {row.name}, which is not inside {root}; embed the audio (save_to_disk "
                "does), or write a manifest with the paths"
            )
    if "split" in row.labels:
        split = text_of(row.labels["split"]), "column split"
        if not split[0]:
            raise ValueError(f"{place} has no split; fill in the column split, or remove it")
    return FoundFile(
        id,
        path,
        *split,
        speaker=first_of(row.labels, SPEAKERS),
        text=first_of(row.labels, TEXTS),
        inside=address,
    )


def _ids(rows: list[_Row], root: Path) -> list[str]:
    if all(first_of(row.labels, _IDS) for row in rows):
        return [first_of(row.labels, _IDS) for row in rows]
    stems = [without_suffix(row.name) for row in rows]
    if all(row.name for row in rows) and max(Counter(stems).values(), default=1) == 1:
        return stems
    return [f"{row.file.relative_to(root).with_suffix('').as_posix()}/{row.number}" for row in rows]


def _splits(files: list[Path], root: Path, wanted: list[str]) -> dict[Path, tuple[str | None, str]]:
    """Return the split of each file, and where its name came from."""
    found: dict[Path, tuple[str | None, str]] = {}
    for file in files:
        stem = re.sub(r"-\d+-of-\d+$", "", file.stem)
        parts = (*file.relative_to(root).parts[:-1], stem)
        split = split_of_folders(parts, wanted, file)
        if split is None:
            found[file] = (None, "")
        else:
            origin = f"file {file.name}" if split[1] == len(parts) else f"folder {'/'.join(parts[: split[1]])}"
            found[file] = (split[0], origin)
    if any(split for split, _ in found.values()):
        return {file: (split or ".", origin or "outside the splits") for file, (split, origin) in found.items()}
    return found


def _label_columns(schema: pa.Schema) -> list[str]:
    names = [name for name in (*_IDS, *TEXTS, *SPEAKERS) if name in schema.names]
    if "split" in schema.names and is_text(schema.field("split").type):
        names.append("split")
    return names


def _parquet_rows(file: Path, column: str) -> list[_Row]:
    try:
        with pq.ParquetFile(file) as parquet:
            names = [*_label_columns(parquet.schema_arrow)]
            paths = f"{column}.path"
            leaves = [parquet.metadata.schema.column(n).path for n in range(len(parquet.metadata.schema))]
            records = parquet.read(columns=[*names, *([paths] if paths in leaves else [])]).to_pylist()
            embedded = _embedded(parquet, leaves.index(f"{column}.bytes"), f"{column}.bytes")
            if not records:
                records = [{}] * parquet.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} can't be read ({first_line(error)})") from error
    rows = []
    for number, (record, has_bytes) in enumerate(zip(records, embedded, strict=True)):
        name = (record.get(column) or {}).get("path") or ""
        shown = Path(name).name[:200] or None
        address = AudioAddress(str(file), row=number, column=column, name=shown) if has_bytes else None
        rows.append(_Row(file, number, name, record, address))
    return rows


def _embedded(parquet: pq.ParquetFile, leaf: int, column: str) -> list[bool]:
    """Return for each row whether it has bytes. They are only read where some rows of a row group have none."""
    embedded: list[bool] = []
    for number in range(parquet.metadata.num_row_groups):
        group = parquet.metadata.row_group(number)
        statistics = group.column(leaf).statistics
        nulls = statistics.null_count if statistics is not None and statistics.has_null_count else None
        if nulls in (0, group.num_rows):
            embedded += [nulls == 0] * group.num_rows
        else:
            values = parquet.read_row_group(number, columns=[column]).column(0)
            embedded += [has for chunk in values.chunks for has in chunk.field("bytes").is_valid().to_pylist()]
    return embedded


def _arrow_rows(file: Path, column: str) -> list[_Row]:
    rows = []
    names = _label_columns(_schema(file))
    for number, found in enumerate(arrow_bytes.read_rows(file, column, names)):
        shown = Path(found.name).name[:200] or None
        address = None
        if found.offset is not None:
            address = AudioAddress(str(file), offset=found.offset, size=found.size, name=shown or f"row {number}")
        rows.append(_Row(file, number, found.name, found.labels, address))
    return rows
