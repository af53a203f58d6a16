"""A discrete simulation of cache builds and of trainers' reads, with failures and stragglers, which a plan on paper leaves out.

Assumptions, all of them:

- A shard's time is its audio over the worker's rate, times a log-normal factor of mean 1.
- A worker fails at random with a constant rate, also while it works on a shard; the shard is lost and goes back to the head of
  the queue (shards are committed whole), and the worker is back after a fixed time.
- Trainers step together (DDP): a step begins when the last rank has its batch and ends with the slowest rank's computation.
- Each rank reads ahead at most so many batches, one after the other, as `training.prefetch` does. Reading a batch is a log-normal
  latency (of all requests that are made one after the other) and then its bytes, which pass through one store of fixed bandwidth
  in the order in which they arrive there.
- When any trainer fails, all start again from the last checkpoint after a fixed time.
"""

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BuildWorkers:
    """The workers of a build.

    Attributes:
        workers: side by side.
        audio_per_second: that one gets through, in seconds of audio, with all passes.
        straggling: standard deviation of the logarithm of a shard's time. Default 0.
        failures_per_hour: of one worker. Default 0.
        start_seconds: until a worker begins its first shard, and again after a failure. Default 0.
    """

    workers: int
    audio_per_second: float
    straggling: float = 0.0
    failures_per_hour: float = 0.0
    start_seconds: float = 0.0


@dataclass(frozen=True)
class BuildTrace:
    """What happened in a simulated build.

    Attributes:
        seconds: from the start until the last shard is committed.
        finished: seconds at which each shard was, in order of their ends.
        failures: of workers, while they worked.
        lost_seconds: of work that was begun and lost.
        busy: share of the workers' time that ended in shards.
    """

    seconds: float
    finished: tuple[float, ...]
    failures: int
    lost_seconds: float
    busy: float


def simulate_build(
    shard_seconds: Sequence[float],
    workers: BuildWorkers,
    *,
    seed: int = 0,
    kills: Sequence[tuple[float, int]] = (),
) -> BuildTrace:
    """Builds shards in their order; whoever is free takes the next one.

    Args:
        shard_seconds: audio of each shard.
        workers: who builds.
        seed: of failures and stragglers. Equal arguments give equal traces.
        kills: (seconds, worker) at which a worker is killed, besides the random failures.

    Example:
        >>> simulate_build([60.0] * 4, BuildWorkers(2, audio_per_second=20.0)).seconds
        6.0
    """
    assert workers.workers >= 1 and workers.audio_per_second > 0
    rng = np.random.default_rng(seed)
    waiting = deque(enumerate(shard_seconds))
    free = [(workers.start_seconds, worker) for worker in range(workers.workers)]
    heapq.heapify(free)
    killed = {worker: deque(sorted(at for at, who in kills if who == worker)) for worker in range(workers.workers)}
    # Ends of attempts, so that a lost shard goes back only once it is known to be lost.
    running: list[tuple[float, int, int, float, bool]] = []
    finished: list[float] = []
    failures, lost, useful = 0, 0.0, 0.0
    now = 0.0  # of the last end of an attempt: whoever has long been free begins no earlier than that.
    while waiting or running:
        if waiting and free and (not running or free[0][0] <= running[0][0]):
            since, worker = heapq.heappop(free)
            began = max(since, now)
            shard, audio = waiting.popleft()
            spread = workers.straggling
            takes = audio / workers.audio_per_second * math.exp(rng.normal(-spread * spread / 2, spread))
            rate = workers.failures_per_hour / 3600
            dies = began + rng.exponential(1 / rate) if rate else math.inf
            plan = killed[worker]
            while plan and plan[0] < began:
                plan.popleft()
            if plan:
                dies = min(dies, plan[0])
            fails = dies < began + takes
            heapq.heappush(running, (dies if fails else began + takes, worker, shard, began, fails))
            continue
        now, worker, shard, began, failed = heapq.heappop(running)
        if failed:
            failures += 1
            lost += now - began
            waiting.appendleft((shard, shard_seconds[shard]))
            heapq.heappush(free, (now + workers.start_seconds, worker))
        else:
            finished.append(now)
            useful += now - began
            heapq.heappush(free, (now, worker))
    end = finished[-1] if finished else 0.0
    return BuildTrace(end, tuple(finished), failures, lost, useful / (end * workers.workers) if end else 1.0)


@dataclass(frozen=True)
class Trainers:
    """Trainers that read from one store.

    Attributes:
        ranks: side by side.
        step_seconds: a rank's computation for a batch.
        batch_bytes: a rank reads for it.
        store_bytes_per_second: of all ranks together.
        latency_seconds: mean, of a batch: of a request, times the requests for a batch over the threads that make them. Default 0.
        latency_spread: standard deviation of its logarithm. Default 0.
        straggling: standard deviation of the logarithm of a step's time. Default 0.
        unpack_seconds: of a rank's reading thread for a batch, besides the transfer. Default 0.
        prefetch: batches that wait at most, besides the one that is being read. Default 4, as in `training.prefetch`.
        failures_per_hour: of one rank. Default 0.
        restart_seconds: until all train again after a failure. Default 0.
        checkpoint_steps: between checkpoints. Default 1000.
    """

    ranks: int
    step_seconds: float
    batch_bytes: float
    store_bytes_per_second: float
    latency_seconds: float = 0.0
    latency_spread: float = 0.0
    straggling: float = 0.0
    unpack_seconds: float = 0.0
    prefetch: int = 4
    failures_per_hour: float = 0.0
    restart_seconds: float = 0.0
    checkpoint_steps: int = 1000


@dataclass(frozen=True)
class TrainTrace:
    """What happened in a simulated training.

    Attributes:
        seconds: in all.
        waited_seconds: that the slowest rank waited for data, over all steps.
        failures: each of which set everything back to a checkpoint.
        lost_steps: made again.
    """

    seconds: float
    waited_seconds: float
    failures: int
    lost_steps: int


def simulate_training(steps: int, trainers: Trainers, *, seed: int = 0) -> TrainTrace:
    """Trains for ``steps`` steps.

    Raises:
        ValueError: failures come so often that training does not get from one checkpoint to the next.

    Example:
        >>> round(simulate_training(100, Trainers(2, 0.5, 1e6, 1e9)).seconds)
        50
    """
    t = trainers
    assert steps >= 1 and t.ranks >= 1 and t.prefetch >= 1
    rng = np.random.default_rng(seed)
    rate = t.failures_per_hour * t.ranks / 3600
    now, waited, failures, lost, step = 0.0, 0.0, 0, 0, 0
    while step < steps:
        first = step
        dies = now + rng.exponential(1 / rate) if rate else math.inf
        store = now
        read_end = [now] * t.ranks
        taken: list[deque[float]] = [deque([now] * (t.prefetch + 1), maxlen=t.prefetch + 1) for _ in range(t.ranks)]
        while step < steps:
            # The reader of batch k begins once it put batch k - 1 down, for which batch k - 1 - prefetch must have been taken.
            spread = t.latency_spread
            latencies = t.latency_seconds * np.exp(rng.normal(-spread * spread / 2, spread, t.ranks))
            arrivals = [max(read_end[rank], taken[rank][0]) + float(latencies[rank]) for rank in range(t.ranks)]
            for arrives, rank in sorted(zip(arrivals, range(t.ranks), strict=True)):
                store = max(store, arrives) + t.batch_bytes / t.store_bytes_per_second
                read_end[rank] = store + t.unpack_seconds
            begins = max(now, *read_end)
            spread = t.straggling
            slowest = float(np.exp(rng.normal(-spread * spread / 2, spread, t.ranks)).max()) if spread else 1.0
            ends = begins + t.step_seconds * slowest
            if ends > dies:
                break
            waited += begins - now
            for rank in range(t.ranks):
                taken[rank].append(begins)
            now, step = ends, step + 1
        else:
            break
        failures += 1
        back = max(first, step - step % t.checkpoint_steps)
        lost += step - back
        now, step = dies + t.restart_seconds, back
        if failures > 100 * (1 + steps / t.checkpoint_steps):
            raise ValueError(
                f"training gets no further than step {step}: it fails every {1 / rate:.0f} s, a checkpoint takes "
                f"{t.checkpoint_steps * t.step_seconds:.0f} s; make checkpoints more often"
            )
    return TrainTrace(now, waited, failures, lost)
