"""Copies of shard files on a node's disk, shared by its processes, under a limit on their total size.

A copy is named by the SHA-256 of its commit record, so a copy of other content can't be taken for it, and a name can't lead out of
the folder. It is written as ``SHA256.part``, compared with the record and renamed. Locks (``flock``) order the processes: the writer
of a copy holds an exclusive lock on it, and whoever reads it a shared one, so a copy in use is never removed.
"""

import errno
import fcntl
import hashlib
import itertools
import os
import re
import shutil
import stat
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from weakref import WeakSet, WeakValueDictionary

from ray_distill.teacher_cache.storage.cache import damage_error
from ray_distill.teacher_cache.storage.cache_spec import CacheAccessError, CacheError
from ray_distill.teacher_cache.storage.local_files import open_lock_file
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.whole_files import is_disk_full

RANGE_BYTES = 32 << 20
"""Bytes per request. At 50 MB/s, a request of 30 ms then spends 4 % of its time waiting."""
FREE_SHARE = 0.8
"""Default limit: share of the disk's free space, that of earlier copies included."""
RANGES_AT_ONCE = 8
"""Requests in flight per process."""
_RANGES_OF_A_FILE = 4
"""Requests in flight per file, which bounds the ranges that wait in memory for an earlier one."""
_FILES_AHEAD = 4
"""Files that are fetched at a time before they are needed."""
_AHEAD_SHARE = 0.5
"""Share of the limit that the ranks of a node fill with files before they need them, those of all caches together."""
_LOCK = ".lock"
_COPY = re.compile(r"[0-9a-f]{64}\.(?:parquet|part)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class CommittedFile:
    """A shard file as its commit record describes it.

    Attributes:
        name: Name, relative to the cache.
        size: Size in bytes.
        sha256: SHA-256 (hex).
    """

    name: str
    size: int
    sha256: str


class _Folder:
    """What the copies of several caches in one folder share in a process, so that together they keep to the limit."""

    def __init__(self) -> None:
        self.mutex = threading.Lock()
        self.users: WeakSet[LocalCopies] = WeakSet()
        self.order = itertools.count()


_FOLDERS: WeakValueDictionary[Path, _Folder] = WeakValueDictionary()
_FOLDERS_MUTEX = threading.Lock()


class LocalCopies:
    """Copies of the shard files of a store in a folder of this node. Safe to use from several threads and processes.

    Args:
        folder: Absolute path of the folder. It may hold copies of several caches, and other files, which are left alone.
        store: Store of the cache.
        limit_gb: Maximum size of all copies in the folder, in units of 1e9 bytes. Default `FREE_SHARE` of the disk's free space.

    Attributes:
        limit: The limit in bytes.
        fetched: Number of files fetched so far by this process.

    Raises:
        CacheError: If the path is not absolute or the folder can't be written to.
    """

    def __init__(self, folder: str | Path, store: Store, limit_gb: float | None = None) -> None:
        self._folder, self._store = Path(folder), store
        if not self._folder.is_absolute():
            raise CacheError(f"cache.local {folder} is not an absolute path; give the path of a folder on each node")
        if store.local is not None and self._folder.resolve().is_relative_to(store.local.resolve()):
            raise CacheError(f"cache.local {folder} lies in the cache at {store.location}; give another folder")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked():
                held = sum(size for _, size, _ in self._entries())
        except OSError as error:
            raise CacheError(
                f"the folder {folder} for local copies can't be used ({error.strerror}); give another cache.local"
            ) from error
        free = shutil.disk_usage(self._folder).free
        self.limit = int(FREE_SHARE * (free + held) if limit_gb is None else limit_gb * 1e9)
        self.fetched = 0
        self._ranges = ThreadPoolExecutor(RANGES_AT_ONCE, "cache-range")
        self._fetches = ThreadPoolExecutor(_FILES_AHEAD, "cache-fetch")
        self._wanted: Counter[CommittedFile] = Counter()
        self._queue: deque[tuple[int, CommittedFile]] = deque()  # With the place in the order of all caches.
        self._ahead: dict[CommittedFile, FileIO | None] = {}
        with _FOLDERS_MUTEX:
            self._shared = _FOLDERS.setdefault(self._folder.resolve(), _Folder())
        self._mutex = self._shared.mutex
        with self._mutex:
            self._shared.users.add(self)

    def open(self, file: CommittedFile) -> FileIO | None:
        """Return a copy of a file, fetched if there is none, or None if it can't be given room. Closing it ends its use.

        Raises:
            CacheError: If the file does not match its commit record, or a link is in the place of the copy.
            OSError: If it can't be fetched.
        """
        path, part = self._path(file, "parquet"), self._path(file, "part")
        while True:
            if (found := self._existing(path, file.size)) is not None:
                return found
            written = _open_own(part, os.O_RDWR | os.O_CREAT)
            assert written is not None
            with ExitStack() as stack:
                stack.enter_context(written)
                try:
                    fcntl.flock(written, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    fcntl.flock(written, fcntl.LOCK_SH)  # Wait for the writer, who keeps a shared lock in the end.
                    continue
                if not _is_at(written, part):  # The copy was finished meanwhile.
                    continue
                stack.callback(part.unlink, missing_ok=True)
                if path.exists():
                    continue
                if not self._give_room(written, file.size):
                    return None
                self._fetch(file, written)
                part.rename(path)
                stack.pop_all()
                fcntl.flock(written, fcntl.LOCK_SH)
                if _is_at(written, path):
                    return written
                written.close()  # Between the two locks, another process needed its room.

    def want(self, file: CommittedFile) -> None:
        """Fetch a file in the background and keep it until `unwant` was called as often.

        Files are fetched in the order of calls, those of all caches with copies in this folder. Together, the files kept in this way
        have at most half of the limit, divided by the ranks of the node (``LOCAL_WORLD_SIZE``, which Ray Train and torchrun set);
        others are not fetched before they are opened.
        """
        with self._mutex:
            self._wanted[file] += 1
            if self._wanted[file] == 1:
                self._queue.append((next(self._shared.order), file))
        self._fetch_ahead()

    def unwant(self, file: CommittedFile) -> None:
        """Undo one call of `want`."""
        with self._mutex:
            self._wanted[file] -= 1
            if self._wanted[file] <= 0:
                del self._wanted[file]
                if (kept := self._ahead.pop(file, None)) is not None:
                    kept.close()
        self._fetch_ahead()

    def discard(self, file: CommittedFile) -> None:
        """Remove a damaged copy. Other processes that use it keep their open file."""
        self._path(file, "parquet").unlink(missing_ok=True)

    def _fetch_ahead(self) -> None:
        most = _AHEAD_SHARE * self.limit / max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        with self._mutex:
            users = list(self._shared.users)
            while waiting := [user for user in users if user._queue]:
                first = min(waiting, key=lambda user: user._queue[0][0])
                file = first._queue[0][1]
                useless = file in first._ahead or file not in first._wanted or file.size > most
                if not useless and sum(kept.size for user in users for kept in user._ahead) + file.size > most:
                    break
                first._queue.popleft()
                if not useless:
                    first._ahead[file] = None
                    first._fetches.submit(first._fetch_early, file)

    def _fetch_early(self, file: CommittedFile) -> None:
        with self._mutex:
            if file not in self._ahead:  # It is no longer wanted.
                return
        try:
            opened = self.open(file)
        except (OSError, CacheError):  # Whoever opens the file meets the same error.
            return
        with self._mutex:
            if file in self._ahead and self._ahead[file] is None:
                self._ahead[file] = opened
            elif opened is not None:
                opened.close()

    def _path(self, file: CommittedFile, ending: str) -> Path:
        if _SHA256.fullmatch(file.sha256) is None:
            raise CacheError(f"the commit record of {self._store.at(file.name)} has no SHA-256; repair the cache")
        return self._folder / f"{file.sha256}.{ending}"

    def _existing(self, path: Path, size: int) -> FileIO | None:
        """Open and lock a finished copy. One of the wrong size is removed."""
        file = _open_own(path, os.O_RDONLY)
        if file is None:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if _is_at(file, path) and os.fstat(file.fileno()).st_size == size:
            os.utime(file.fileno())  # Its time of last use, because disks are often mounted without one.
            return file
        if _is_at(file, path):
            path.unlink(missing_ok=True)
        file.close()
        return None

    def _fetch(self, file: CommittedFile, written: FileIO) -> None:
        digest = hashlib.sha256()
        offset = 0
        with self._store.ranges(file.name) as read:
            for data in self._in_order(read, file.size):
                digest.update(data)
                offset += os.pwrite(written.fileno(), data, offset)
        if offset != file.size or digest.hexdigest() != file.sha256:
            raise damage_error(self._store, file.name, "does not match its commit record")
        with self._mutex:
            self.fetched += 1

    def _in_order(self, read: Callable[[int, int], bytes], size: int) -> Iterator[bytes]:
        pending: deque[Future[bytes]] = deque()
        for start in range(0, size, RANGE_BYTES):
            pending.append(self._ranges.submit(read, start, min(RANGE_BYTES, size - start)))
            if len(pending) == _RANGES_OF_A_FILE:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _give_room(self, written: FileIO, size: int) -> bool:
        """Reserve the space of a copy, for which the least recently used ones are removed. Return whether there is room."""
        with self._locked():
            os.ftruncate(written.fileno(), 0)
            entries = sorted(self._entries())
            excess = sum(held for _, held, _ in entries) + size - self.limit
            for _, held, path in entries:
                if excess <= 0:
                    break
                if self._remove_unused(path):
                    excess -= held
            if excess > 0:
                return False
            try:
                os.posix_fallocate(written.fileno(), 0, size)
            except OSError as error:
                if not is_disk_full(error):
                    raise
                os.ftruncate(written.fileno(), 0)
                return False
            return True

    def _remove_unused(self, path: Path) -> bool:
        """Remove a copy, or what a killed process left of one, unless another process or thread holds its lock."""
        file = _open_own(path, os.O_RDONLY)
        if file is None:
            return False
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if not _is_at(file, path):
                return False
            path.unlink()
            return True

    def _entries(self) -> list[tuple[int, int, Path]]:
        """Return the time of last use, the size and the path of each copy."""
        entries = []
        with os.scandir(self._folder) as found:
            for entry in found:
                if _COPY.fullmatch(entry.name):
                    with suppress(FileNotFoundError):  # It was renamed or removed meanwhile.
                        info = entry.stat(follow_symlinks=False)
                        if _is_own(info):
                            entries.append((info.st_mtime_ns, info.st_size, Path(entry.path)))
        return entries

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = open_lock_file(self._folder / _LOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _is_own(info: os.stat_result) -> bool:
    return stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid()


def _open_own(path: Path, flags: int) -> FileIO | None:
    """Open a file of this user, without following a link, or return None if there is none.

    Raises:
        CacheAccessError: If it is a link or no file, or belongs to another user.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EACCES):
            raise
        raise _foreign_error(path) from error
    file = FileIO(descriptor, "r+" if flags & os.O_RDWR else "r")
    if not _is_own(os.fstat(descriptor)):
        file.close()
        raise _foreign_error(path)
    return file


def _foreign_error(path: Path) -> CacheAccessError:
    return CacheAccessError(
        f"{path} is a link, no file, or another user's, and stands in the place of a local copy; remove it, or give another "
        "cache.local"
    )


def _is_at(file: FileIO, path: Path) -> bool:
    """Return whether an open file is still the one of this name."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(file.fileno()))
