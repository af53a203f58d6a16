"""Where a cache lies: a folder on a local disk, or a prefix in an object store, through pyarrow's file systems."""

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs

_COPY_BYTES = 8 << 20
_T = TypeVar("_T")


class Store:
    """Whole files under one root. No file is ever seen half written.

    On a local disk a file is written beside its place, synced and renamed into it. An object store shows an object only
    when its upload is complete, so there a file is written to the local temporary folder first and uploaded whole.

    Args:
        location: a local path, also as ``file:///...``, or a URI that Arrow or fsspec opens (``s3://bucket/prefix``,
            ``gs://...``). Credentials come from the usual environment variables (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ...).

    Example:
        >>> store = Store("caches/demo")
        >>> with store.create("clean/part-00000.parquet") as path:
        ...     path.write_bytes(b"...")
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self.location = os.fspath(location).rstrip("/")
        self.local: Path | None = None
        if "://" not in self.location or self.location.startswith("file://"):
            self.local = Path(_local_path(self.location)).absolute()
            self.location = str(self.local)
            self._fs, self._root = pafs.LocalFileSystem(), self.location
        else:
            self._fs, root = _open(self.location)
            self._root = root.rstrip("/")

    def at(self, name: str) -> str:
        """A file's place, for messages."""
        return f"{self.location}/{name}"

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where there is none."""
        info = self._fs.get_file_info(f"{self._root}/{name}")
        return int(info.size) if info.type == pafs.FileType.File else None

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError."""
        with self._fs.open_input_file(f"{self._root}/{name}") as file:
            data: bytes = file.read()
        return data

    def open(self, name: str) -> pa.NativeFile:
        """A file for random access: memory-mapped on a local disk, ranged requests in an object store."""
        if self.local is not None:
            return pa.memory_map(f"{self._root}/{name}")
        return self._fs.open_input_file(f"{self._root}/{name}")

    def sha256(self, name: str) -> str:
        """SHA-256 (hex) of a file. Raises FileNotFoundError."""
        digest = hashlib.sha256()
        with self._fs.open_input_stream(f"{self._root}/{name}", buffer_size=0) as file:
            while block := file.read(_COPY_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def move(self, name: str, to: str) -> None:
        """Moves a file to another name."""
        if self.local is not None:
            (self.local / to).parent.mkdir(parents=True, exist_ok=True)
            self._fs.move(f"{self._root}/{name}", f"{self._root}/{to}")
        else:
            self._with_folder(to, lambda: self._fs.move(f"{self._root}/{name}", f"{self._root}/{to}"))

    def _with_folder(self, name: str, write: Callable[[], _T]) -> _T:
        """Writes a file; where that takes a folder, as with sftp, and unlike in an object store, makes it first."""
        try:
            return write()
        except FileNotFoundError:
            self._fs.create_dir(f"{self._root}/{name}".rpartition("/")[0], recursive=True)
            return write()

    def names(self, prefix: str = "") -> list[str]:
        """Names of all files under a prefix (a folder's name), sorted; temporaries of writers are left out."""
        selector = pafs.FileSelector(f"{self._root}/{prefix}".rstrip("/"), recursive=True, allow_not_found=True)
        found = (
            info.path[len(self._root) + 1 :]
            for info in self._fs.get_file_info(selector)
            if info.type == pafs.FileType.File
        )
        return sorted(name for name in found if not _is_temporary(name))

    def sizes(self) -> dict[str, int]:
        """Bytes of every file, by one listing: what a check of a large cache in an object store can afford."""
        selector = pafs.FileSelector(self._root, recursive=True, allow_not_found=True)
        infos = [info for info in self._fs.get_file_info(selector) if info.type == pafs.FileType.File]
        return {info.path[len(self._root) + 1 :]: info.size for info in infos if not _is_temporary(info.path)}

    @contextmanager
    def create(self, name: str) -> Iterator[Path]:
        """Yields a local path to write to; when the block ends well the file is put in its place, whole and durable."""
        if self.local is None:
            # A file without a name: it ends with the process, however that ends.
            with tempfile.TemporaryFile() as unnamed:
                path = Path(f"/proc/self/fd/{unnamed.fileno()}")
                yield path
                self._upload(path, name)
            return
        place = self.local / name
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
        """Puts a small file in its place, whole."""
        with self.create(name) as path:
            path.write_bytes(data)

    def _upload(self, path: Path, name: str) -> None:
        target = f"{self._root}/{name}"
        before = self.size(name)
        try:
            opened = self._with_folder(name, lambda: self._fs.open_output_stream(target))
            with path.open("rb") as source, opened as sink:
                shutil.copyfileobj(source, sink, _COPY_BYTES)
        except BaseException:
            # A stream that an error closes leaves what it has as a whole object; what was there before stays.
            with contextlib.suppress(OSError):
                if self.size(name) not in (before, path.stat().st_size):
                    self._fs.delete_file(target)
            raise

    def remove(self, name: str) -> None:
        """Deletes a file; nothing happens where there is none."""
        if self.size(name) is not None:
            self._fs.delete_file(f"{self._root}/{name}")

    def remove_leftovers(self) -> None:
        """Removes temporaries that killed writers left behind. Only while no build is running."""
        if self.local is not None and self.local.is_dir():
            for temporary in self.local.rglob(".*.tmp"):
                temporary.unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        """Free space on a local disk; None for an object store."""
        if self.local is None:
            return None
        existing = next(folder for folder in [self.local, *self.local.parents] if folder.exists())
        return shutil.disk_usage(existing).free


def is_full(error: OSError) -> bool:
    """Whether an error says that a disk has no room, or a user no quota, left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _local_path(location: str) -> str:
    if "://" not in location:
        return location
    try:
        return str(pafs.FileSystem.from_uri(location)[1])
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{location} can't be opened: {error}") from error


def _open(uri: str) -> tuple[pafs.FileSystem, str]:
    """Arrow's file system for a URI, or fsspec's where Arrow has none, and the path within it."""
    scheme, _, rest = uri.partition("://")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    # Azure's container@account is none.
    if at and (":" in user or scheme not in ("abfs", "abfss")):
        raise ValueError(
            f"the {scheme}:// location holds credentials, which logs would repeat; give them in the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...)"
        )
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
        return filesystem, path
    except (OSError, pa.ArrowException) as error:
        if scheme not in fsspec.available_protocols():
            raise ValueError(f"{uri} can't be opened: neither Arrow nor fsspec knows {scheme}:// ({error})") from error
    try:
        found, path = fsspec.url_to_fs(uri)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"{uri} can't be opened: {error}") from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(found)), path


def _is_temporary(name: str) -> bool:
    last = name.rpartition("/")[2]
    return last.startswith(".") and last.endswith((".tmp", ".lock"))
