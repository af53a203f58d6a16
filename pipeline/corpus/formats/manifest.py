"""Manifests: CSV and Parquet tables of audio files."""

import csv
import io
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_distill.pipeline.corpus.found import FoundFile

COLUMNS = ("path", "id", "split")
# Columns with such a word select a part of a file.
_PARTS = {"start", "end", "begin", "stop", "offset", "onset"}


def find_in_manifest(path: Path, notes: list[str]) -> list[FoundFile]:
    """Read the files of a manifest.

    Args:
        path: ``.csv`` (UTF-8, or UTF-16) or ``.parquet`` file.
        notes: Sentences for the user are appended to it.

    Raises:
        ValueError: The manifest can't be read, lacks the column ``path`` or a value, repeats a column, or selects parts of files.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        header, columns = _read_parquet(path)
    elif suffix == ".csv":
        header, columns = _read_csv(path)
    else:
        raise ValueError(f"{path} is neither a folder of audio nor a .csv or .parquet manifest")
    if "path" not in columns:
        hint = "; separate the columns by commas" if len(header) == 1 and re.search(r"[;\t|]", header[0]) else ""
        raise ValueError(
            f"the manifest {path} has no column 'path'; its columns are {', '.join(header) or 'none'}{hint}"
        )
    for name in columns:
        if not all(columns[name]):
            row = next(n for n, value in enumerate(columns[name], 1) if not value)
            raise ValueError(f"row {row} of the manifest {path} has no {name}; fill it in, or remove the row")
    parts = [name for name in header if set(re.split("[^a-z]+", name.lower())) & _PARTS]
    if parts:
        raise ValueError(
            f"the manifest {path} has the column {parts[0]!r}, but parts of files can't be used; cut the files, or remove the column "
            "to use them whole"
        )
    unknown = [name for name in header if name.strip().lower() not in COLUMNS]
    if unknown:
        notes.append(
            f"the columns {', '.join(unknown)} of {path} are not used; the known ones are {', '.join(COLUMNS)}"
        )
    files = [path.parent / file for file in columns["path"]]
    ids = columns.get("id") or [Path(file).with_suffix("").as_posix() for file in columns["path"]]
    splits = [name.strip() for name in columns["split"]] if "split" in columns else [None] * len(files)
    origin = "" if "split" not in columns else f"column split of {path.name}"
    return [FoundFile(id, file, split, origin) for id, file, split in zip(ids, files, splits, strict=True)]


def _known(header: list[str], path: Path) -> dict[str, int]:
    """Return the positions of the known columns, whose names may have spaces around them and capital letters."""
    names = [name.strip().lower() for name in header]
    for name, count in Counter(names).items():
        if count > 1 and name:
            raise ValueError(f"the manifest {path} has {count} columns {name!r}; rename or remove all but one of them")
    return {name: names.index(name) for name in COLUMNS if name in names}


def _read_parquet(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Return the names of all columns, and the values of the known ones."""
    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise ValueError(f"the manifest {path} can't be read ({str(error).splitlines()[0]})") from error
    columns = {}
    for name, column in _known(table.column_names, path).items():
        try:
            columns[name] = pc.cast(table.column(column), pa.string()).to_pylist()
        except pa.ArrowException as error:
            raise ValueError(f"the column {name!r} of the manifest {path} must contain text") from error
    return table.column_names, columns


def _read_csv(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Return the names of all columns, and the values of the known ones. Values are text, so that an id 0012 keeps its zeros."""
    try:
        lines = io.StringIO(_decode(path.read_bytes()), newline="")
    except UnicodeDecodeError as error:
        raise ValueError(f"the manifest {path} can't be read ({error}); save it as UTF-8") from error
    # Strict readers refuse text after a closing quote, and quotes that are never closed.
    reader = csv.reader(lines, strict=True, skipinitialspace=True)
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
    known = _known(header, path)
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"the manifest {path} can't be read (line {line} has {len(row)} values, but the first line names {len(header)} "
                "columns); quote values that contain commas"
            )
        for name, column in known.items():
            if "\n" in row[column].strip():
                raise ValueError(
                    f"the manifest {path} can't be read (the {name} of line {line} has several lines); close the quote in that line"
                )
    return header, {name: [row[column].strip() for _, row in rows] for name, column in known.items()}


def _decode(content: bytes) -> str:
    """Decode UTF-8 or UTF-16, with or without a byte-order mark."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16")
    if b"\0" in content[:2]:
        return content.decode("utf-16-be" if content[0] == 0 else "utf-16-le")
    return content.decode("utf-8-sig")
