"""Storage of a cache: a folder on a local disk or a prefix in an object store, through pyarrow's file systems."""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs

from ray_distill.teacher_cache.storage.local_files import FileEntry, LocalFiles

_COPY_BYTES = 8 << 20
_RANGE_BYTES, _RANGES = 16 << 20, 32
"""Size above which a remote file is read in ranges of this size, and number of ranges that are read side by side."""
WHOLE_BYTES = 8 << 20
"""Size up to which a file is uploaded to S3 in one request."""
_HALF_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?:/?$|[^/])")
"""A URI with one slash or without a bucket, which would be taken for a local path."""
_T = TypeVar("_T")


class Store:
    """Files under one root, written atomically: readers never see a partial file.

    On a local disk a file is written under a temporary name, synced and renamed. An object store shows an object only when its
    upload is complete, so a file is first written to the local temporary folder and then uploaded.

    A cache may come from a stranger, so nothing below a local root is read, written, moved or removed through a symbolic link.
    Methods raise CacheAccessError for a link, and for a file or folder that the user may not read or write.

    Args:
        location: A local path, also as ``file:///...``, or a URI that Arrow or fsspec opens (``s3://bucket/prefix``,
            ``gs://...``). Credentials come from the usual environment variables (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ...).

    Attributes:
        location: The location, absolute for a local path.
        local: The local folder, or None for an object store.

    Example:
        >>> store = Store("caches/demo")
        >>> with store.create("clean/part-00000.parquet") as path:
        ...     path.write_bytes(b"...")
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self.location = os.fspath(location).rstrip("/")
        self.local: Path | None = None
        if found := _HALF_URI.match(os.fspath(location)):
            raise ValueError(
                f"{os.fspath(location)} is no place for a cache: write {found[1]}://BUCKET/PREFIX, or ./{found[1]}: for a folder of "
                "that name"
            )
        if "://" not in self.location or self.location.startswith(("file://", "local://")):
            self.local = Path(_local_path(self.location)).absolute()
            self.location = str(self.local)
            self._files = LocalFiles(self.local)
            self._fs, self._root = pafs.LocalFileSystem(), self.location
        else:
            self._fs, root = open_file_system(self.location)
            self._root = root.rstrip("/")

    def __repr__(self) -> str:
        return f"Store({self.location!r})"

    def check_bucket(self) -> None:
        """Check that the bucket of a location in S3 exists; keys that may not ask for it are no error.

        Raises:
            ValueError: There is no such bucket. Uploads would fail, and listings are empty.
        """
        if not isinstance(self._fs, pafs.S3FileSystem):
            return
        bucket = self._root.partition("/")[0]
        kind = pafs.FileType.Unknown
        with contextlib.suppress(OSError):
            kind = self._fs.get_file_info(bucket).type
        if kind == pafs.FileType.NotFound:
            raise ValueError(f"there is no bucket {bucket!r} for {self.location}; create it, or correct its name")

    def at(self, name: str) -> str:
        """Return the full path or URI of a file, for messages."""
        return f"{self.location}/{name}"

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes, or None if it does not exist."""
        if self.local is not None:
            return self._files.size(name)
        info = self._fs.get_file_info(f"{self._root}/{name}")
        return int(info.size) if info.type == pafs.FileType.File else None

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """Return the content of a file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is larger than ``max_bytes``.
        """
        if self.local is not None:
            _check_size(self._files.size(name), max_bytes)
            with self._files.reading(name) as path:
                return path.read_bytes()
        with self._fs.open_input_file(f"{self._root}/{name}") as file:
            size = file.size()
            _check_size(size, max_bytes)
            if size <= _RANGE_BYTES:
                data: bytes = file.read()
                return data
        # A store sends one request at 50 to 100 MB/s, and several side by side.
        with self.ranges(name) as read_range, ThreadPoolExecutor(_RANGES) as pool:
            starts = range(0, size, _RANGE_BYTES)
            return b"".join(pool.map(lambda start: read_range(start, min(_RANGE_BYTES, size - start)), starts))

    @contextmanager
    def ranges(self, name: str) -> Iterator[Callable[[int, int], bytes]]:
        """Yield a function that reads ``size`` bytes from ``start`` on in one request, from any number of threads at once."""
        if self.local is not None:
            with self._files.reading(name) as path, path.open("rb", buffering=0) as local:
                yield lambda start, size: os.pread(local.fileno(), size, start)
        elif isinstance(handler := getattr(self._fs, "handler", None), pafs.FSSpecHandler):
            # Arrow's file of an fsspec file has one position, which threads would have to share.
            yield lambda start, size: bytes(handler.fs.cat_file(f"{self._root}/{name}", start, start + size))
        else:
            with self._fs.open_input_file(f"{self._root}/{name}") as file:
                yield lambda start, size: file.read_at(size, start)

    def open(self, name: str) -> pa.NativeFile:
        """Open a file for random access: memory-mapped on a local disk, with range requests in an object store."""
        if self.local is not None:
            with self._files.reading(name) as path:
                return pa.memory_map(str(path))
        return self._fs.open_input_file(f"{self._root}/{name}")

    def sha256(self, name: str) -> str:
        """Return the SHA-256 (hex) of a file. Raises FileNotFoundError."""
        if self.local is not None:
            with self._files.reading(name) as path, path.open("rb") as local:
                return hashlib.file_digest(local, "sha256").hexdigest()
        digest = hashlib.sha256()
        with self._fs.open_input_stream(f"{self._root}/{name}", buffer_size=0) as file:
            while block := file.read(_COPY_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def obstacle(self, name: str) -> str | None:
        """Return what is in the place of a file or of a folder above it and is no file or folder, respectively; or None."""
        return None if self.local is None else self._files.obstacle(name)

    def move(self, name: str, to: str) -> None:
        """Rename a file, or on a local disk also a folder."""
        if self.local is not None:
            self._files.move(name, to)
        else:
            self._with_folder(to, lambda: self._fs.move(f"{self._root}/{name}", f"{self._root}/{to}"))

    def _with_folder(self, name: str, write: Callable[[], _T]) -> _T:
        """Write a file. If the file system (such as sftp, unlike an object store) needs its folder first, create that."""
        try:
            return write()
        except FileNotFoundError:
            self._fs.create_dir(f"{self._root}/{name}".rpartition("/")[0], recursive=True)
            return write()

    def names(self, prefix: str = "") -> list[str]:
        """Return the sorted names of all files in a folder, without temporary files of writers."""
        return sorted(self.entries(prefix))

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every file. This takes a single listing, also for a large cache in an object store."""
        return {name: entry.size for name, entry in self.entries().items()}

    def entries(self, prefix: str = "") -> dict[str, FileEntry]:
        """Return every file in a folder, without temporary files of writers, in a single listing (a request per 1000 objects)."""
        if self.local is not None:
            return {name: entry for name, entry in self._files.entries(prefix).items() if not _is_temporary(name)}
        selector = pafs.FileSelector(f"{self._root}/{prefix}".rstrip("/"), recursive=True, allow_not_found=True)
        infos = [info for info in self._fs.get_file_info(selector) if info.type == pafs.FileType.File]
        skipped = len(self._root) + 1
        return {
            info.path[skipped:]: FileEntry(info.size, info.mtime_ns) for info in infos if not _is_temporary(info.path)
        }

    @contextmanager
    def create(self, name: str) -> Iterator[Path]:
        """Yield a local path to write to. The file appears under its name, synced to disk, when the block ends without an error."""
        if self.local is None:
            # An unnamed file disappears with the process, even if it is killed.
            with tempfile.TemporaryFile() as unnamed:
                path = Path(f"/proc/self/fd/{unnamed.fileno()}")
                yield path
                self._upload(path, name)
            return
        with self._files.writing(name) as place:
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex}.tmp")
            try:
                yield temporary
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
                temporary.replace(place)
                folder = os.open(place.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
            finally:
                temporary.unlink(missing_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        with self.create(name) as path:
            path.write_bytes(data)

    def _upload(self, path: Path, name: str) -> None:
        target = f"{self._root}/{name}"
        if isinstance(self._fs, pafs.S3FileSystem) and path.stat().st_size <= WHOLE_BYTES:
            data = path.read_bytes()
            with self._fs.open_output_stream(target) as sink:  # One request, at the end, which stores all or nothing.
                sink.write(data)
            return
        before = self.size(name)
        try:
            opened = self._with_folder(name, lambda: self._fs.open_output_stream(target))
            with path.open("rb") as source, opened as sink:
                shutil.copyfileobj(source, sink, _COPY_BYTES)
        except BaseException:
            # Closing a stream after an error stores a truncated object, which is deleted. An earlier object stays.
            with contextlib.suppress(OSError):
                if self.size(name) not in (before, path.stat().st_size):
                    self._fs.delete_file(target)
            raise

    def remove(self, name: str) -> None:
        """Delete a file if it exists."""
        if self.local is not None:
            with self._files.writing(name) as path:
                if self._files.size(name) is not None:
                    path.unlink(missing_ok=True)
        elif self.size(name) is not None:
            self._fs.delete_file(f"{self._root}/{name}")

    def remove_leftovers(self) -> None:
        """Delete temporary files of killed writers. Call it only while holding the lock of the cache."""
        if self.local is not None:
            for name in self._files.entries(""):
                if name.endswith(".tmp") and _is_temporary(name):
                    self.remove(name)

    def free_bytes(self) -> int | None:
        """Return the free space in bytes on a local disk, or None for an object store."""
        if self.local is None:
            return None
        return shutil.disk_usage(self._existing(self.local)).free

    def check_writable(self) -> None:
        """Raise CacheAccessError if the cache is on a local disk and can't be written to. Object stores are not asked."""
        if self.local is not None:
            LocalFiles(self.local).check_writable()

    def disk(self) -> int:
        """Return the number of the local disk, equal for two places on the same one. 0 for an object store."""
        return 0 if self.local is None else self._existing(self.local).stat().st_dev

    @staticmethod
    def _existing(path: Path) -> Path:
        """Return the nearest existing folder at or above a path."""
        return next(folder for folder in [path, *path.parents] if folder.exists())


def _check_size(size: int | None, max_bytes: int | None) -> None:
    if size is not None and max_bytes is not None and size > max_bytes:
        raise ValueError(f"it has {size} bytes; the limit is {max_bytes}")


def _local_path(location: str) -> str:
    if "://" not in location:
        return location
    try:
        # fsspec calls the local disk local://, which Arrow does not know.
        return str(pafs.FileSystem.from_uri(location.replace("local://", "file://", 1))[1])
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{location} can't be opened: {error}") from error


def open_file_system(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the file system for a URI (Arrow's, or fsspec's if Arrow has none) and the path within it.

    Raises:
        ValueError: The URI holds credentials, or nothing knows its scheme.
    """
    scheme, _, rest = uri.partition("://")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    # Azure writes container@account, which is not a credential.
    if at and (":" in user or scheme not in ("abfs", "abfss")):
        raise ValueError(
            f"the {scheme}:// location holds credentials, which logs would repeat; set them in the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...)"
        )
    # A small file is then one request instead of three.
    delayed = f"{'&' if '?' in uri else '?'}allow_delayed_open=true" if scheme == "s3" else ""
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri + delayed)
        return filesystem, path
    except (OSError, pa.ArrowException) as error:
        if scheme not in {*fsspec.available_protocols(), *fsspec.registry}:  # The latter are those of other packages.
            raise ValueError(f"{uri} can't be opened: neither Arrow nor fsspec knows {scheme}:// ({error})") from error
    try:
        found, path = fsspec.url_to_fs(uri)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"{uri} can't be opened: {error}") from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(found)), path


def _is_temporary(name: str) -> bool:
    last = name.rpartition("/")[2]
    return last.startswith(".") and last.endswith((".tmp", ".lock"))
