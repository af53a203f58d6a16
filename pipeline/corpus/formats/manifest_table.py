"""The tables of manifests, as columns of text: CSV, TSV, Parquet and JSON lines. Rows are Python objects some thousands at a time."""

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_distill.first_line import first_line
from ray_distill.pipeline.corpus.formats.text_lines import is_text, read_records, text_of

NEEDED = ("path", "id", "split")
COLUMNS = (*NEEDED, "start", "end", "channel", "speaker", "text", "domain")
"""The known columns. A value of the first three can't be empty where the column exists."""
SPLIT_LIKE = ("splits", "subset", "partition", "set", "fold", "data_split")
"""Columns that may say what is for training, and are read so that a manifest in which they do can be refused."""
_READ = (*COLUMNS, *SPLIT_LIKE)
SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz")
_BATCH = 1 << 15
"""Number of rows that are Python objects at a time."""

Columns = dict[str, pa.LargeStringArray]
"""The columns of a manifest that are read, by name. An empty value is an empty text."""


def known_columns(header: list[str], path: Path) -> dict[str, int]:
    """Return the positions of the columns to read, whose names may have spaces around them and capital letters.

    Raises:
        ValueError: A column is repeated.
    """
    names = [name.strip().lower() for name in header]
    for name, count in Counter(names).items():
        if count > 1 and name:
            raise ValueError(f"the manifest {path} has {count} columns {name!r}; rename or remove all but one of them")
    return {name: names.index(name) for name in _READ if name in names}


def read_columns(path: Path) -> tuple[list[str], int, Columns]:
    """Read a manifest.

    Returns:
        The names of all columns, the number of rows, and the columns that are read.

    Raises:
        ValueError: It can't be read, or repeats a column.
    """
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _parquet_columns(path)
    if name.endswith((".csv", ".tsv")):
        return _text_columns(path)
    if not name.endswith(SUFFIXES):
        raise ValueError(f"{path} is no manifest, since its name ends in none of {', '.join(SUFFIXES)}")
    return _json_columns(path)


def _joined(arrays: Iterable[pa.Array]) -> pa.LargeStringArray:
    column = pa.chunked_array(arrays, pa.large_string())
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _text_columns(path: Path) -> tuple[list[str], int, Columns]:
    batches = _batches(path)
    header = next(batches)[0]
    found: list[list[pa.Array]] = [[] for _ in header]
    count = 0
    for batch in batches:
        count += len(batch)
        for name, arrays, values in zip(header, found, zip(*batch, strict=True), strict=True):
            if name.strip().lower() in _READ:
                arrays.append(pc.utf8_trim_whitespace(pa.array(values, pa.large_string())))
    # Rows are checked first, so that a repeated column is not said instead.
    at = known_columns(header, path) if count else {}
    return header, count, {name: _joined(found[at[name]]) for name in at}


def _json_columns(path: Path) -> tuple[list[str], int, Columns]:
    header: dict[str, None] = {}
    found: dict[str, list[pa.Array]] = {}
    count = 0
    records = (record for _, record in read_records(path))
    while batch := list(itertools.islice(records, _BATCH)):
        header |= dict.fromkeys(key for record in batch for key in record)
        for key in header:
            if (known := key.strip().lower()) in _READ:
                if key not in found:
                    found[key] = [pa.array([""] * count, pa.large_string())]
                values = [record.get(key) for record in batch]
                if known in SPLIT_LIKE:
                    values = [value if isinstance(value, str) else None for value in values]
                if wrong := next((value for value in values if isinstance(value, dict | list)), None):
                    raise ValueError(
                        f"the {key} of an object in the manifest {path} is {json.dumps(wrong)[:80]}; give one text or number, as the "
                        "columns of a table have"
                    )
                found[key].append(pa.array(list(map(text_of, values)), pa.large_string()))
        count += len(batch)
    names = list(header)
    at = known_columns(names, path) if count else {}
    return names, count, {name: _joined(found[names[place]]) for name, place in at.items()}


def _parquet_columns(path: Path) -> tuple[list[str], int, Columns]:
    try:
        with pq.ParquetFile(path) as file:
            header = list(file.schema_arrow.names)
            at = known_columns(header, path)
            count = file.metadata.num_rows
            texts = {field.name: is_text(field.type) for field in file.schema_arrow}
            at = {name: place for name, place in at.items() if name in COLUMNS or texts[header[place]]}
            tables = {name: file.read(columns=[header[place]]) for name, place in at.items()}
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"the manifest {path} can't be read ({first_line(error)})") from error
    columns = {}
    for name, table in tables.items():
        try:
            texts = table.column(0)
            if not pa.types.is_large_string(texts.type):
                texts = pc.cast(pc.cast(texts, pa.string()), pa.large_string())
        except pa.ArrowException as error:
            raise ValueError(f"the column {name!r} of the manifest {path} must contain text") from error
        columns[name] = _joined(pc.fill_null(texts, "").chunks)
    return header, count, columns


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Read a table of text: a ``.csv`` file with quotes, or a ``.tsv`` file, in which quotes are ordinary characters.

    Args:
        path: UTF-8 or UTF-16 file, whose first line names the columns.

    Returns:
        The names of the columns, and the values of each row, as text, so that an id 0012 keeps its zeros.

    Raises:
        ValueError: The file can't be read, or a line has more or fewer values than columns.
    """
    (header,), *batches = _batches(path)
    return header, [[value.strip() for value in row] for batch in batches for row in batch]


def _batches(path: Path) -> Iterator[list[list[str]]]:
    """Yield the header of a table of text alone, and then its rows in batches. Raises as `read_table`, at the end."""
    tabs = path.suffix.lower() == ".tsv"
    rows = _rows(path, tabs)
    first = next(rows, None)
    if first is None:
        raise ValueError(
            f"the manifest {path} can't be read (it is empty); its first line names the columns, such as path,split"
        )
    header = first[1]
    yield [header]
    inner = [at for at, name in enumerate(header) if name.strip().lower() in COLUMNS and name.strip().lower() != "text"]
    wrong: ValueError | None = None
    while batch := list(itertools.islice(rows, _BATCH)):
        if wrong is None:
            wrong = _wrong_row(batch, header, inner, path, tabs)
        if wrong is None:  # Otherwise the other rows are only read for a quote that isn't closed, which is said first.
            yield [row for _, row in batch]
    if wrong is not None:
        raise wrong


def _wrong_row(
    batch: list[tuple[int, list[str]]], header: list[str], inner: list[int], path: Path, tabs: bool
) -> ValueError | None:
    """Return the error for the first row that has not a value for each column, or several lines in one of the ``inner`` columns."""
    if all(len(row) == len(header) for _, row in batch) and not any(
        "\n" in row[at] for _, row in batch for at in inner
    ):
        return None
    advice = "remove tabs inside values" if tabs else "quote values that contain commas"
    if not tabs and len(header) == 1 and re.search(r"[;\t|]", header[0]):
        advice = "separate the columns by commas, and write numbers with a dot"
    for line, row in batch:
        if len(row) != len(header):
            return ValueError(
                f"the manifest {path} can't be read (line {line} has {len(row)} values, but the first line names {len(header)} "
                f"columns); {advice}"
            )
        for at in inner:
            if "\n" in row[at].strip():
                return ValueError(
                    f"the manifest {path} can't be read (the {header[at]} of line {line} has several lines); close the quote in that "
                    "line"
                )
    return None


def _rows(path: Path, tabs: bool) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the first line and the values of each row that is not empty."""
    line, encoding = 1, "utf-8-sig"
    try:
        encoding = _encoding(path)
        with path.open(encoding=encoding, newline="") as lines:
            # Strict readers refuse text after a closing quote, and quotes that are never closed.
            reader = (
                csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
                if tabs
                else csv.reader(lines, strict=True, skipinitialspace=True)
            )
            try:
                for row in reader:
                    if row:
                        yield line, row
                    line = reader.line_num + 1
            except csv.Error as error:
                for _ in lines:  # What is not UTF-8 is said first.
                    pass
                raise ValueError(
                    f"the manifest {path} can't be read (line {line} has a quote that isn't closed, or text after a closing quote: "
                    f'{error}); close the quote, or write "" for a quote inside a quoted value'
                ) from error
    except (UnicodeDecodeError, OSError) as error:
        reason = error
        if isinstance(error, UnicodeDecodeError):
            try:
                path.read_bytes().decode(encoding)
            except UnicodeDecodeError as whole:  # It has the position in the file.
                reason = whole
        raise ValueError(f"the manifest {path} can't be read ({reason}); save it as UTF-8") from error


def _encoding(path: Path) -> str:
    """Return the encoding of a file in UTF-8 or UTF-16, with or without a byte-order mark."""
    with path.open("rb") as file:
        start = file.read(2)
    if start in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    if b"\0" in start:
        return "utf-16-be" if start[0] == 0 else "utf-16-le"
    return "utf-8-sig"
