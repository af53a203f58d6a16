"""Rows of the shard files of one split of a cache, with random access: one row group per utterance."""

import bisect
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_distill.teacher_cache.reading.commit_table import CommitTable
from ray_distill.teacher_cache.reading.local_copies import CommittedFile, LocalCopies
from ray_distill.teacher_cache.reading.shard_file_pool import ShardFilePool
from ray_distill.teacher_cache.reading.split_rows import PlanSplits
from ray_distill.teacher_cache.storage.cache import Cache, ShardFile, damage_error
from ray_distill.teacher_cache.storage.cache_spec import CacheAccessError, CacheError, Part
from ray_distill.teacher_cache.storage.read_error import read_error

_OPEN_FILES = 256
"""Maximum number of idle open files on a local disk."""
_OPEN_REMOTE_FILES = 1024
"""The same for an object store, where opening a file takes two requests. Each footer has tens of kilobytes."""
_OPEN_COPIES = 64
"""The same for local copies. An open copy can't be removed when another needs its room."""
_ROW_SLACK = 1 << 20
"""Bytes by which a column of a row may exceed twice its planned size: its id and headers of Parquet."""


class ShardRows:
    """Rows of the shard files of one split of a cache. Safe to use from several threads.

    Args:
        cache: The cache.
        split: The split.
        parts: The parts to read. The first that lacks an utterance gives the reason.
        bytes_per_frame: Size of the largest column of features.
        local, local_gb: As for `CacheReader`.

    Attributes:
        cache: The cache.
        planned: The utterances of the split, in index order.
        utterances: Those without the ones that any of the files lacks.
        failed: Reasons by id for the utterances that are left out.
        copies: Local copies of the files; None without ``local``.
        bytes: Total size of the files.
        bytes_read: Number of bytes read from shard files so far.

    Raises:
        CacheError: If a file is not finished or does not have its committed size, or there is no such split.
    """

    def __init__(
        self,
        cache: Cache,
        split: str,
        parts: Sequence[Part],
        bytes_per_frame: int = 0,
        local: str | Path | None = None,
        local_gb: float | None = None,
    ) -> None:
        self.cache = cache
        self.bytes_read = 0
        # A reader's threads read side by side, and `+=` alone would lose some of the bytes.
        self._counting = threading.Lock()
        self._parts, self._bytes_per_frame = parts, bytes_per_frame
        self._plan = PlanSplits.of(cache, split)
        self.planned = planned = self._plan[split]
        self._commits = CommitTable(cache, planned, split, parts)
        # The rows of the plan that a file lacks, ascending. All others have a row group each.
        self._absent: dict[tuple[str, int], list[int]] = {}
        self.failed: dict[str, str] = {}
        for part in parts:
            for (folder, shard), failed in self._commits.failed.items():
                if folder == part.folder:
                    ids = planned.of_shard(shard)
                    self._absent[folder, shard] = [row for row, name in enumerate(ids) if name in failed]
                    self.failed = failed | self.failed
        self.utterances = planned.without(list(self.failed))
        self.copies = None if local is None else LocalCopies(local, cache.store, local_gb)
        remote = cache.store.local is None
        files = _OPEN_COPIES if self.copies else _OPEN_REMOTE_FILES if remote else _OPEN_FILES
        self._open = ShardFilePool(cache.store, files, self.copies)
        self.bytes = self._commits.bytes

    def files(self, indices: Sequence[int], draw: int | None) -> list[CommittedFile]:
        """Return the files that some utterances under a mask draw are read from, each once."""
        parts = [part for part in self._parts if part.draw in (None, draw)]
        shards = dict.fromkeys(self.utterances.shard[list(indices)].tolist())
        return [self._commits.file(part, shard) for shard in shards for part in parts]

    def values(self, index: int, part: Part, columns: list[str]) -> list[Any]:
        """Return the values of some columns of one row.

        Raises:
            CacheAccessError: If an object store does not give the file.
            CacheError: If the file is damaged.
        """
        shard, row = int(self.utterances.shard[index]), int(self.utterances.row[index])
        row -= bisect.bisect_left(self._absent.get((part.folder, shard), []), row)
        for attempt in range(2):
            file = self._commits.file(part, shard)
            try:
                found, *values = self._values(
                    index, file, lambda: self._commits.shard_file(part, shard), row, ["id", *columns]
                )
                break
            except CacheAccessError:
                raise
            except (OSError, ValueError, LookupError, AttributeError, RuntimeError, pa.ArrowException) as error:
                # The manifest may be old, or the local copy damaged.
                if attempt or not (self._commits.refresh(part, shard, file) or self._open.discard(file)):
                    if isinstance(error, CacheError):
                        raise
                    raise read_error(self.cache.store, file.name, error) from error
        if found != self.utterances.ids[index]:
            raise self.damaged(index, part, f"it holds utterance {found!r} in place of {self.utterances.ids[index]!r}")
        return values

    def _values(
        self, index: int, file: CommittedFile, holds: Callable[[], ShardFile], row: int, columns: list[str]
    ) -> list[Any]:
        """Return the values of one row group, the id as a text."""
        with self._open.use(file, holds) as parquet:
            self._check_size(index, parquet.metadata.row_group(row), columns)
            table = parquet.read_row_group(row, columns=columns, use_threads=False)
        values = [table.column(name).chunk(0)[0] for name in columns]
        kinds = [pa.ListScalar if name == "mask" else (pa.BinaryScalar, pa.LargeBinaryScalar) for name in columns]
        if not all(value.is_valid and isinstance(value, kind) for value, kind in zip(values, kinds, strict=True)):
            raise ValueError("a column has another type, or no value")
        with self._counting:
            self.bytes_read += table.nbytes
        return [values[0].as_py(), *values[1:]]

    def _check_size(self, index: int, row: pq.RowGroupMetaData, columns: list[str]) -> None:
        """Check the size of a row before it is decompressed. ValueError if it is far larger than the planned one."""
        planned = 2 * int(self.utterances.num_samples[index])
        planned += int(self.utterances.num_frames[index]) * (1 + self._bytes_per_frame)
        for number in range(row.num_columns):
            column = row.column(number)
            size = max(column.total_uncompressed_size, column.num_values)
            if column.path_in_schema.partition(".")[0] in columns and size > 2 * planned + _ROW_SLACK:
                raise ValueError(f"a row has a column of {size} bytes, but about {planned} at most were planned")
        if row.num_rows != 1:
            raise ValueError(f"a row group has {row.num_rows} rows instead of one")

    def damaged(self, index: int, part: Part, reason: str) -> CacheError:
        """Return the error for a damaged file of an utterance."""
        file = self._commits.file(part, int(self.utterances.shard[index]))
        return damage_error(self.cache.store, file.name, f"is damaged ({reason})")
