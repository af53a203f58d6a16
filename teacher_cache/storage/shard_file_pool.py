"""Open shard files that the threads of a reader share."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.parquet as pq

from ray_distill.teacher_cache.storage.cache import ShardFile, check_content
from ray_distill.teacher_cache.storage.store import Store


class ShardFilePool:
    """Pool of open Parquet files. One thread uses a file at a time, and the least recently used files are closed.

    Args:
        store: Store of the cache.
        limit: Maximum number of idle open files.
    """

    def __init__(self, store: Store, limit: int) -> None:
        self._store = store
        self._limit = limit
        self._lock = threading.Lock()
        self._idle: OrderedDict[str, list[pq.ParquetFile]] = OrderedDict()
        self._count = 0

    @contextmanager
    def use(self, shard_file: ShardFile) -> Iterator[pq.ParquetFile]:
        """Yield an open file that no other thread uses. A file is not returned to the pool after an error.

        Raises:
            ValueError: If the file says that it is another shard file.
        """
        name = shard_file.name
        with self._lock:
            idle = self._idle.get(name, [])
            file = idle.pop() if idle else None
            if file is not None:
                self._count -= 1
                if not idle:
                    del self._idle[name]
        if file is None:
            # Over a network, pre-buffering reads all columns of a row group in one request.
            remote = self._store.local is None
            file = pq.ParquetFile(self._store.open(name), page_checksum_verification=True, pre_buffer=remote)
            check_content(file.metadata.metadata, shard_file)
        yield file
        with self._lock:
            self._idle.setdefault(name, []).append(file)
            self._idle.move_to_end(name)
            self._count += 1
            while self._count > self._limit:
                oldest, files = self._idle.popitem(last=False)
                files.pop(0).close()
                self._count -= 1
                if files:
                    self._idle[oldest] = files
                    self._idle.move_to_end(oldest, last=False)
