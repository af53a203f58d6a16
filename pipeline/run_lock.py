"""The lock of a run's folder: one process at a time works on a run."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock

from ray_distill.pipeline.files import write_text

_RECORD_SECONDS = 2.0
"""Longest time that a process needs to write its record after it has acquired the lock."""


class RunInUseError(ValueError):
    """A run that another process is working on."""


@dataclass(frozen=True)
class LockHolder:
    """The process that holds a lock.

    Attributes:
        host: Name of its machine.
        process: Process ID on that machine.
        since: Local time at which it acquired the lock, as ``2026-01-31 09:30:00``.
    """

    host: str
    process: int
    since: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, started {self.since}"


@contextmanager
def lock_run(lock_file: Path, record: Path) -> Iterator[LockHolder | None]:
    """Hold the lock of a run's folder while the block runs.

    The lock is an advisory lock on ``lock_file`` (``flock``), which the kernel releases when the process ends, however it ends. So a
    killed process never blocks a run. ``record`` names the holder, for the message to other processes.

    Processes of one machine always exclude each other. Processes of different machines do so if the file system forwards locks
    between machines, as NFS 4, CephFS, GPFS and Lustre (mounted with ``flock``) do. On a file system that does not, runs of one
    folder on two machines are not noticed. On a file system without ``flock``, filelock falls back to a lock that is a file: one left
    by a killed process is recognised on the machine of that process only, and must be removed by hand on others.

    In a Ray job, the job's driver holds the lock, not the workers.

    Args:
        lock_file: File to lock, in an existing folder. It stays there, empty, after the release.
        record: File that describes the holder. It is removed at the release.

    Yields:
        The previous holder if it ended without releasing the lock, or None.

    Raises:
        RunInUseError: Another process holds the lock. The message names it.
    """
    lock = filelock.FileLock(lock_file, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise RunInUseError(
            f"the run in {lock_file.parent} is in use by {_wait_for_holder(record)}; wait for it to finish, stop it, or choose "
            "another name=..."
        ) from None
    try:
        previous = _read_holder(record)
        holder = LockHolder(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"))
        write_text(record, json.dumps(asdict(holder)) + "\n")
        yield previous
    finally:
        record.unlink(missing_ok=True)
        lock.release()


def _wait_for_holder(record: Path) -> str:
    """Return a description of the holder, which may have acquired the lock just now and not have written its record yet."""
    deadline = time.monotonic() + _RECORD_SECONDS
    while (holder := _read_holder(record)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return str(holder or "another process")


def _read_holder(record: Path) -> LockHolder | None:
    try:
        return LockHolder(**json.loads(record.read_text()))
    except (OSError, ValueError, TypeError):
        return None  # The record is only for messages; the lock decides.
