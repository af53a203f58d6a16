"""A simulated object store: a folder on the local disk, where each request waits and passes bytes at a fixed rate."""

import io
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec.implementations.local
import pyarrow as pa
import pyarrow.fs as pafs

from ray_distill.teacher_cache.storage.store import Store

_LISTED = 1000
"""Objects per request of a listing, as in S3."""


class SlowFile(io.RawIOBase):
    """A file with one request per read."""

    def __init__(self, path: str, store: "SlowHandler") -> None:
        self._file = Path(path).open("rb", buffering=0)  # noqa: SIM115
        self._store = store

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._store.request(len(data))
        return data

    def close(self) -> None:
        self._file.close()
        super().close()


class SlowFileSystem(fsspec.implementations.local.LocalFileSystem):  # type: ignore[misc]
    """Files that are read in ranges, one request each."""

    handler: "SlowHandler"

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        data: bytes = super().cat_file(path, start, end, **options)
        self.handler.request(len(data))
        return data


class SlowHandler(pafs.FSSpecHandler):
    """The local disk with a delay for each request.

    Attributes:
        requests: Number of requests so far.
        sent: Number of bytes that they returned.
    """

    def __init__(self, latency: float, bytes_per_second: float) -> None:
        files = SlowFileSystem(skip_instance_cache=True)
        files.handler = self
        super().__init__(files)
        self.latency, self.rate, self.requests, self.sent = latency, bytes_per_second, 0, 0
        self._lock = threading.Lock()

    def request(self, size: int = 0) -> None:
        """Count a request and wait as long as it takes."""
        with self._lock:
            self.requests += 1
            self.sent += size
        time.sleep(self.latency + size / self.rate)

    def open_input_file(self, path: str) -> pa.PythonFile:
        file = SlowFile(path, self)
        self.request()  # The object's size is requested first.
        return pa.PythonFile(file, mode="r")

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        for _ in paths:
            self.request()
        return super().get_file_info(paths)

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        found = super().get_file_info_selector(selector)
        files = sum(info.type == pafs.FileType.File for info in found)
        for _ in range(max(1, math.ceil(files / _LISTED))):
            self.request()
        return found


class SlowStore(Store):
    """The folder of a cache, read through `SlowHandler`.

    Args:
        location: Absolute path of the folder.
        latency: Seconds before a request's first byte.
        bytes_per_second: Rate of one request.
    """

    def __init__(self, location: Path, latency: float = 0.0, bytes_per_second: float = math.inf) -> None:
        super().__init__(location)
        self.handler = SlowHandler(latency, bytes_per_second)
        self._fs, self.local = pafs.PyFileSystem(self.handler), None

    @contextmanager
    def ranges(self, name: str) -> Iterator[Callable[[int, int], bytes]]:
        """Yield as `Store.ranges`, after the request for the object's size that Arrow sends to S3."""
        self.handler.request()
        with super().ranges(name) as read:
            yield read
