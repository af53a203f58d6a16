"""Which of the waiting utterances are run together: the oldest, and those most like it in length."""

from collections.abc import Sequence

LEAST_FILLED = 0.8
"""A row shorter than this part of its batch's longest waits for a better batch: it would be mostly padding."""


def choose_batch(lengths: Sequence[int], budget: int) -> list[int]:
    """Indices of the next batch, the oldest first.

    The oldest is always in it, so nobody starves. The others join in order of likeness, while the padded batch (rows times
    longest) stays within the budget. A single utterance over the budget runs alone.

    Args:
        lengths: samples of each waiting utterance, oldest first; at least one.
        budget: samples of a padded batch.
    """
    first = lengths[0]
    chosen, shortest, longest = [0], first, first
    for index in sorted(range(1, len(lengths)), key=lambda index: abs(lengths[index] - first)):
        low, high = min(shortest, lengths[index]), max(longest, lengths[index])
        if (len(chosen) + 1) * high > budget:
            break
        if low >= LEAST_FILLED * high:
            chosen.append(index)
            shortest, longest = low, high
    return chosen
