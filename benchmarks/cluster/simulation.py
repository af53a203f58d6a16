"""Discrete-event simulation of cache builds and of the reads of trainers, with failures and stragglers.

Assumptions:

- The time of a shard is its audio divided by the worker's rate, times a log-normal factor of mean 1.
- Workers fail at random at a constant rate, also while they work on a shard. The shard is lost and returns to the head of the queue,
  since shards are committed whole. The worker is back after a fixed time.
- Trainers run in lockstep (DDP): a step starts when the last rank has its batch and ends with the slowest rank's computation.
- Each rank prefetches a limited number of batches, one after the other, as `training.prefetch` does. Reading a batch takes a
  log-normal latency (the sum over sequential requests) and then the transfer of its bytes, which pass through one store of fixed
  bandwidth in the order of their arrival.
- If a trainer fails, all restart from the last checkpoint after a fixed time.
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
        workers: Number of workers.
        audio_per_second: Seconds of audio that one worker processes per second, with all passes.
        straggling: Standard deviation of the logarithm of a shard's time. Default 0.
        failures_per_hour: Failures of one worker per hour. Default 0.
        start_seconds: Start-up time of a worker, also after a failure. Default 0.
    """

    workers: int
    audio_per_second: float
    straggling: float = 0.0
    failures_per_hour: float = 0.0
    start_seconds: float = 0.0


@dataclass(frozen=True)
class BuildTrace:
    """Result of a simulated build.

    Attributes:
        seconds: Time until the last shard is committed.
        finished: Times at which shards were finished, in ascending order.
        failures: Number of failures of workers during work.
        lost_seconds: Work time lost in failures.
        busy: Share of the workers' time spent on finished shards.
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
    """Simulate a build. Free workers take the next shard of the queue.

    Args:
        shard_seconds: Seconds of audio of each shard.
        workers: The workers.
        seed: Seed of failures and stragglers. Equal arguments give equal traces.
        kills: Pairs (seconds, worker): times at which a worker is killed, in addition to random failures.

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
    # A heap of the attempts' ends, so that a lost shard is requeued only when the failure happens.
    running: list[tuple[float, int, int, float, bool]] = []
    finished: list[float] = []
    failures, lost, useful = 0, 0.0, 0.0
    now = 0.0  # End of the last attempt. A worker that was free before starts no earlier than this.
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
        ranks: Number of ranks.
        step_seconds: Computation time of a rank per batch.
        batch_bytes: Bytes that a rank reads per batch.
        store_bytes_per_second: Bandwidth of the store for all ranks together.
        latency_seconds: Mean latency of a batch: that of a request, times the requests per batch, divided by the reading threads.
            Default 0.
        latency_spread: Standard deviation of the logarithm of the latency. Default 0.
        straggling: Standard deviation of the logarithm of a step's time. Default 0.
        unpack_seconds: Time that a rank's reading thread needs per batch besides the transfer. Default 0.
        prefetch: Maximum number of prefetched batches, besides the one that is being read. Default 4, as in `training.prefetch`.
        failures_per_hour: Failures of one rank per hour. Default 0.
        restart_seconds: Time until training continues after a failure. Default 0.
        checkpoint_steps: Steps between checkpoints. Default 1000.
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
    """Result of a simulated training.

    Attributes:
        seconds: Total time.
        waited_seconds: Time that the slowest rank waited for data, summed over steps.
        failures: Number of failures, each followed by a restart from a checkpoint.
        lost_steps: Number of steps that were repeated.
    """

    seconds: float
    waited_seconds: float
    failures: int
    lost_steps: int


def simulate_training(steps: int, trainers: Trainers, *, seed: int = 0) -> TrainTrace:
    """Simulate ``steps`` training steps.

    Raises:
        ValueError: If failures are so frequent that training doesn't reach the next checkpoint.

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
            # The reader starts on batch k when batch k - 1 is in the queue, which needs batch k - 1 - prefetch to have left it.
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
                f"training doesn't get beyond step {step}: a failure occurs every {1 / rate:.0f} s, but a checkpoint only every "
                f"{t.checkpoint_steps * t.step_seconds:.0f} s; make checkpoints more often"
            )
    return TrainTrace(now, waited, failures, lost)
