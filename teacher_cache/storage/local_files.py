"""Files of a cache on a local disk. A cache may come from a stranger, so no symbolic link below its root is followed."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ray_distill.teacher_cache.storage.cache_spec import CacheAccessError

_NOT_PERMITTED = (errno.EACCES, errno.EPERM, errno.EROFS)
_PLACES = {
    "cache.json",
    "plan.parquet",
    "manifest.parquet",
    "verified.json",
    "codec",
    "audio",
    "clean",
    "masked",
    "composite",
    "commits",
    "builds",
    "copies",
    "set-aside",
}
"""Names in the root that belong to a cache. Other links beside them are neither followed nor an error."""


class FileEntry(NamedTuple):
    """Size of a file in bytes, and times in nanoseconds, or None if the storage does not tell them.

    ``changed`` is the time of the last change of the content, which a copy may keep; ``placed`` that of the last change of anything,
    which a disk sets itself.
    """

    size: int
    changed: int | None
    placed: int | None = None


class LocalFiles:
    """Files below a root. The root itself may be a link.

    Args:
        root: Absolute path.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, name: str) -> Path:
        """Return the path of a name in the cache.

        Raises:
            CacheAccessError: If the file, or a folder above it, is a symbolic link.
        """
        path = self._root
        for part in Path(name).parts:
            path /= part
            if stat.S_ISLNK(_mode(path)):
                raise _link_error(path)
        return path

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes, or None if there is no regular file of this name."""
        path = self.path(name)
        return path.stat().st_size if stat.S_ISREG(_mode(path)) else None

    def obstacle(self, name: str) -> str | None:
        """Return the name of the first thing on the way to a file that has the wrong kind, such as a folder in its place."""
        self.path(name)
        parts = Path(name).parts
        for count in range(1, len(parts) + 1):
            place = Path(*parts[:count])
            mode = _mode(self._root / place)
            if mode and not (stat.S_ISREG(mode) if count == len(parts) else stat.S_ISDIR(mode)):
                return str(place)
        return None

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """Yield the path of a file to read from.

        Raises:
            FileNotFoundError: If there is no regular file of this name.
            CacheAccessError: If it can't be read.
        """
        path = self.path(name)
        if not stat.S_ISREG(_mode(path)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        try:
            yield path
        except OSError as error:
            if error.errno in _NOT_PERMITTED:
                raise _unreadable(path, error) from error
            raise

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield the path of a file to write, rename or remove. CacheAccessError if its folder can't be written to."""
        path = self.path(name)
        try:
            yield path
        except OSError as error:
            if error.errno in _NOT_PERMITTED:
                raise _unwritable(path.parent, error) from error
            raise

    def check_writable(self) -> None:
        """Raise CacheAccessError if files can't be created in the root, which need not exist yet."""
        there = next(folder for folder in (self._root, *self._root.parents) if folder.exists())
        if not there.is_dir():
            raise CacheAccessError(
                f"{there} is a file, but a cache is a folder; give the path of a folder, which need not exist yet"
            )
        if not os.access(there, os.W_OK | os.X_OK):
            raise _unwritable(there, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))

    def move(self, name: str, to: str) -> None:
        """Rename a file or folder."""
        with self.writing(to) as target:
            target.parent.mkdir(parents=True, exist_ok=True)
            with self.writing(name) as path:
                path.rename(target)

    def entries(self, prefix: str) -> dict[str, FileEntry]:
        """Return every regular file in a folder and its folders.

        Raises:
            CacheAccessError: If any of them is a link, or can't be read.
        """
        found: dict[str, FileEntry] = {}
        folders = [self.path(prefix)]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        path = Path(entry.path)
                        if entry.is_symlink():
                            if folder != self._root or entry.name in _PLACES or entry.name.endswith((".tmp", ".lock")):
                                raise _link_error(path)
                        elif entry.is_dir(follow_symlinks=False):
                            folders.append(path)
                        elif entry.is_file(follow_symlinks=False):
                            info = entry.stat(follow_symlinks=False)
                            found[str(path.relative_to(self._root))] = FileEntry(
                                info.st_size, info.st_mtime_ns, info.st_ctime_ns
                            )
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise _unreadable(folder, error) from error
        return found


def open_lock_file(path: Path) -> int:
    """Open a file for locking, without following a link, and return its descriptor. CacheAccessError if that's not possible."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise _link_error(path) from error
        if error.errno in (errno.EISDIR, errno.ENXIO):
            raise CacheAccessError(
                f"{path} is not a file; remove it, because it stands in the place of the lock"
            ) from error
        if error.errno in _NOT_PERMITTED:
            raise _unwritable(path.parent, error) from error
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise CacheAccessError(
            f"{path} has a second name elsewhere or is not a file; remove it, because a lock would overwrite it"
        )
    return descriptor


def _unwritable(folder: Path, error: OSError) -> CacheAccessError:
    return CacheAccessError(
        f"the folder {folder} can't be written to ({error.strerror}); make it writable, or give another folder"
    )


def _mode(path: Path) -> int:
    """Return the mode of a file without following a link, or 0 if it does not exist."""
    try:
        return path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> CacheAccessError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return CacheAccessError(f"{path} can't be read ({reason}); make it readable and run again")


def _link_error(path: Path) -> CacheAccessError:
    return CacheAccessError(
        f"{path} is a symbolic link, which is not followed in a cache because it may lead anywhere; replace it by the file or "
        "folder that it points to, or remove it"
    )
