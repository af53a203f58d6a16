"""Bytes embedded in a row of a Parquet file, as Hugging Face's datasets store audio."""

import threading
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

MAX_GROUP_BYTES = 4 << 30
"""Maximum uncompressed size of a column in a row group, 4 GiB. A row group is read as a whole."""

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
            ends = _group_ends(path, stat.st_mtime_ns, stat.st_size)
            if not 0 <= row < ends[-1]:
                raise ValueError(f"{path} has {ends[-1]} rows, so it has no row {row}")
            group = bisect_right(ends, row) - 1
            values = _read_group(path, stat.st_mtime_ns, stat.st_size, group, column)
        value = values[row - ends[group]].as_py()
    except (pa.ArrowException, OSError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"row {row} of {path} can't be read ({str(error).splitlines()[0]})") from error
    value = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(value, bytes):
        raise ValueError(f"row {row} of {path} has no bytes in the column {column!r}")
    return value


@lru_cache(maxsize=1024)
def _group_ends(path: Path, mtime_ns: int, size: int) -> list[int]:
    """Return the number of rows before each row group, and at the end that of all rows."""
    with pq.ParquetFile(path) as file:
        metadata = file.metadata
        return [0, *accumulate(metadata.row_group(n).num_rows for n in range(metadata.num_row_groups))]


@lru_cache(maxsize=2)
def _read_group(path: Path, mtime_ns: int, size: int, group: int, column: str) -> pa.ChunkedArray:
    with pq.ParquetFile(path) as file:
        metadata = file.metadata.row_group(group)
        chunks = [metadata.column(n) for n in range(metadata.num_columns)]
        chosen = [c for c in chunks if c.path_in_schema in (column, f"{column}.bytes")]
        if not chosen:
            raise ValueError(f"{path} has no column {column!r} of bytes")
        total = sum(chunk.total_uncompressed_size for chunk in chosen)
        if total > MAX_GROUP_BYTES:
            raise ValueError(
                f"{path} has {total / 1e9:.1f} GB of audio in one row group, which is read as a whole; write it again with fewer "
                "rows in a row group"
            )
        table = file.read_row_group(group, columns=[chosen[0].path_in_schema], use_threads=False)
    values = table.column(0)
    values.validate(full=True)
    return values
