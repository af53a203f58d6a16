"""Choice of the utterances that form a batch: the oldest, and those closest to it in length."""

from collections.abc import Callable, Sequence

MIN_FILL = 0.8
"""Least length of a row as a fraction of the longest in its batch. Shorter utterances wait for a batch with less padding."""


def choose_batch(
    lengths: Sequence[int], budget: int, may_join: Callable[[int], bool] = lambda index: True
) -> list[int]:
    """Return the indices of the next batch, the oldest utterance first.

    The oldest utterance is always included, so none starves. Others are added by similarity of length as long as the padded batch
    (rows times longest) stays within the budget. An utterance longer than the budget runs alone.

    Args:
        lengths: Samples of each waiting utterance, oldest first; at least one.
        budget: Samples of a padded batch.
        may_join: Called with the index of each utterance that fits; False keeps it out of the batch. Default: all may.
    """
    first = lengths[0]
    chosen, shortest, longest = [0], first, first
    for index in sorted(range(1, len(lengths)), key=lambda index: abs(lengths[index] - first)):
        low, high = min(shortest, lengths[index]), max(longest, lengths[index])
        if (len(chosen) + 1) * high > budget:
            break
        if low >= MIN_FILL * high and may_join(index):
            chosen.append(index)
            shortest, longest = low, high
    return chosen
