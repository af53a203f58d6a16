"""Batches of an epoch, determined by the lengths of utterances, the seed, the epoch and the world size."""

from collections.abc import Sequence

import numpy as np

from ray_distill.teacher_cache.frames import SAMPLE_RATE

WINDOW_BATCHES = 50
"""Window in which utterances are sorted by length, in batches. A larger window saves padding, a smaller one shuffles better."""
LENGTH_NOISE = 0.02
"""Relative noise on lengths before sorting, so that batches differ between epochs."""


def cut_by_seconds(order: Sequence[int], num_samples: np.ndarray, batch_seconds: float) -> list[list[int]]:
    """Cut ``order`` into consecutive batches whose padded audio (longest utterance x rows) does not exceed a budget.

    Args:
        order: Indices into num_samples. Their order is kept.
        num_samples: (N,) integers, lengths of all utterances.
        batch_seconds: Budget in seconds. An utterance longer than it forms a batch of its own.
    """
    batches: list[list[int]] = []
    batch: list[int] = []
    longest = 0
    for index in order:
        longest_with = max(longest, int(num_samples[index]))
        if batch and longest_with * (len(batch) + 1) > batch_seconds * SAMPLE_RATE:
            batches.append(batch)
            batch, longest_with = [], int(num_samples[index])
        batch.append(index)
        longest = longest_with
    return [*batches, batch] if batch else batches


def plan_epoch(
    num_samples: np.ndarray,
    *,
    batch_size: int | None,
    batch_seconds: float | None,
    world_size: int,
    accumulate: int,
    seed: int,
    epoch: int,
) -> list[list[list[list[int]]]]:
    """Return the batches of one training epoch.

    Utterances are permuted by ``default_rng((seed, epoch))``, sorted by length (with LENGTH_NOISE) within windows of
    WINDOW_BATCHES batches and cut into batches, which are then shuffled. The last ``batches mod (world_size * accumulate)``
    batches are left out, because uneven numbers of batches per rank deadlock DDP; the shuffle makes them differ between
    epochs. If there are fewer batches than one optimiser step needs, they are repeated.

    Args:
        num_samples: (N,) lengths of all utterances.
        batch_size: Number of utterances per batch and rank, as published, or None.
        batch_seconds: Seconds of padded audio per batch and rank, or None. Exactly one of the two must be given.
        world_size: Number of ranks.
        accumulate: Number of batches per rank and optimiser step.
        seed: Seed of the run.
        epoch: Number of the epoch, 0-based.

    Returns:
        ``plan[step][micro][rank]``, a list of indices into num_samples.
    """
    assert (batch_size is None) != (batch_seconds is None)
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(num_samples))
    per_batch = batch_size or max(1, int(batch_seconds * SAMPLE_RATE / num_samples.mean()))  # type: ignore[operator]
    window = per_batch * WINDOW_BATCHES
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        members = order[start : start + window]
        # Without noise, every epoch would have the same batches if a window holds the whole split.
        nearly = num_samples[members] * rng.uniform(1 - LENGTH_NOISE, 1 + LENGTH_NOISE, len(members))
        members = members[np.argsort(nearly, kind="stable")]
        if batch_size is not None:
            batches += [members[i : i + batch_size].tolist() for i in range(0, len(members), batch_size)]
        else:
            assert batch_seconds is not None
            batches += cut_by_seconds(members.tolist(), num_samples, batch_seconds)
    batches = [batches[i] for i in rng.permutation(len(batches))]
    per_step = world_size * accumulate
    while len(batches) < per_step:
        batches += batches
    return [
        [batches[i + micro * world_size : i + (micro + 1) * world_size] for micro in range(accumulate)]
        for i in range(0, len(batches) - per_step + 1, per_step)
    ]
