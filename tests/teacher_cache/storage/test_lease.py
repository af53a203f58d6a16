"""The lease of an object store: no two processes take it, in whatever order their requests reach the store."""

import random
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from ray_distill.teacher_cache.storage import lock
from ray_distill.teacher_cache.storage.cache_spec import CacheError
from ray_distill.teacher_cache.storage.store import Store


class Schedule:
    """Runs threads one step at a time, in an order that a seed determines."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._turns: dict[int, threading.Semaphore] = {}
        self._stopped = threading.Semaphore(0)

    def step(self) -> None:
        """Wait for this thread's next turn. A no-op for other threads, such as those that renew leases."""
        turn = self._turns.get(threading.get_ident())
        if turn is not None:
            self._stopped.release()
            turn.acquire()

    def run(self, *works: Callable[[], None]) -> None:
        finished: list[int] = []

        def begin(work: Callable[[], None]) -> None:
            self._turns[threading.get_ident()] = threading.Semaphore(0)
            self.step()
            work()
            finished.append(threading.get_ident())
            self._stopped.release()

        threads = [threading.Thread(target=begin, args=(work,), daemon=True) for work in works]
        for thread in threads:
            thread.start()
            assert self._stopped.acquire(timeout=10)
        while waiting := [name for name in self._turns if name not in finished]:
            self._turns[self._random.choice(waiting)].release()
            assert self._stopped.acquire(timeout=10), "a thread neither stopped at a step nor finished"


class FakeStore:
    """An object store in memory, in which a request takes effect at once, but may wait before and after."""

    local = None
    location = "fake://bucket/cache"

    def __init__(self, schedule: Schedule) -> None:
        self.objects: dict[str, bytes] = {}
        self._schedule = schedule

    def write(self, name: str, data: bytes) -> None:
        self._schedule.step()
        self.objects[name] = data

    def read(self, name: str) -> bytes:
        self._schedule.step()
        if name not in self.objects:
            raise FileNotFoundError(name)
        return self.objects[name]

    def names(self, prefix: str) -> list[str]:
        self._schedule.step()
        return sorted(name for name in self.objects if name.startswith(f"{prefix}/"))

    def remove(self, name: str) -> None:
        self._schedule.step()
        self.objects.pop(name, None)


@pytest.mark.parametrize("expired", [False, True])
def test_two_processes_never_hold_the_lease(monkeypatch: pytest.MonkeyPatch, expired: bool) -> None:
    outcomes = set()
    if expired:
        monkeypatch.setattr(lock, "_EXPIRY_SECONDS", 0.0)
        # Claims don't expire here, only the lease that a killed process left.
        monkeypatch.setattr(lock.time, "monotonic", lambda: 0.0)
    for seed in range(150):
        schedule = Schedule(seed)
        store = FakeStore(schedule)
        if expired:
            store.objects[lock.LEASE] = b'{"claim": "killed"}'
        holders: list[str] = []
        won: list[int] = []
        refused: list[str] = []

        def take(
            schedule: Schedule = schedule,
            store: FakeStore = store,
            holders: list[str] = holders,
            won: list[int] = won,
            refused: list[str] = refused,
        ) -> None:
            try:
                with lock._lease(cast(Store, store)):
                    holders.append("one")
                    won.append(len(holders))
                    schedule.step()
                    schedule.step()
                    holders.pop()
            except CacheError as error:
                refused.append(str(error))

        monkeypatch.setattr(lock.time, "sleep", lambda seconds, schedule=schedule: schedule.step())
        schedule.run(take, take, take)
        assert won and set(won) == {1}, f"seed {seed}: two processes held the lease at once"
        assert len(won) + len(refused) == 3
        assert all("is being built by" in message for message in refused)
        assert store.objects == {}, "claims and leases are removed"
        outcomes.add(len(won))
    assert 1 in outcomes


def test_the_claim_of_a_killed_process_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = FakeStore(Schedule(0))
    monkeypatch.setattr(lock, "_EXPIRY_SECONDS", 0.3)
    for name in ("~", "!"):  # Above and below all names of live claims.
        store.objects[f"{lock.CLAIMS}/{name}.json"] = b"{}"
        began = time.monotonic()
        with lock._lease(store):
            assert list(store.objects) == [lock.LEASE]
        assert time.monotonic() - began > 0.3


def test_the_process_that_comes_first_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = FakeStore(Schedule(0))
    rival = f"{lock.CLAIMS}/!.json"
    store.objects[rival] = b'{"host": "far", "pid": 7, "since": "noon"}'
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: store.objects.pop(rival))
    with pytest.raises(CacheError, match="is being built by process 7 on far, since noon"), lock._lease(store):
        pass
    assert store.objects == {}
