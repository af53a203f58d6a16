"""The search for the largest batch that fits, with memories that are functions."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from ray_distill.teacher_cache.targets.batch_sampler import plan_epoch
from ray_distill.teacher_cache.targets.fitting_batch import (
    CLOSE,
    TRIES,
    FittingBatch,
    find_fitting,
    largest_batches,
    plain,
)

LIMIT = 70_000_000_000
SHORTEST = 16.0


class Memory:
    """A device on which a step needs ``needed(seconds)`` bytes, and which has no more than ``capacity``."""

    message = "CUDA out of memory. Tried to allocate 2.00 GiB"

    def __init__(self, needed: Callable[[float], float], capacity: float = math.inf) -> None:
        self.needed, self.capacity = needed, capacity
        self.sizes: list[float] = []

    def __call__(self, seconds: float) -> int:
        self.sizes.append(seconds)
        if self.needed(seconds) > self.capacity:
            raise RuntimeError(self.message)
        return int(self.needed(seconds))

    def search(self, most: float = 1e6) -> FittingBatch:
        found = find_fitting(self, LIMIT, SHORTEST, most)
        assert found is not None
        assert found.peak_bytes <= found.limit_bytes == LIMIT
        assert found.seconds in self.sizes, "what is returned was measured"
        assert len(self.sizes) <= TRIES
        return found


@pytest.mark.parametrize(
    ("needed", "best"),
    [
        (lambda s: 1e8 * s, 700),
        (lambda s: 3e9 + 1e8 * s, 670),
        (lambda s: 1e9 + 1e8 * s + 2e4 * s * s, 613.1),
        (lambda s: 1e9 + 1e8 * SHORTEST * (s // SHORTEST), 690),  # All utterances are equally long.
        (lambda s: 3e9 * s, 23.3),
        (lambda s: max(5e9, 2e7 * s), 3500),  # Small batches all need the same.
    ],
)
def test_what_the_line_says_is_found_in_few_steps(needed: Callable[[float], float], best: float) -> None:
    memory = Memory(needed)
    assert best / CLOSE / 1.03 <= memory.search().seconds <= best + SHORTEST
    assert len(memory.sizes) <= 6


@pytest.mark.parametrize("capacity", [66e9, 50e9, 20e9, 10e9, 6e9])
def test_memory_that_runs_out_below_the_limit_is_approached_from_below(capacity: float) -> None:
    memory = Memory(lambda s: 3e9 + 1e8 * s, capacity)
    best = (capacity - 3e9) / 1e8
    assert best / 1.12 <= memory.search().seconds <= best


def test_cudnn_may_have_its_own_words_for_it() -> None:
    memory = Memory(lambda s: 3e9 + 1e8 * s, 20e9)
    memory.message = "GET was unable to find an engine to execute this computation"
    assert 150 <= memory.search().seconds <= 170
    memory.capacity = 0.0  # Where no batch has fitted, they may mean a convolution that the GPU lacks.
    with pytest.raises(RuntimeError, match="unable to find an engine"):
        find_fitting(memory, LIMIT, SHORTEST, 1e6)


def test_noise_changes_little() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        memory = Memory(lambda s, rng=rng: (3e9 + 1e8 * s) * rng.uniform(0.99, 1.01))  # type: ignore[misc]
        assert 600 <= memory.search().seconds <= 680


def test_a_corpus_that_fits_whole_is_the_most() -> None:
    memory = Memory(lambda s: 1e9 + 1e6 * s)
    assert memory.search(most=1234.0).seconds == 1234.0
    assert Memory(lambda s: 1e9).search(most=SHORTEST).seconds == SHORTEST


def test_an_utterance_that_does_not_fit_alone() -> None:
    assert find_fitting(Memory(lambda s: 5e9 * s), LIMIT, SHORTEST, 1e6) is None
    assert find_fitting(Memory(lambda s: s, capacity=1), LIMIT, SHORTEST, 1e6) is None


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def damaged(seconds: float) -> int:
        raise ValueError("part-00003.parquet is damaged: out of memory")

    with pytest.raises(ValueError, match="part-00003"):
        find_fitting(damaged, LIMIT, SHORTEST, 1e6)


def test_plain_numbers() -> None:
    assert [plain(seconds) for seconds in (1234, 999.9, 123.4, 100, 99.99, 12.34, 1.27, 0.37)] == [
        *(1200, 995, 120, 100, 99.5, 12, 1.25, 0.37)
    ]


def test_no_plan_has_a_larger_batch() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(16_000, 320_000, 400)
    for seconds in (20.0, 33.3, 90.0, 5000.0):
        longest, most = (largest_batches(lengths, seconds) * 2)[:2]
        assert lengths[longest[0]] == lengths.max()
        padded = max(int(lengths[batch].max()) * len(batch) for batch in (longest, most))
        for epoch in range(4):
            plan = plan_epoch(
                lengths, batch_size=None, batch_seconds=seconds, world_size=1, accumulate=1, seed=0, epoch=epoch
            )
            for [[batch]] in plan:
                assert int(lengths[batch].max()) * len(batch) <= padded
                if lengths[batch].max() == lengths.max():
                    assert len(batch) <= len(longest)


def test_batches_below_a_switch_are_measured_too() -> None:
    lengths = np.array([10, 40, 20, 30, 25, 5]) * 16_000
    assert largest_batches(lengths, 60) == [[1], [3, 4]]
    assert largest_batches(lengths, 60, [22 * 16_000, 4 * 16_000, 99 * 16_000]) == [[1], [3, 4], [2, 0, 5]]
    assert largest_batches(lengths, 1) == [[1]], "an utterance may be longer than a batch"
    assert largest_batches(lengths, 1e6) == [[1, 3, 4, 2, 0, 5]]
