"""The order by shards: pure, the same however it is spread over ranks, and with few shards open at a time."""

import numpy as np
import pytest

from ray_distill.teacher_cache.targets.window_sampler import WINDOW_SHARDS, plan_window_epoch

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(16_000, 160_000, 4_003)
SHARDS = np.sort(RNG.integers(0, 200, len(LENGTHS))) * 3


def plan(**changes: object) -> list:
    arguments: dict = {
        "batch_size": 4,
        "batch_seconds": None,
        "world_size": 2,
        "accumulate": 2,
        "seed": 1,
        "epoch": 0,
    }
    arguments |= changes
    return plan_window_epoch(LENGTHS[: len(SHARDS)], arguments.pop("shards", SHARDS), **arguments)


def flat(steps: list) -> list[int]:
    return [i for step in steps for micro in step for rank in micro for i in rank]


@pytest.mark.parametrize("budget", [{}, {"batch_size": None, "batch_seconds": 30.0}])
def test_an_epoch_is_pure_nearly_complete_and_the_same_for_any_number_of_workers(budget: dict[str, object]) -> None:
    steps = plan(**budget)
    assert steps == plan(**budget) != plan(epoch=1, **budget)
    seen = flat(steps)
    assert len(seen) == len(set(seen)) > len(LENGTHS) - 4 * 30
    for world_size, accumulate in ((1, 4), (4, 1)):
        other = plan(world_size=world_size, accumulate=accumulate, **budget)
        assert [[b for micro in step for b in micro] for step in other] == [
            [b for m in step for b in m] for step in steps
        ]


def test_a_lane_reads_one_window_of_shards_after_another() -> None:
    steps = plan(world_size=4, accumulate=1)
    reads = 0
    for rank in range(4):
        batches = [step[0][rank] for step in steps]
        last = {int(shard): n for n, batch in enumerate(batches) for shard in SHARDS[batch]}
        first = {int(shard): n for n, batch in reversed(list(enumerate(batches))) for shard in SHARDS[batch]}
        reads += len(first)
        open_at = [sum(first[s] <= n <= last[s] for s in first) for n in range(len(batches))]
        assert max(open_at) <= 1.5 * WINDOW_SHARDS + 3
    # A shard at the border of two lanes is read by both, and some batches move between lanes.
    assert reads <= 200 + 4 * 3


def test_batches_that_fit_no_window_and_fewer_batches_than_lanes() -> None:
    assert sorted(flat(plan(shards=SHARDS[:5], batch_size=1, world_size=5, accumulate=1))) == [0, 1, 2, 3, 4]
    small = plan(shards=SHARDS[:3], batch_size=2, world_size=4, accumulate=2)
    assert [len(micro) for micro in small[0]] == [4, 4] and len(small) == 1
    assert set(flat(small)) == {0, 1, 2}
