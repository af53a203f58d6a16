"""Lines of text files, also of compressed ones, and JSON objects in lines. Their lengths are limited."""

import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ray_distill.pipeline.corpus.formats.hidden import visible

MAX_LINE = 1 << 24
"""Maximum number of bytes of a line."""
MAX_LOOKED_AT = 50
"""Number of JSON files of a folder that are looked at, to tell its format. A folder may have one for each audio file."""

TEXTS = ("text", "transcript", "transcription", "sentence", "normalized_text", "raw_text")
"""Columns of Hugging Face's datasets that have a transcript, the first of them first."""
SPEAKERS = ("speaker_id", "speaker", "spk_id", "client_id")
"""Columns of Hugging Face's datasets that have a speaker."""

# Columns with such a word, other than start and end of manifests, select a piece of a file.
_PIECES = {"start", "tstart", "begin", "onset", "offset", "end", "tend", "stop", "segments"}

_JSON = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Read a UTF-8 text file, which may be compressed by gzip (``.gz``).

    Yields:
        The 1-based number and the text of each line that is not empty, without white space around it but with tabs before it.

    Raises:
        ValueError: The file can't be read, is not UTF-8, or has a line of more than 16 MiB.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            number = 0
            while data := file.readline(MAX_LINE + 1):
                number += 1
                if len(data) > MAX_LINE:
                    raise ValueError(
                        f"line {number} of {path} has more than {MAX_LINE >> 20} MiB, so it is not a line of a corpus"
                    )
                if text := data.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n"):
                    yield number, text
    except UnicodeDecodeError as error:
        raise ValueError(f"line {number} of {path} is not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} can't be read ({error})") from error


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a file with a JSON object in each line, or with one array of objects.

    Yields:
        The 1-based number of the line, or of the object in the array, and the object.

    Raises:
        ValueError: The file can't be read, or a line is no JSON object.
    """
    for number, line in read_lines(path):
        if number == 1 and line.startswith("["):
            yield from _read_array(path)
            return
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} of {path} is not JSON ({error}); each line must be an object") from error
        if not isinstance(record, dict):
            raise ValueError(f"line {number} of {path} is no JSON object, but each line must be one")
        yield number, record


def _read_array(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = "\n".join(line for _, line in read_lines(path))
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise ValueError(f"item {number} of {path} is no JSON object, but each item must be one")
        yield number, record


def json_files(path: Path) -> list[Path]:
    """Return the JSON files in a folder, sorted, or the file itself."""
    files = [path] if path.is_file() else visible(path.iterdir(), path)
    return sorted(file for file in files if file.name.lower().endswith(_JSON))


def first_record(path: Path) -> dict[str, Any]:
    """Return the first object of a file of JSON lines. Empty if it has none or is something else."""
    if not path.name.lower().endswith(_JSON):
        return {}
    try:
        return next(read_records(path), (0, {}))[1]
    except ValueError:
        return {}


def seconds_of(value: object, what: str) -> float | None:
    """Return a time in seconds, or None if there is no value.

    Args:
        value: Number or text.
        what: Name of the value and its place, for the message.

    Raises:
        ValueError: The value is no finite number of at least 0.
    """
    if value is None or value == "":
        return None
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise ValueError(f"{what} is {str(value)[:40]!r}; give seconds, such as 12.34")
    return seconds


def check_piece(start: float | None, end: float | None, place: str) -> None:
    """Raise ValueError if a piece ends before it starts. An empty piece passes: decoding lists it as skipped."""
    if end is not None and end < (start or 0):
        raise ValueError(f"{place} has a piece from {start or 0:g} s to {end:g} s; its end must come after its start")


def words_of_pieces(column: str) -> bool:
    """Return whether a column's name says that it selects pieces of files, as ``start_time`` and ``offset`` do."""
    name = column.strip().lower()
    return name in ("from", "to") or bool(set(re.split("[^a-z]+", name)) & _PIECES)


def text_of(value: object) -> str:
    """Return a text, number or missing value as one line of text."""
    return "" if value is None else " ".join(str(value).split())


def first_of(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the text of the first of some columns that a row has; empty if it has none."""
    return next((text_of(row[name]) for name in names if name in row), "")


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column of this type has texts."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
