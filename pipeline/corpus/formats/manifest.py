"""Manifests: tables of audio files and pieces of them, as CSV, TSV, Parquet or JSON lines."""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_distill.pipeline.corpus.formats.file_splits import located
from ray_distill.pipeline.corpus.formats.manifest_table import (
    COLUMNS,
    NEEDED,
    SPLIT_LIKE,
    SUFFIXES,
    Columns,
    read_columns,
)
from ray_distill.pipeline.corpus.formats.text_lines import check_piece, seconds_of, text_of, words_of_pieces
from ray_distill.pipeline.corpus.found import FOUND_SCHEMA, FoundFiles, Search, piece_id, without_suffix
from ray_distill.pipeline.corpus.splits import split_kinds
from ray_distill.teacher_cache.sources.address import Channel

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
    return path.is_file() and path.name.lower().endswith(SUFFIXES)


# Texts that Python reads in another way than the expressions of Arrow below do. They are read by Python, one by one.
_UNUSUAL_PATH = r"/\.?(/|$)|^\.(/|$)|^$|\x00"
_UNUSUAL_SPACE = (
    r"  |[\x00-\x1f\x7f]|^ | $|[\x{80}-\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"
)
_PLAIN_SECONDS = r"^(\d{1,8}(\.\d{1,9})?)?$"
_PLAIN_CHANNEL = r"^(mix|\d{1,2}(\.0)?)?$"
_BATCH = 4096
"""Number of rows that are Python objects at a time."""


def find(path: Path, search: Search) -> FoundFiles:
    """Return the audio of a manifest, a table with a column ``path`` and others of `COLUMNS`.

    Relative paths start at the manifest's folder. ``start`` and ``end`` are seconds; an empty one is the beginning or the end of
    the audio. ``channel`` is counted from 0, or ``mix``. Without a column ``id``, the id is the path without suffix, followed by
    the bounds and the channel of a piece.

    Raises:
        ValueError: The manifest can't be read, lacks the column ``path`` or a value, repeats a column, or has an impossible value.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, but a manifest is a file; set corpus.path to the file")
    header, rows, columns = read_columns(path)
    if header and not rows:
        raise ValueError(f"the manifest {path} has a header, but no rows")
    if "path" not in columns:
        other = next((name for name in header if name.strip().lower() in _NAMES_OF_PATHS), None)
        hint = "" if other is None else f"; rename the column {other!r} to path"
        separator = "tabs" if path.suffix.lower() == ".tsv" else "commas"
        hint = hint or (
            f"; separate the columns by {separator}" if len(header) == 1 and re.search(r"[,;\t|]", header[0]) else ""
        )
        raise ValueError(
            f"the manifest {path} has no column 'path'; its columns are {', '.join(header) or 'none'}{hint}"
        )
    _refuse_other_pieces(header, columns, path)
    for name in SPLIT_LIKE:
        _refuse_other_splits(name, columns.pop(name, None), "split" in columns, path)
    # pandas writes its row numbers to a column without a name.
    unknown = [name for name in header if name.strip() and name.strip().lower() not in COLUMNS]
    if unknown:
        search.notes.append(
            f"the columns {', '.join(unknown)} of {path} are not used; the known ones are {', '.join(COLUMNS)}"
        )
    return _found(columns, path)


def _refuse_other_splits(name: str, column: pa.LargeStringArray | None, has_split: bool, path: Path) -> None:
    """Raise ValueError if a manifest without a column ``split`` has another that says what is for validation or test."""
    if column is None or has_split:
        return
    other = next((value for value in pc.unique(column).to_pylist() if split_kinds(value) - {"train"}), None)
    if other is not None:
        raise ValueError(
            f"the column {name!r} of the manifest {path} seems to say what is for training, as with {other!r}; rename it to split, or "
            "to something else if it doesn't"
        )


def _found(columns: Columns, path: Path) -> FoundFiles:
    """Return the rows of a manifest. They are checked, and have values, column by column.

    Raises:
        ValueError: A value is missing or impossible; the first row with one is named.
    """
    count = len(columns["path"])
    times: dict[str, pa.DoubleArray] = {n: _seconds(columns[n]) for n in ("start", "end") if n in columns}
    _check(columns, times, path)
    found: dict[str, Any] = {name: pa.nulls(count) for name in FOUND_SCHEMA.names} | times
    if "split" in columns:
        found["split"] = _labels(columns["split"])
        found["origin"] = pa.DictionaryArray.from_arrays(
            pa.array(np.zeros(count, np.int32)), pa.array([f"column split of {path.name}"])
        )
    if "channel" in columns:
        codes = _labels(columns["channel"])
        values = [_channel(text, "") for text in codes.dictionary.to_pylist()]
        texts = pa.array([None if value is None else str(value) for value in values], pa.string())
        found["channel"] = _labels(texts.take(codes.indices))
    if "speaker" in columns:
        found["speaker"] = _labels(_replaced(columns["speaker"], _UNUSUAL_SPACE, text_of))
    if "domain" in columns:
        found["domain"] = _labels(columns["domain"])
    if "text" in columns:
        found["text"] = _replaced(columns["text"], _UNUSUAL_SPACE, text_of)
    found["id"] = columns["id"] if "id" in columns else _ids(columns, found)
    found["path"], found["inside"] = _places(columns.pop("path"), path.parent)
    return FoundFiles(pa.table([found[name] for name in FOUND_SCHEMA.names], FOUND_SCHEMA.names))


def _labels(column: pa.Array) -> pa.DictionaryArray:
    """Return a column of few different texts as codes."""
    return column.dictionary_encode().cast(pa.dictionary(pa.int32(), pa.string()))


def _seconds(column: pa.LargeStringArray) -> pa.DoubleArray:
    """Return times in seconds, null where there is none, and NaN where the text is impossible."""
    plain = pc.match_substring_regex(column, _PLAIN_SECONDS)
    empty = pc.equal(column, "")
    numbers = pc.if_else(pc.and_(plain, pc.invert(empty)), column, pa.scalar(None, pa.large_string())).cast(
        pa.float64()
    )
    if pc.all(plain).as_py():
        return numbers
    others = []
    for text in column.filter(pc.invert(plain)).to_pylist():
        try:
            others.append(seconds_of(text, ""))
        except ValueError:
            others.append(float("nan"))
    return pc.replace_with_mask(numbers, pc.invert(plain), pa.array(others, pa.float64()))


def _check(columns: Columns, times: dict[str, pa.DoubleArray], path: Path) -> None:
    """Raise ValueError for the first row with a missing or impossible value."""
    wrong = np.zeros(len(columns["path"]), bool)
    for name in NEEDED:
        if name in columns:
            wrong |= pc.equal(columns[name], "").to_numpy(zero_copy_only=False)
    start, end = (times[name].to_numpy(zero_copy_only=False) if name in times else None for name in ("start", "end"))
    for name, seconds in (("start", start), ("end", end)):
        if seconds is not None:
            wrong |= np.isnan(seconds) & pc.not_equal(columns[name], "").to_numpy(zero_copy_only=False)
    if end is not None:
        wrong |= end < (0 if start is None else np.nan_to_num(start))
    if "channel" in columns:
        wrong |= ~pc.match_substring_regex(columns["channel"], _PLAIN_CHANNEL).to_numpy(zero_copy_only=False)
    for row in np.flatnonzero(wrong).tolist():
        _check_row({name: column[row].as_py() for name, column in columns.items()}, row + 1, path)


def _check_row(values: dict[str, str], number: int, path: Path) -> None:
    place = f"row {number} of the manifest {path}"
    for name in NEEDED:
        if values.get(name) == "":
            raise ValueError(f"{place} has no {name}; fill it in, or remove the row")
    start, end = (seconds_of(values.get(name), f"the {name} in {place}") for name in ("start", "end"))
    check_piece(start, end, place)
    _channel(values.get("channel", ""), place)


def _ids(columns: Columns, found: dict[str, Any]) -> pa.LargeStringArray:
    """Return the ids of a manifest without ids: the paths without suffixes, and for pieces with their bounds."""
    stems = pc.replace_substring_regex(columns["path"], r"([^/])\.[^./]+$", r"\1")
    unusual = pc.match_substring_regex(columns["path"], _UNUSUAL_PATH)
    if pc.any(unusual).as_py():
        stems = pc.replace_with_mask(
            stems, unusual, _texts(map(without_suffix, _values(columns["path"].filter(unusual))))
        )
    if not {"start", "end", "channel"} & columns.keys():
        return stems
    channels = (_channel(text or "", "") for text in _values(found["channel"]))
    return _texts(map(piece_id, _values(stems), _values(found["start"]), _values(found["end"]), channels))


def _places(paths: pa.LargeStringArray, folder: Path) -> tuple[pa.LargeStringArray, pa.Array]:
    """Return paths of files and, for URLs, the addresses of their audio."""
    start = _text(f"{folder}".rstrip("/") + "/")
    relative = pc.invert(pc.starts_with(paths, "/"))
    places = pc.if_else(relative, pc.binary_join_element_wise(start, paths, _text("")), paths)
    unusual = pc.match_substring_regex(paths, _UNUSUAL_PATH)
    if not pc.any(unusual).as_py():
        return places, pa.nulls(len(paths))
    rest = paths.filter(unusual)
    places = pc.replace_with_mask(places, unusual, _texts(str(located(folder, text)[0]) for text in _values(rest)))
    addresses = (located(folder, text)[1] for text in _values(rest))
    inside = _texts(None if address is None else address.encode() for address in addresses)
    if inside.null_count == len(inside):
        return places, pa.nulls(len(paths))
    return places, pc.replace_with_mask(pa.nulls(len(paths), pa.large_string()), unusual, inside)


def _replaced(column: pa.LargeStringArray, unusual: str, function: Callable[[str], str]) -> pa.LargeStringArray:
    """Apply a function to the texts that an expression matches."""
    chosen = pc.match_substring_regex(column, unusual)
    if not pc.any(chosen).as_py():
        return column
    return pc.replace_with_mask(column, chosen, _texts(map(function, _values(column.filter(chosen)))))


def _values(column: pa.Array) -> Iterator[Any]:
    """Yield the values of a column."""
    for begin in range(0, len(column), _BATCH):
        yield from column.slice(begin, _BATCH).to_pylist()


def _texts(texts: Iterable[str | None]) -> pa.LargeStringArray:
    """Return texts as an array. Few of them are Python objects at a time."""
    rows = iter(texts)
    arrays = [pa.array(batch, pa.large_string()) for batch in iter(lambda: list(islice(rows, _BATCH)), [])]
    return pa.concat_arrays(arrays) if arrays else pa.array([], pa.large_string())


def _text(text: str) -> pa.Scalar:
    return pa.scalar(text, pa.large_string())


def _channel(text: str, place: str) -> Channel | None:
    if text == "mix" or not text:
        return text or None  # type: ignore[return-value]
    if not re.fullmatch(r"\d{1,2}(\.0)?", text):
        raise ValueError(f"the channel in {place} is {text[:40]!r}; give a number, counted from 0, or mix")
    return int(float(text))


def _refuse_other_pieces(header: list[str], columns: Columns, path: Path) -> None:
    """Raise ValueError if pieces of files seem to be meant by columns other than ``start`` and ``end``."""
    names = {name.strip().lower(): name for name in header}
    others = [name for low, name in names.items() if low not in COLUMNS and words_of_pieces(low)]
    if "duration" in names and "start" in columns and "end" not in columns:
        others.append(names["duration"])
    if others:
        raise ValueError(
            f"the manifest {path} has the column {others[0]!r}, but pieces of files are given by the columns start and end, in "
            "seconds; rename the column, or remove it"
        )
