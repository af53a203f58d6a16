"""Open shard files that the threads of a reader share."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO

import pyarrow as pa
import pyarrow.parquet as pq

from ray_distill.teacher_cache.reading.local_copies import CommittedFile, LocalCopies
from ray_distill.teacher_cache.storage.cache import ShardFile, check_content
from ray_distill.teacher_cache.storage.store import Store


@dataclass(frozen=True)
class _OpenFile:
    """An open Parquet file, and the lock of the local copy that it is read from."""

    parquet: pq.ParquetFile
    copy: FileIO | None

    def close(self) -> None:
        self.parquet.close()
        if self.copy is not None:
            self.copy.close()


class ShardFilePool:
    """Pool of open Parquet files. One thread uses a file at a time, and the least recently used files are closed.

    Args:
        store: Store of the cache.
        limit: Maximum number of idle open files.
        copies: Local copies to read instead of the store's files. Default None.
    """

    def __init__(self, store: Store, limit: int, copies: LocalCopies | None = None) -> None:
        self._store = store
        self._limit = limit
        self._copies = copies
        self._lock = threading.Lock()
        self._idle: OrderedDict[str, list[_OpenFile]] = OrderedDict()
        self._count = 0

    @contextmanager
    def use(self, file: CommittedFile, shard_file: Callable[[], ShardFile]) -> Iterator[pq.ParquetFile]:
        """Yield an open file that no other thread uses. A file is not returned to the pool after an error.

        Args:
            file: The file.
            shard_file: Function that returns what the file must hold.

        Raises:
            ValueError: If the file does not have its committed size, or says that it is another shard file.
        """
        with self._lock:
            idle = self._idle.get(file.name, [])
            opened = idle.pop() if idle else None
            if opened is not None:
                self._count -= 1
                if not idle:
                    del self._idle[file.name]
        opened = opened or self._opened(file, shard_file())
        try:
            yield opened.parquet
        except BaseException:
            opened.close()
            raise
        with self._lock:
            self._idle.setdefault(file.name, []).append(opened)
            self._idle.move_to_end(file.name)
            self._count += 1
            self._close_idle(self._limit)

    def discard(self, file: CommittedFile) -> bool:
        """Close the idle files of this name and remove the local copy, which is damaged. Return False if there are no copies."""
        if self._copies is None:
            return False
        with self._lock:
            for opened in self._idle.pop(file.name, []):
                opened.close()
                self._count -= 1
        self._copies.discard(file)
        return True

    def _opened(self, file: CommittedFile, shard_file: ShardFile) -> _OpenFile:
        copy = None if self._copies is None else self._copies.open(file)
        if copy is None and self._copies is not None:
            with self._lock:
                self._close_idle(0)  # Their locks may be what keeps the room.
            copy = self._copies.open(file)
        try:
            source = self._store.open(file.name) if copy is None else pa.memory_map(f"/proc/self/fd/{copy.fileno()}")
            if source.size() != file.size:
                raise ValueError("it does not have its committed size")
            # Over a network, pre-buffering reads all columns of a row group in one request.
            remote = copy is None and self._store.local is None
            parquet = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=remote)
            check_content(parquet.metadata.metadata, shard_file)
        except BaseException:
            if copy is not None:
                copy.close()
            raise
        return _OpenFile(parquet, copy)

    def _close_idle(self, limit: int) -> None:
        while self._count > limit:
            oldest, files = self._idle.popitem(last=False)
            files.pop(0).close()
            self._count -= 1
            if files:
                self._idle[oldest] = files
                self._idle.move_to_end(oldest, last=False)
