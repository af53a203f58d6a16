"""The simulation agrees with cases that can be worked out by hand."""

import pytest

from benchmarks.cluster.simulation import BuildWorkers, Trainers, simulate_build, simulate_training


def test_a_build_without_failures_is_arithmetic() -> None:
    trace = simulate_build([60.0] * 7, BuildWorkers(2, 20.0, start_seconds=5.0))
    assert trace.seconds == 5 + 4 * 3  # 7 shards of 3 s over 2 workers
    assert trace.finished == (8, 8, 11, 11, 14, 14, 17)
    assert (trace.failures, trace.lost_seconds) == (0, 0)
    assert trace.busy == pytest.approx(7 * 3 / (2 * 17))


def test_a_killed_worker_loses_only_its_shard() -> None:
    workers = BuildWorkers(2, 20.0, start_seconds=1.0)
    trace = simulate_build([60.0] * 6, workers, kills=[(5.0, 0)])
    # Worker 0 works from 1 to 4, is killed at 5 on its second shard and restarts it at 6. Worker 1: 1-4, 4-7, 7-10.
    assert trace.failures == 1 and trace.lost_seconds == 1
    assert trace.finished == (4, 4, 7, 9, 10, 12)


def test_a_lost_shard_restarts_no_earlier_than_it_was_lost() -> None:
    # Worker 1 finishes at 3 and is idle until worker 0 is killed at 5 while it works on the last shard.
    trace = simulate_build([60.0] * 3, BuildWorkers(2, 20.0), kills=[(5.0, 0)])
    assert trace.finished == (3, 3, 8)


def test_every_shard_is_finished_once_despite_failures() -> None:
    shards = [30.0 + n for n in range(200)]
    calm = simulate_build(shards, BuildWorkers(8, 20.0))
    rough = BuildWorkers(8, 20.0, straggling=0.4, failures_per_hour=60, start_seconds=2.0)
    traces = [simulate_build(shards, rough, seed=seed) for seed in range(5)]
    for trace in traces:
        assert len(trace.finished) == len(shards)
        assert trace.failures > 0 and trace.seconds > calm.seconds and trace.busy < calm.busy
    assert len({trace.seconds for trace in traces}) == 5
    assert simulate_build(shards, rough, seed=3) == traces[3]


def test_training_is_as_slow_as_computation_or_reading() -> None:
    computing = simulate_training(1000, Trainers(4, 0.5, batch_bytes=1e6, store_bytes_per_second=1e8))
    assert computing.seconds == pytest.approx(1000 * 0.5 + 4 * 0.01)
    reading = simulate_training(1000, Trainers(4, 0.01, batch_bytes=1e6, store_bytes_per_second=1e8))
    assert reading.seconds == pytest.approx(1000 * 4 * 0.01 + 0.01, rel=1e-3)
    assert reading.waited_seconds == pytest.approx(reading.seconds - 1000 * 0.01)
    unpacking = simulate_training(1000, Trainers(1, 0.01, 1.0, 1e9, unpack_seconds=0.02))
    assert unpacking.seconds == pytest.approx(1000 * 0.02, rel=1e-2)


def test_prefetching_hides_latency() -> None:
    rare = {"ranks": 2, "step_seconds": 0.1, "batch_bytes": 1e3, "store_bytes_per_second": 1e9}
    spread = {"latency_seconds": 0.05, "latency_spread": 1.5}
    near = simulate_training(2000, Trainers(**rare, **spread, prefetch=1))
    far = simulate_training(2000, Trainers(**rare, **spread, prefetch=32))
    assert far.waited_seconds < near.waited_seconds


def test_a_failure_repeats_the_steps_since_the_last_checkpoint() -> None:
    calm = Trainers(8, 0.5, 1.0, 1e9, checkpoint_steps=50)
    failing = Trainers(8, 0.5, 1.0, 1e9, failures_per_hour=2, restart_seconds=30, checkpoint_steps=50)
    trace = simulate_training(5000, failing, seed=1)
    assert trace.failures > 5
    assert trace.lost_steps < 50 * trace.failures
    floor = simulate_training(5000, calm).seconds + 30 * trace.failures + 0.5 * trace.lost_steps
    assert floor <= trace.seconds < floor + trace.failures  # plus the steps that failed
    hopeless = Trainers(8, 0.5, 1.0, 1e9, failures_per_hour=100, checkpoint_steps=1000)
    with pytest.raises(ValueError, match="make checkpoints more often"):
        simulate_training(5000, hopeless)
