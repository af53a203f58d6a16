"""Batches of an epoch that read shard after shard: shards are shuffled, and utterances within a window over several shards."""

import numpy as np

from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.targets.batch_sampler import LENGTH_NOISE, WINDOW_BATCHES, cut_by_seconds

WINDOW_SHARDS = 16
"""Minimum number of shards in a window. More of them shuffle better, and need more room for local copies."""


def plan_window_epoch(
    num_samples: np.ndarray,
    shards: np.ndarray,
    *,
    batch_size: int | None,
    batch_seconds: float | None,
    world_size: int,
    accumulate: int,
    seed: int,
    epoch: int,
) -> list[list[list[list[int]]]]:
    """Return the batches of one training epoch, in an order for storage that is read in large pieces.

    Shards are permuted by ``default_rng((seed, epoch))``, and utterances within each. The sequence is cut into one lane for each
    batch of an optimiser step (``world_size * accumulate``), of equal numbers of utterances, and each lane into windows of at least
    WINDOW_SHARDS shards and WINDOW_BATCHES batches; the last one may be half as large again. Within a window, utterances are sorted
    by length (with LENGTH_NOISE) and cut into batches, which are shuffled. So a rank reads each shard once, apart from those at the
    ends of lanes and windows, and the utterances of an optimiser step depend only on the product ``world_size * accumulate``. Lanes
    with more batches than others give their last ones to those with fewer; the last ``batches mod lanes`` are left out.

    Args:
        num_samples: (N,) lengths of all utterances.
        shards: (N,) integers, the shard of each utterance.
        batch_size, batch_seconds, world_size, accumulate, seed, epoch: As for `plan_epoch`.

    Returns:
        ``plan[step][micro][rank]``, a list of indices into num_samples.
    """
    assert (batch_size is None) != (batch_seconds is None)
    rng = np.random.default_rng((seed, epoch))
    numbers, members = np.unique(shards, return_inverse=True)
    order = np.lexsort((rng.random(len(shards)), rng.permutation(len(numbers))[members]))
    per_batch = batch_size or max(1, int(batch_seconds * SAMPLE_RATE / num_samples.mean()))  # type: ignore[operator]
    # Whole batches, so that only the last batch of a lane can be smaller than others of a fixed number of utterances.
    window = per_batch * max(WINDOW_BATCHES, -(-WINDOW_SHARDS * len(shards) // (len(numbers) * per_batch)))
    lanes: list[list[list[int]]] = []
    for part in np.array_split(order, world_size * accumulate):
        lane: list[list[int]] = []
        count = max(1, round(len(part) / window))
        for chosen in np.split(part, range(window, window * count, window)):
            nearly = num_samples[chosen] * rng.uniform(1 - LENGTH_NOISE, 1 + LENGTH_NOISE, len(chosen))
            chosen = chosen[np.argsort(nearly, kind="stable")]
            if batch_size is not None:
                batches = [chosen[i : i + batch_size].tolist() for i in range(0, len(chosen), batch_size)]
            else:
                assert batch_seconds is not None
                batches = cut_by_seconds(chosen.tolist(), num_samples, batch_seconds)
            lane += [batches[i] for i in rng.permutation(len(batches))]
        lanes.append(lane)
    lanes = _level(lanes)
    return [
        [[lanes[micro * world_size + rank][step] for rank in range(world_size)] for micro in range(accumulate)]
        for step in range(len(lanes[0]))
    ]


def _level(lanes: list[list[list[int]]]) -> list[list[list[int]]]:
    """Give all lanes the same number of batches, at least one. If there are fewer batches than lanes, they are repeated."""
    steps = sum(map(len, lanes)) // len(lanes)
    if not steps:
        batches = [batch for lane in lanes for batch in lane]
        return [[batches[n % len(batches)]] for n in range(len(lanes))]
    spare = iter([batch for lane in lanes for batch in lane[steps:]])
    return [[*lane[:steps], *(next(spare) for _ in range(steps - len(lane)))] for lane in lanes]
