"""One builder at a time: a claim on a cache while it is built, grown or repaired."""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ray_distill.teacher_cache.storage.cache_spec import CacheError
from ray_distill.teacher_cache.storage.store import Store, is_full

CLAIM = "building.json"
"""In an object store."""
_BEAT_SECONDS = 10.0
_DEAD_SECONDS = 45.0
"""An object store's claim that is not renewed for so long, while somebody watches, was left by a killed builder."""
_SETTLE_SECONDS = 1.0
_WRITTEN_SECONDS = 2.0
"""A lock's holder has written who it is by then."""


@contextmanager
def building(store: Store) -> Iterator[Callable[[], None]]:
    """Holds the claim while the block runs; a killed builder's claim ends with it.

    On a local disk (or a shared one with POSIX locks) it is a lock that the kernel releases. In an object store it is a small
    object that is renewed every 10 seconds; one that is found there is watched until it is renewed (another builder is at
    work) or has not been for 45 seconds (its builder was killed). Clocks of different machines are not compared.

    Yields:
        A function that raises CacheError once another builder has taken the claim over, which happens to one that did not
        reach its object store for long. To be called before each piece of work.

    Raises:
        CacheError: another builder is at work, and it says which; or the block met a full disk.
    """
    try:
        with _local(store) if store.local is not None else _remote(store) as check:
            yield check
    except OSError as error:
        if is_full(error):
            raise full_disk(store, str(error)) from error
        raise


def full_disk(store: Store, why: str) -> CacheError:
    """The one sentence for a disk without room."""
    place = (
        f"the disk of {store.location}" if store.local is not None else "the disk with the temporary folder (TMPDIR)"
    )
    return CacheError(f"{place} is full ({why}); what is finished stays: make room and run again")


def _identity() -> dict[str, str | int]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _who(text: bytes) -> str:
    try:
        owner = json.loads(text)
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _refused(store: Store, text: bytes) -> CacheError:
    return CacheError(
        f"the cache at {store.location} is being built by {_who(text)}; wait until it is done, or stop it and run again"
    )


@contextmanager
def _local(store: Store) -> Iterator[Callable[[], None]]:
    assert store.local is not None
    store.local.mkdir(parents=True, exist_ok=True)
    path = store.local / ".building.lock"
    with path.open("a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refused(store, _holder(path)) from None
        file.truncate(0)
        file.write(json.dumps(_identity()).encode())
        try:
            yield lambda: None
        finally:
            file.truncate(0)


def _holder(path: Path) -> bytes:
    """What the lock's holder says of itself; it may have got the lock a moment ago, and not have written it yet."""
    give_up = time.monotonic() + _WRITTEN_SECONDS
    time.sleep(0.1)
    while not (text := path.read_bytes()) and time.monotonic() < give_up:
        time.sleep(0.05)
    return text


@contextmanager
def _remote(store: Store) -> Iterator[Callable[[], None]]:
    mine = uuid.uuid4().hex
    identity = _identity()
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1
        store.write(CLAIM, json.dumps(identity | {"claim": mine, "beat": beats}).encode())

    def other() -> bytes | None:
        """The claim that lies there, unless it is ours."""
        try:
            text = store.read(CLAIM)
        except FileNotFoundError:
            return None
        return None if mine.encode() in text else text

    found = other()
    dead = time.monotonic() + _DEAD_SECONDS
    while found is not None and time.monotonic() < dead:
        time.sleep(_BEAT_SECONDS / 10)
        now = other()
        if now is not None and now != found:
            raise _refused(store, now)
        found = now
    beat()
    # Two that claimed at once: the one whose claim was written last stays.
    time.sleep(_SETTLE_SECONDS)
    if (text := other()) is not None:
        raise _refused(store, text)
    done = threading.Event()
    taken: list[bytes] = []

    def keep() -> None:
        while not taken and not done.wait(_BEAT_SECONDS):
            # A beat that is lost is made up for by the next; the build itself says when the store can't be reached.
            with suppress(OSError):
                if (text := other()) is not None:
                    taken.append(text)
                else:
                    beat()

    def check() -> None:
        if taken:
            raise CacheError(
                f"the cache at {store.location} was taken over by {_who(taken[0])}, as this builder did not reach it "
                "for too long; what is finished stays: leave it to the other one"
            )

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield check
    finally:
        done.set()
        keeper.join()
        # A claim that can't be removed counts as left behind.
        with suppress(OSError):
            if other() is None:
                store.remove(CLAIM)
