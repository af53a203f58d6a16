"""Manifests: tables of audio files and pieces of them, as CSV, TSV, Parquet or JSON lines."""

import csv
import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_distill.pipeline.corpus.formats.file_splits import located
from ray_distill.pipeline.corpus.formats.text_lines import check_piece, read_records, seconds_of, text_of
from ray_distill.pipeline.corpus.found import FoundFile, Search, piece_id, without_suffix
from ray_distill.teacher_cache.sources.address import Channel

_NEEDED = ("path", "id", "split")
COLUMNS = (*_NEEDED, "start", "end", "channel", "speaker", "text")
"""The known columns. A value of the first three can't be empty where the column exists."""
_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz")
# Other columns with such a word select a piece of a file.
_PARTS = {"start", "end", "begin", "stop", "offset", "onset"}

_NAMES_OF_PATHS = (
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "audio",
    "audio_path",
    "audio_file",
    "wav",
    "wav_path",
)
"""Names that other programs give the column ``path``."""


def matches(path: Path) -> bool:
    """Return whether a file has the suffix of a manifest."""
    return path.is_file() and path.name.lower().endswith(_SUFFIXES)


def find(path: Path, search: Search) -> list[FoundFile]:
    """Return the audio of a manifest, a table with a column ``path`` and others of `COLUMNS`.

    Relative paths start at the manifest's folder. ``start`` and ``end`` are seconds; an empty one is the beginning or the end of
    the audio. ``channel`` is counted from 0, or ``mix``. Without a column ``id``, the id is the path without suffix, followed by
    the bounds and the channel of a piece.

    Raises:
        ValueError: The manifest can't be read, lacks the column ``path`` or a value, repeats a column, or has an impossible value.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, but a manifest is a file; set corpus.path to the file")
    header, rows = _read(path)
    if header and not rows:
        raise ValueError(f"the manifest {path} has a header, but no rows")
    columns = _known(header, path)
    if "path" not in columns:
        other = next((name for name in header if name.strip().lower() in _NAMES_OF_PATHS), None)
        hint = "" if other is None else f"; rename the column {other!r} to path"
        hint = hint or (
            "; separate the columns by commas" if len(header) == 1 and re.search(r"[;\t|]", header[0]) else ""
        )
        raise ValueError(
            f"the manifest {path} has no column 'path'; its columns are {', '.join(header) or 'none'}{hint}"
        )
    _refuse_other_pieces(header, columns, path)
    unknown = [name for name in header if name.strip().lower() not in COLUMNS]
    if unknown:
        search.notes.append(
            f"the columns {', '.join(unknown)} of {path} are not used; the known ones are {', '.join(COLUMNS)}"
        )
    return [_entry({name: row[at] for name, at in columns.items()}, number, path) for number, row in enumerate(rows, 1)]


def _entry(values: dict[str, str], number: int, path: Path) -> FoundFile:
    place = f"row {number} of the manifest {path}"
    for name in _NEEDED:
        if values.get(name) == "":
            raise ValueError(f"{place} has no {name}; fill it in, or remove the row")
    start, end = (seconds_of(values.get(name), f"the {name} in {place}") for name in ("start", "end"))
    check_piece(start, end, place)
    channel = _channel(values.get("channel", ""), place)
    file, inside = located(path.parent, values["path"])
    return FoundFile(
        id=values.get("id") or piece_id(without_suffix(values["path"]), start, end, channel),
        path=file,
        split=values.get("split"),
        origin=f"column split of {path.name}" if "split" in values else "",
        start=start,
        end=end,
        channel=channel,
        speaker=text_of(values.get("speaker")),
        text=text_of(values.get("text")),
        inside=inside,
    )


def _channel(text: str, place: str) -> Channel | None:
    if text == "mix" or not text:
        return text or None  # type: ignore[return-value]
    if not re.fullmatch(r"\d{1,2}(\.0)?", text):
        raise ValueError(f"the channel in {place} is {text[:40]!r}; give a number, counted from 0, or mix")
    return int(float(text))


def _known(header: list[str], path: Path) -> dict[str, int]:
    """Return the positions of the known columns, whose names may have spaces around them and capital letters."""
    names = [name.strip().lower() for name in header]
    for name, count in Counter(names).items():
        if count > 1 and name:
            raise ValueError(f"the manifest {path} has {count} columns {name!r}; rename or remove all but one of them")
    return {name: names.index(name) for name in COLUMNS if name in names}


def _refuse_other_pieces(header: list[str], columns: dict[str, int], path: Path) -> None:
    """Raise ValueError if pieces of files seem to be meant by columns other than ``start`` and ``end``."""
    names = {name.strip().lower(): name for name in header}
    others = [name for low, name in names.items() if low not in COLUMNS and set(re.split("[^a-z]+", low)) & _PARTS]
    if "duration" in names and "start" in columns and "end" not in columns:
        others.append(names["duration"])
    if others:
        raise ValueError(
            f"the manifest {path} has the column {others[0]!r}, but pieces of files are given by the columns start and end, in "
            "seconds; rename the column, or remove it"
        )


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    """Return the names of all columns, and the values of each row; of a Parquet file only those of the known columns."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _read_parquet(path)
    if name.endswith((".csv", ".tsv")):
        return read_table(path)
    if not name.endswith(_SUFFIXES):
        raise ValueError(f"{path} is no manifest, since its name ends in none of {', '.join(_SUFFIXES)}")
    return _read_json_lines(path)


def _read_json_lines(path: Path) -> tuple[list[str], list[list[str]]]:
    records: list[dict[str, Any]] = [record for _, record in read_records(path)]
    header = list(dict.fromkeys(key for record in records for key in record))
    known = {key for key in header if key.strip().lower() in COLUMNS}
    return header, [[text_of(record.get(key)) if key in known else "" for key in header] for record in records]


def _read_parquet(path: Path) -> tuple[list[str], list[list[str]]]:
    try:
        with pq.ParquetFile(path) as file:
            header = list(file.schema_arrow.names)
            known = _known(header, path)
            table = file.read(columns=[header[at] for at in known.values()])
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"the manifest {path} can't be read ({str(error).splitlines()[0]})") from error
    columns = [[""] * table.num_rows for _ in header]
    for name, at in known.items():
        try:
            values = pc.cast(table.column(header[at]), pa.string()).to_pylist()
        except pa.ArrowException as error:
            raise ValueError(f"the column {name!r} of the manifest {path} must contain text") from error
        columns[at] = [value or "" for value in values]
    return header, [list(row) for row in zip(*columns, strict=True)]


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Read a table of text: a ``.csv`` file with quotes, or a ``.tsv`` file, in which quotes are ordinary characters.

    Args:
        path: UTF-8 or UTF-16 file, whose first line names the columns.

    Returns:
        The names of the columns, and the values of each row, as text, so that an id 0012 keeps its zeros.

    Raises:
        ValueError: The file can't be read, or a line has more or fewer values than columns.
    """
    tabs = path.suffix.lower() == ".tsv"
    try:
        lines = io.StringIO(_decode(path.read_bytes()), newline="")
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"the manifest {path} can't be read ({error}); save it as UTF-8") from error
    # Strict readers refuse text after a closing quote, and quotes that are never closed.
    reader = (
        csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        if tabs
        else csv.reader(lines, strict=True, skipinitialspace=True)
    )
    rows, line = [], 1
    try:
        for row in reader:
            if row:
                rows.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"the manifest {path} can't be read (line {line} has a quote that isn't closed, or text after a closing quote: {error}); "
            'close the quote, or write "" for a quote inside a quoted value'
        ) from error
    if not rows:
        raise ValueError(
            f"the manifest {path} can't be read (it is empty); its first line names the columns, such as path,split"
        )
    (_, header), *rows = rows
    advice = "remove tabs inside values" if tabs else "quote values that contain commas"
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"the manifest {path} can't be read (line {line} has {len(row)} values, but the first line names {len(header)} "
                f"columns); {advice}"
            )
        for name, value in zip(header, row, strict=True):
            if name.strip().lower() in COLUMNS and name.strip().lower() != "text" and "\n" in value.strip():
                raise ValueError(
                    f"the manifest {path} can't be read (the {name} of line {line} has several lines); close the quote in that line"
                )
    return header, [[value.strip() for value in row] for _, row in rows]


def _decode(content: bytes) -> str:
    """Decode UTF-8 or UTF-16, with or without a byte-order mark."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16")
    if b"\0" in content[:2]:
        return content.decode("utf-16-be" if content[0] == 0 else "utf-16-le")
    return content.decode("utf-8-sig")
