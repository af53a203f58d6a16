"""Transcripts, speakers and domains of a corpus, stored beside its index for probes and for weights of teachers."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_distill.pipeline.corpus.formats.manifest_table import read_table
from ray_distill.pipeline.corpus.formats.text_lines import (
    SPEAKERS,
    TEXTS,
    first_of,
    first_record,
    read_lines,
    read_records,
    text_of,
)
from ray_distill.pipeline.corpus.found import FoundFiles
from ray_distill.whole_files import replacing

LABELS = "labels.parquet"
_MAX_TEXT = 1 << 20
"""Maximum number of bytes of a file with one transcript."""
_ROWS = 1 << 20
"""Number of labels that are written at a time, which is that of Parquet's row groups."""


@dataclass(frozen=True)
class Label:
    """The speaker, the transcript and the domain of an utterance. They are empty where the corpus has none."""

    speaker: str
    text: str
    domain: str = ""


@dataclass(frozen=True)
class LabelCounts:
    """The numbers of transcripts and of speakers, and of the utterances of each domain that is named."""

    transcripts: int = 0
    speakers: int = 0
    domains: Mapping[str, int] = field(default_factory=dict)


def labels_of(ids: Iterable[str], entries: FoundFiles) -> Iterator[tuple[str, Label]]:
    """Yield the ids and labels of utterances: what the format found, or else what files beside the audio say.

    A window has no transcript, since that belongs to the whole recording. Domains are those that the format found.

    Args:
        ids: N ids of utterances.
        entries: The N entries that they are from.

    Raises:
        ValueError: A table of an audio folder is damaged.
    """
    rows = entries.rows("id", "path", "start", "end", "speaker", "text", "inside", "domain")
    for id, (known, path, start, end, speaker, text, inside, domain) in zip(ids, rows, strict=True):
        found = speaker or text or inside or start is not None or end is not None
        label = Label(speaker or "", text or "") if found else _label_beside(Path(path))
        yield id, Label(label.speaker, label.text if known == id else "", domain or "")


def _label_beside(path: Path) -> Label:
    """Return what files beside the audio say.

    Read are the ``metadata.csv`` or ``metadata.jsonl`` of an audio folder of Hugging Face (with a column ``file_name``), LibriSpeech's
    ``SPEAKER-CHAPTER.trans.txt``, MLS's ``transcripts.txt``, LJSpeech's ``metadata.csv``, and a file with the audio's name and the
    suffix ``.normalized.txt`` (LibriTTS) or ``.txt``, also TIMIT's, whose first two numbers are left out. Speakers are the folders of
    LibriSpeech, MLS, LibriTTS and TIMIT.

    Raises:
        ValueError: A table of an audio folder is damaged.
    """
    if (label := _audio_folder(path)) is not None:
        return label
    try:
        return _librispeech(path) or _mls(path) or _ljspeech(path) or _beside(path) or Label("", "")
    except (OSError, ValueError):
        return Label("", "")  # No transcript is needed.


def _audio_folder(path: Path) -> Label | None:
    """Return what a table of an audio folder says, in the folder of the audio or up to three above it, whose column ``file_name`` has
    paths from the folder of the table."""
    for folder in path.parents[:4]:
        if (labels := _metadata(folder)) and (label := labels.get(path.relative_to(folder).as_posix())) is not None:
            return label
    return None


@lru_cache(maxsize=64)
def _metadata(folder: Path) -> dict[str, Label]:
    """Return the rows of the ``metadata.csv`` and ``metadata.jsonl`` of a folder by ``file_name``. Empty without such a column."""
    return {
        PurePosixPath(name).as_posix(): Label(first_of(row, SPEAKERS), first_of(row, TEXTS))
        for table in _tables(folder)
        for row in _rows(table)
        if (name := text_of(row.get("file_name")))
    }


def _tables(folder: Path) -> list[Path]:
    return [table for name in ("metadata.jsonl", "metadata.csv") if (table := folder / name).is_file()]


def _rows(table: Path) -> list[dict[str, Any]]:
    """Return the rows of a table of an audio folder; none if it has no column ``file_name``, as LJSpeech's has not."""
    if table.suffix == ".jsonl":
        return [record for _, record in read_records(table)] if "file_name" in first_record(table) else []
    if "file_name" not in next(read_lines(table), (1, ""))[1]:
        return []
    header, values = read_table(table)
    return [dict(zip(header, line, strict=True)) for line in values]


def audio_folder_notes(paths: Iterable[Path]) -> tuple[str, ...]:
    """Return what in the tables of audio folders is not used, one sentence for each kind and table.

    Args:
        paths: Audio files.
    """
    known = set(paths)
    folders = {place for parent in {path.parent for path in known} for place in (parent, *parent.parents[:3])}
    notes = []
    for table in (table for folder in sorted(folders) for table in _tables(folder)):
        rows = _rows(table)
        if not rows:
            if not (table.parent / "wavs").is_dir():  # LJSpeech has a table of another kind.
                notes.append(f"{table} has no column file_name, so nothing of it is used")
            continue
        names = Counter(PurePosixPath(name).as_posix() for row in rows if (name := text_of(row.get("file_name"))))
        absent = [name for name in names if (path := table.parent / name) not in known and not path.is_file()]
        repeated = [name for name, count in names.items() if count > 1]
        if absent:
            notes.append(
                f"{table} names files that don't exist ({len(absent):,} of {len(names):,}), such as {absent[0]}"
            )
        if repeated:
            notes.append(
                f"{table} has several rows for the same file ({len(repeated):,} of {len(names):,}), such as {repeated[0]}; the "
                "last one is used"
            )
        if not set(rows[0]) & {*TEXTS, *SPEAKERS}:
            notes.append(
                f"{table} has no column of transcripts or speakers; they are called {', '.join((*TEXTS, *SPEAKERS))}"
            )
    return tuple(notes)


def _librispeech(path: Path) -> Label | None:
    chapter = path.parent
    name = f"{chapter.parent.name}-{chapter.name}"
    if not path.stem.startswith(f"{name}-"):
        return None
    return Label(chapter.parent.name, _table(chapter / f"{name}.trans.txt", " ").get(path.stem, ""))


def _mls(path: Path) -> Label | None:
    book = path.parent
    if not path.stem.startswith(f"{book.parent.name}_{book.name}_") or book.parent.parent.name != "audio":
        return None
    return Label(book.parent.name, _table(book.parent.parent.parent / "transcripts.txt", "\t").get(path.stem, ""))


def _ljspeech(path: Path) -> Label | None:
    if path.parent.name != "wavs":
        return None
    # The columns are the id, the text, and the text with numbers written out.
    text = _table(path.parent.parent / "metadata.csv", "|").get(path.stem)
    return None if text is None else Label("", text_of(text.rpartition("|")[2]))


def _beside(path: Path) -> Label | None:
    speaker = ""
    folder = path.parent
    if re.fullmatch(r"DR\d", folder.parent.name, re.IGNORECASE):  # TIMIT
        speaker = folder.name
    elif path.stem.startswith(f"{folder.parent.name}_{folder.name}_"):  # LibriTTS
        speaker = folder.parent.name
    for suffix in (".normalized.txt", ".txt", ".TXT"):
        if (name := path.stem + suffix) not in _text_files(folder):
            continue
        file = folder / name
        if file.is_file() and file.stat().st_size <= _MAX_TEXT:
            text = " ".join(line for _, line in read_lines(file))
            return Label(speaker, text_of(re.sub(r"^\d+ \d+ ", "", text)))
    return Label(speaker, "") if speaker else None


@lru_cache(maxsize=64)
def _text_files(folder: Path) -> frozenset[str]:
    """Return the names of the text files in a folder, which is listed once for all of its audio. Empty if it can't be listed."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.name.endswith((".txt", ".TXT")))
    except OSError:
        return frozenset()


@lru_cache(maxsize=4)
def _table(file: Path, separator: str) -> dict[str, str]:
    """Return the lines of a file as ids and transcripts. Empty if there is no such file."""
    if not file.is_file():
        return {}
    return {id: text_of(text) for _, line in read_lines(file) for id, _, text in [line.partition(separator)]}


def write_labels(folder: Path, labels: Iterable[tuple[str, Label]]) -> LabelCounts:
    """Write ``labels.parquet`` with the columns ``id``, ``speaker``, ``text`` and ``domain``, or remove it if all are empty.

    Returns:
        How many labels there are.
    """
    for known in (_metadata, _text_files, _table):
        known.cache_clear()  # The files may have changed since another index of this process.
    file = folder / LABELS
    schema = pa.schema([(name, pa.string()) for name in ("id", "speaker", "text", "domain")])
    rows = ((id, label.speaker, label.text, label.domain) for id, label in labels if label != Label("", ""))
    transcripts, count, speakers, domains = 0, 0, set[str](), Counter[str]()
    with replacing(file) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        while batch := list(itertools.islice(rows, _ROWS)):
            writer.write_table(pa.table(list(zip(*batch, strict=True)), schema=schema), _ROWS)
            count += len(batch)
            transcripts += sum(bool(text) for _, _, text, _ in batch)
            speakers |= {speaker for _, speaker, _, _ in batch}
            domains.update(domain for *_, domain in batch if domain)
    if not count:
        file.unlink()
    return LabelCounts(transcripts, len(speakers - {""}), dict(sorted(domains.items())))


def read_labels(folder: Path) -> dict[str, Label]:
    """Return the labels beside an index, by id of the utterance. Empty if the corpus has none.

    Raises:
        ValueError: The file is damaged.
    """
    file = folder / LABELS
    if not file.is_file():
        return {}
    try:
        rows = pq.read_table(file).to_pylist()
        # Indexes of earlier versions have no domains.
        return {row["id"]: Label(row["speaker"], row["text"], row.get("domain", "")) for row in rows}
    except (OSError, pa.ArrowException, KeyError) as error:
        raise ValueError(f"{file} is damaged; run the index stage again") from error
