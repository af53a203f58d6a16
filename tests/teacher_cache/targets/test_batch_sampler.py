import numpy as np
import pytest

from ray_distill.teacher_cache.targets.batch_sampler import cut_by_seconds, plan_epoch

LENGTHS = np.random.default_rng(0).integers(16_000, 160_000, 203)


def plan(**changes: object) -> list:
    arguments: dict = {
        "batch_size": 4,
        "batch_seconds": None,
        "world_size": 2,
        "accumulate": 3,
        "seed": 1,
        "epoch": 0,
    }
    return plan_epoch(LENGTHS, **(arguments | changes))


def flat(steps: list) -> list[int]:
    return [i for step in steps for micro in step for rank in micro for i in rank]


def test_pure_and_different_each_epoch() -> None:
    assert plan() == plan()
    assert plan() != plan(epoch=1)
    assert plan() != plan(seed=2)


def test_every_rank_gets_the_same_number_of_batches_and_nothing_repeats() -> None:
    steps = plan()
    assert all(len(step) == 3 and all(len(micro) == 2 for micro in step) for step in steps)
    seen = flat(steps)
    assert len(seen) == len(set(seen))
    assert len(seen) >= len(LENGTHS) - 4 * 2 * 3


def test_equal_global_batches_whatever_the_world_size() -> None:
    one = plan(world_size=1, accumulate=6)
    two = plan(world_size=2, accumulate=3)
    assert [sorted(flat([step])) for step in one] == [sorted(flat([step])) for step in two]


def test_seconds_budget_counts_padding() -> None:
    batches = cut_by_seconds(range(len(LENGTHS)), LENGTHS, 30)
    assert [i for batch in batches for i in batch] == list(range(len(LENGTHS)))
    assert all(max(LENGTHS[batch]) * len(batch) <= 30 * 16_000 for batch in batches)
    assert cut_by_seconds([0], np.array([10**9]), 30) == [[0]]


def test_sorting_within_windows_saves_padding() -> None:
    def padding(batches: list[list[int]]) -> float:
        return 1 - sum(LENGTHS[b].sum() for b in batches) / sum(LENGTHS[b].max() * len(b) for b in batches)

    ours = [rank for step in plan() for micro in step for rank in micro]
    order = np.random.default_rng(0).permutation(len(LENGTHS))
    naive = [order[i : i + 4].tolist() for i in range(0, len(order), 4)]
    assert padding(ours) < padding(naive) / 3


def test_an_epoch_within_one_window_has_other_batches_than_the_next() -> None:
    first, second = (
        {
            frozenset(flat([step]))
            for step in plan_epoch(
                LENGTHS[:100], batch_size=4, batch_seconds=None, world_size=1, accumulate=1, seed=0, epoch=epoch
            )
        }
        for epoch in (0, 1)
    )
    assert len(first & second) < len(first) / 2


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_utterances_than_a_step_needs(count: int) -> None:
    steps = plan_epoch(LENGTHS[:count], batch_size=4, batch_seconds=None, world_size=2, accumulate=2, seed=0, epoch=0)
    assert len(steps) == 1
    assert set(flat(steps)) == set(range(count))
