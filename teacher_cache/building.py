"""One builder at a time: a claim on a cache while it is built, grown or repaired."""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from teacher_cache.spec import CacheError
from teacher_cache.store import Store

CLAIM = "building.json"
"""In an object store."""
_BEAT_SECONDS = 20.0
_DEAD_SECONDS = 90.0
"""An object store's claim whose last beat is older than this was left by a killed builder."""


@contextmanager
def building(store: Store) -> Iterator[None]:
    """Holds the claim while the block runs; a killed builder's claim ends with it.

    On a local disk (or a shared one with POSIX locks) it is a lock that the kernel releases; in an object store a small
    object that is renewed every 20 seconds, and counts as left behind after 90.

    Raises:
        CacheError: another builder is at work; it says which.
    """
    with _local(store) if store.local is not None else _remote(store):
        yield


def _identity() -> dict[str, str | int]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _refused(store: Store, text: bytes) -> CacheError:
    try:
        owner = json.loads(text)
        who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return CacheError(
        f"the cache at {store.location} is being built by {who}; wait until it is done, or stop it and run again"
    )


@contextmanager
def _local(store: Store) -> Iterator[None]:
    assert store.local is not None
    store.local.mkdir(parents=True, exist_ok=True)
    path = store.local / ".building.lock"
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise _refused(store, path.read_bytes()) from None
        file.truncate(0)
        file.write(json.dumps(_identity()).encode())
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


@contextmanager
def _remote(store: Store) -> Iterator[None]:
    mine = uuid.uuid4().hex

    def beat() -> None:
        store.write(CLAIM, json.dumps(_identity() | {"claim": mine, "beat": time.time()}).encode())

    def held_by_other() -> bytes | None:
        try:
            text = store.read(CLAIM)
            claim = json.loads(text)
            other = claim["claim"] != mine and time.time() - claim["beat"] < _DEAD_SECONDS
        except (FileNotFoundError, ValueError, KeyError):
            return None
        return text if other else None

    if (text := held_by_other()) is not None:
        raise _refused(store, text)
    beat()
    # Two that claimed at once: the one whose claim was written last stays.
    time.sleep(1.0)
    if (text := held_by_other()) is not None:
        raise _refused(store, text)
    done = threading.Event()

    def keep() -> None:
        while not done.wait(_BEAT_SECONDS):
            # A beat that is lost is made up for by the next; the build itself says when the store can't be reached.
            with suppress(OSError):
                beat()

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield
    finally:
        done.set()
        keeper.join()
        store.remove(CLAIM)
