"""The lock of a cache: one process at a time builds, extends or repairs it."""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from ray_distill.teacher_cache.storage.cache_spec import CacheError
from ray_distill.teacher_cache.storage.local_files import open_lock_file
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.whole_files import is_disk_full

LEASE = "building.json"
"""Name of the lock object in an object store."""
CLAIMS = "building"
"""Folder of the claims of processes that are about to take the lease."""
_LOCK_FILE = ".building.lock"
_HEARTBEAT_SECONDS = 10.0
_EXPIRY_SECONDS = 45.0
"""A lease has expired if nobody renewed it while it was watched for this long: its holder was killed."""
_POLL_SECONDS = 0.2
_IDENTITY_SECONDS = 2.0
"""Maximum time between taking a lock file and writing the holder's identity into it."""


@contextmanager
def cache_lock(store: Store) -> Iterator[Callable[[], None]]:
    """Hold the lock of a cache while the block runs. The lock of a killed process is released.

    On a local disk, or a shared one with POSIX locks, it is a file lock that the kernel releases. In an object store it is a
    lease: a small object that its holder renews every 10 seconds. A process that finds a lease watches it until it is renewed
    (its holder is alive) or for 45 seconds (its holder was killed). Clocks of different machines are never compared.

    Arrow offers no conditional put, so the right to write the lease is won by an election (`_alone`). If the store lists objects as
    soon as they are written, as S3, GCS, Azure and their copies do, two processes never take one lease, whatever their timing. The
    exception is a process that stands still for more than 45 seconds between two requests. It loses its lease, and notices that before
    its next piece of work.

    Yields:
        A function to call before each piece of work. It raises CacheError if another process has taken over the lease, which
        happens when this one could not reach the object store for too long.

    Raises:
        CacheError: If another process holds the lock, which the message names, the folder can't be written to, or the disk
            fills up in the block.
    """
    try:
        with _file_lock(store) if store.local is not None else _lease(store) as check:
            yield check
    except OSError as error:
        if is_disk_full(error):
            raise disk_full_error(store, str(error)) from error
        raise


def disk_full_error(store: Store, reason: str) -> CacheError:
    """Return the error for a full disk."""
    disk = f"the disk of {store.location}" if store.local is not None else "the disk of the temporary folder (TMPDIR)"
    return CacheError(f"{disk} is full ({reason}); free some space and run again, finished files are kept")


def _identity() -> dict[str, str | int]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _describe(content: bytes) -> str:
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _locked_error(store: Store, content: bytes) -> CacheError:
    return CacheError(
        f"the cache at {store.location} is being built by {_describe(content)}; wait until it has finished, or stop it and "
        "run again"
    )


@contextmanager
def _file_lock(store: Store) -> Iterator[Callable[[], None]]:
    assert store.local is not None
    path = store.local / _LOCK_FILE
    is_new = not store.local.exists()
    with _locked_file(store, path) as file:
        file.truncate(0)
        file.write(json.dumps(_identity()).encode())
        try:
            yield lambda: None
        except BaseException:
            if is_new and [entry.name for entry in store.local.iterdir()] == [_LOCK_FILE]:
                with suppress(OSError):  # Another process has begun to write there.
                    path.unlink()
                    store.local.rmdir()  # Nothing was written, so no cache is there.
            raise
        finally:
            file.truncate(0)


@contextmanager
def _locked_file(store: Store, path: Path) -> Iterator[FileIO]:
    """Open the lock file and lock it. Its last holder may have removed it between the two; then the next one is tried."""
    while True:
        with os.fdopen(open_lock_file(path), "a+b", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _locked_error(store, _wait_for_identity(path)) from None
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                yield file
                return


def _wait_for_identity(path: Path) -> bytes:
    """Return the identity in a lock file. Its holder may have taken the lock a moment ago and not have written it yet."""
    give_up = time.monotonic() + _IDENTITY_SECONDS
    time.sleep(0.1)
    while not (content := path.read_bytes()) and time.monotonic() < give_up:
        time.sleep(0.05)
    return content


@contextmanager
def _lease(store: Store) -> Iterator[Callable[[], None]]:
    token = uuid.uuid4().hex
    identity = _identity()
    renewals = 0

    def renew() -> None:
        nonlocal renewals
        renewals += 1
        store.write(LEASE, json.dumps(identity | {"claim": token, "beat": renewals}).encode())

    def lease_of_another() -> bytes | None:
        try:
            content = store.read(LEASE)
        except FileNotFoundError:
            return None
        return None if token.encode() in content else content

    found = lease_of_another()
    expires = time.monotonic() + _EXPIRY_SECONDS
    while found is not None and time.monotonic() < expires:
        time.sleep(_HEARTBEAT_SECONDS / 10)
        now = lease_of_another()
        if now is not None and now != found:
            raise _locked_error(store, now)
        found = now
    with _alone(store, f"{CLAIMS}/{token}.json", json.dumps(identity).encode()):
        # A lease that another process wrote since, and not the expired one.
        if (now := lease_of_another()) is not None and now != found:
            raise _locked_error(store, now)
        renew()
    released = threading.Event()
    taken_over: list[bytes] = []

    def keep_renewing() -> None:
        while not taken_over and not released.wait(_HEARTBEAT_SECONDS):
            # The next renewal makes up for a failed one. If the store stays out of reach, the build itself fails.
            with suppress(OSError):
                if (content := lease_of_another()) is not None:
                    taken_over.append(content)
                else:
                    renew()

    def check() -> None:
        if taken_over:
            raise CacheError(
                f"the cache at {store.location} was taken over by {_describe(taken_over[0])}, because this process could not "
                "reach it for too long; let the other process finish, finished files are kept"
            )

    thread = threading.Thread(target=keep_renewing, daemon=True)
    thread.start()
    try:
        yield check
    finally:
        released.set()
        thread.join()
        # A lease that can't be removed expires.
        with suppress(OSError):
            if lease_of_another() is None:
                store.remove(LEASE)


@contextmanager
def _alone(store: Store, claim: str, content: bytes) -> Iterator[None]:
    """Run a block that no other process runs at the same time, or raise CacheError because another one is about to.

    This is Lamport's one-bit algorithm (The mutual exclusion problem, part II, 1986). Each process writes its claim before it
    lists the claims, so of two processes at least one sees the other. The one of higher name withdraws its claim and gives up
    once the other has taken the lease, and the one of lower name waits until the other has withdrawn. The claim of a killed
    process expires.

    Args:
        store: Store in which listings show every finished write.
        claim: Name of this process's claim, which must be unique.
        content: Identity of this process, for the message.
    """
    folder = claim.rpartition("/")[0]
    first_seen: dict[str, float] = {}
    store.write(claim, content)
    try:
        while True:
            claims = store.names(folder)
            others = [other for other in claims if other != claim]
            for other in others:
                if time.monotonic() - first_seen.setdefault(other, time.monotonic()) > _EXPIRY_SECONDS:
                    store.remove(other)
            if claim not in claims:  # This process stood still, and its claim expired.
                raise _locked_error(store, _content(store, LEASE))
            if others and min(others) < claim:
                rival = _content(store, min(others))
                store.remove(claim)
                if not _is_dead(store, min(others)):
                    raise _locked_error(store, rival)
                store.write(claim, content)
            elif others:
                time.sleep(_POLL_SECONDS)
            else:
                break
        yield
    finally:
        with suppress(OSError):
            store.remove(claim)


def _is_dead(store: Store, claim: str) -> bool:
    """Watch the claim of another process. Return True and remove it if it expires, or False once its process has removed it."""
    expires = time.monotonic() + _EXPIRY_SECONDS
    while claim in store.names(claim.rpartition("/")[0]):
        if time.monotonic() > expires:
            store.remove(claim)
            return True
        time.sleep(_POLL_SECONDS)
    return False


def _content(store: Store, name: str) -> bytes:
    try:
        return store.read(name)
    except FileNotFoundError:
        return b""
