"""Which utterances go together: a pure function of lengths, seed, epoch and world size."""

from collections.abc import Sequence

import numpy as np

from ray_distill.teacher_cache.frames import SAMPLE_RATE

WINDOW_BATCHES = 50
"""Batches' worth of utterances that are sorted by length together: more saves padding, fewer shuffles better."""
LENGTH_NOISE = 0.02
"""Share of its length by which an utterance may be sorted wrongly, so that it meets others in each epoch."""


def cut_by_seconds(order: Sequence[int], num_samples: np.ndarray, batch_seconds: float) -> list[list[int]]:
    """Cuts ``order`` into consecutive batches whose padded audio (longest x rows) stays within the budget.

    Args:
        order: indices into num_samples, in the order to keep.
        num_samples: (N,) integers.
        batch_seconds: budget; an utterance longer than it gets a batch of its own.
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
    """The batches of one training epoch.

    Utterances are permuted by ``default_rng((seed, epoch))``, sorted by length (give or take LENGTH_NOISE) within windows of
    WINDOW_BATCHES batches, cut into batches, and the batches shuffled. The last ``batches mod (world_size * accumulate)`` are
    left out, so that every rank takes equally many (uneven loops deadlock DDP); being the last of a shuffle, they differ each
    epoch.
    Where there are fewer batches than one optimiser step needs, they are repeated to fill it.

    Args:
        num_samples: (N,) lengths.
        batch_size: utterances per batch and rank, as published; or None.
        batch_seconds: seconds of padded audio per batch and rank; or None. Exactly one of the two.
        world_size: number of ranks.
        accumulate: batches per rank and optimiser step.
        seed: of the run.
        epoch: 0-based.

    Returns:
        ``plan[step][micro][rank]``: list of indices into num_samples, for each optimiser step.
    """
    assert (batch_size is None) != (batch_seconds is None)
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(num_samples))
    per_batch = batch_size or max(1, int(batch_seconds * SAMPLE_RATE / num_samples.mean()))  # type: ignore[operator]
    window = per_batch * WINDOW_BATCHES
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        members = order[start : start + window]
        # Exact lengths would make the same batches each epoch where a window holds the whole split.
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
