"""Bytes embedded in a row of a Parquet file, as Hugging Face's datasets store audio."""

import mmap
import os
import struct
import threading
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ray_distill.first_line import first_line

MAX_GROUP_BYTES = 2 << 30
"""Maximum uncompressed size of a column in a row group, 2 GiB. A row group is read as a whole."""

_LOCK = threading.Lock()  # Threads that read neighbouring rows wait for one of them to read their row group.


def read_row(path: Path, row: int, column: str) -> bytes:
    """Return the bytes in a row. The row group is read as a whole, and the last two are kept in memory.

    Args:
        path: Parquet file.
        row: 0-based number of the row in the file.
        column: Name of a column of bytes, or of a struct with a field ``bytes``.

    Raises:
        ValueError: The file is not Parquet, has no such row or column, or the row group is too large.
        OSError: The file can't be opened.
    """
    stat = path.stat()
    try:
        with _LOCK:
            group, number = _find(path, stat, row)
            values = _read_group(path, stat.st_mtime_ns, stat.st_size, group, column)
        value = values[number].as_py()
    except (pa.ArrowException, OSError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"row {row} of {path} can't be read ({first_line(error)})") from error
    value = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(value, bytes):
        raise ValueError(f"row {row} of {path} has no bytes in the column {column!r}")
    return value


def locate_row(path: Path, row: int, column: str) -> tuple[int, int] | None:
    """Return the place of a row's bytes in the file, so that they can be read alone: the first byte, and the number of bytes.

    Args:
        path: Parquet file.
        row: 0-based number of the row in the file.
        column: As for `read_row`.

    Returns:
        The place. None if the column is compressed or has a dictionary, or if the row can't be read.
    """
    try:
        stat = path.stat()
        with _LOCK:
            group, number = _find(path, stat, row)
            return _places(path, stat.st_mtime_ns, stat.st_size, group, column)[number]
    except (ValueError, OSError, IndexError, KeyError, TypeError):
        return None


def _find(path: Path, stat: os.stat_result, row: int) -> tuple[int, int]:
    """Return the row group of a row, and the row's number in it."""
    ends = _group_ends(path, stat.st_mtime_ns, stat.st_size)
    if not 0 <= row < ends[-1]:
        raise ValueError(f"{path} has {ends[-1]} rows, so it has no row {row}")
    group = bisect_right(ends, row) - 1
    return group, row - ends[group]


@lru_cache(maxsize=1024)
def _group_ends(path: Path, mtime_ns: int, size: int) -> list[int]:
    """Return the number of rows before each row group, and at the end that of all rows."""
    with pq.ParquetFile(path) as file:
        metadata = file.metadata
        return [0, *accumulate(metadata.row_group(n).num_rows for n in range(metadata.num_row_groups))]


def _leaf(metadata: pq.RowGroupMetaData, column: str) -> pq.ColumnChunkMetaData | None:
    leaves = (metadata.column(n) for n in range(metadata.num_columns))
    return next((leaf for leaf in leaves if leaf.path_in_schema in (column, f"{column}.bytes")), None)


@lru_cache(maxsize=2)
def _read_group(path: Path, mtime_ns: int, size: int, group: int, column: str) -> pa.ChunkedArray:
    with pq.ParquetFile(path) as file:
        leaf = _leaf(file.metadata.row_group(group), column)
        if leaf is None:
            raise ValueError(f"{path} has no column {column!r} of bytes")
        if (total := leaf.total_uncompressed_size) > MAX_GROUP_BYTES:
            raise ValueError(
                f"{path} has {total / 1e9:.1f} GB of audio in one row group, which is read as a whole; write it again with fewer "
                "rows in a row group"
            )
        table = file.read_row_group(group, columns=[leaf.path_in_schema], use_threads=False)
    values = table.column(0)
    values.validate(full=True)
    return values


@lru_cache(maxsize=2)
def _places(path: Path, mtime_ns: int, size: int, group: int, column: str) -> list[tuple[int, int] | None]:
    """Return the place of each row's bytes in a row group; see `locate_row`.

    Without compression and dictionary, the values of a column follow one another, each after its length in four bytes, between
    headers of pages. They are searched for and compared, so that nothing needs to be known about these headers.
    """
    with pq.ParquetFile(path) as file:
        leaf = _leaf(file.metadata.row_group(group), column)
        if leaf is None or leaf.compression != "UNCOMPRESSED" or not set(leaf.encodings) <= {"PLAIN", "RLE"}:
            return [None] * file.metadata.row_group(group).num_rows
        begin, end = leaf.data_page_offset, leaf.data_page_offset + leaf.total_compressed_size
    places: list[tuple[int, int] | None] = []
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for chunk in _read_group(path, mtime_ns, size, group, column).chunks:
            for value in chunk.field("bytes") if pa.types.is_struct(chunk.type) else chunk:
                data = value.as_py()
                start = None if data is None else _search(content, data, begin, min(end, len(content)))
                places.append(None if start is None else (start, len(data)))
                begin = begin if start is None else start + len(data)
    return places


def _search(content: mmap.mmap, data: bytes, begin: int, end: int) -> int | None:
    """Return the position of data that follows its length. None if it is not between two positions."""
    beginning = struct.pack("<I", len(data)) + data[:64]
    at = content.find(beginning, begin, end)
    while at >= 0 and content[at + 4 : at + 4 + len(data)] != data:
        at = content.find(beginning, at + 1, end)
    return at + 4 if at >= 0 else None
