"""The assignment of utterances to shards, computed with arrays, for corpora of many millions of utterances.

N is the number of utterances.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_BATCH = 1 << 13
"""Number of texts that are Python objects at a time."""


def hash_order(texts: pa.LargeStringArray, prefix: str = "") -> np.ndarray:
    """Return the (N,) int64 order that sorts texts by their SHA-256. Equal texts keep their order.

    Args:
        texts: The texts.
        prefix: Text before each of them. Default: none.
    """

    before = prefix.encode()

    def digest(text: str) -> bytes:
        return hashlib.sha256(before + text.encode()).digest()

    heads = np.empty(len(texts), np.uint64)
    for begin in range(0, len(texts), _BATCH):
        batch = texts[begin : begin + _BATCH].to_pylist()
        digests = b"".join([digest(text)[:8] for text in batch])
        heads[begin : begin + len(batch)] = np.frombuffer(digests, ">u8")
    order = np.argsort(heads, kind="stable")
    heads = heads[order]
    # Different texts with equal first halves of a hash are all but impossible. Their whole hashes decide.
    for begin, end in _runs(heads[1:] == heads[:-1]):
        members = order[begin:end]
        wholes = [digest(texts[member].as_py()) for member in members.tolist()]
        order[begin:end] = members[sorted(range(len(members)), key=wholes.__getitem__)]
    return order


def _runs(equal: np.ndarray) -> list[tuple[int, int]]:
    """Return the first element and the end of each run of equal neighbours, from (N - 1,) whether n equals n + 1."""
    edges = np.flatnonzero(np.diff(equal.astype(np.int8), prepend=0, append=0))
    return [(int(begin), int(end) + 1) for begin, end in edges.reshape(-1, 2)]


def assign_shards(
    ids: pa.LargeStringArray, splits: Sequence[str], split_of: np.ndarray, num_samples: np.ndarray, samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Assign utterances to shards; see `plan_shards`.

    Args:
        ids: N ids.
        splits: Names of the splits.
        split_of: (N,) position of each utterance's split among them.
        num_samples: (N,) int64 numbers of samples.
        samples: Maximum number of samples of a shard with more than one utterance.

    Returns:
        (N,) int64 positions of the utterances in the order of shards and rows, and (K,) int64 sizes of the K shards.
    """
    order, ranks = hash_order(ids), _ranks(ids)
    orders, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for split in sorted(range(len(splits)), key=splits.__getitem__):
        members = order[split_of[order] == split]
        counts = np.diff(_cut(num_samples[members], samples), prepend=0)
        shards = np.repeat(np.arange(len(counts)), counts)
        orders.append(members[np.lexsort((ranks[members], -num_samples[members], shards))])
        sizes.append(counts)
    return np.concatenate(orders), np.concatenate(sizes)


def _ranks(ids: pa.LargeStringArray) -> np.ndarray:
    """Return the (N,) positions of ids in their sorted order. Equal ids keep their order."""
    ranks = np.arange(len(ids))
    if not pc.all(pc.less_equal(ids[:-1], ids[1:])).as_py() and len(ids) > 1:
        ranks[pc.array_sort_indices(ids).to_numpy()] = np.arange(len(ids))
    return ranks


def _cut(num_samples: np.ndarray, samples: int) -> np.ndarray:
    """Return the ends of groups of successive utterances. A group with more than one has at most ``samples`` samples."""
    totals = np.cumsum(num_samples)
    ends: list[int] = []
    begin, before = 0, 0
    while begin < len(totals):
        begin = max(begin + 1, int(np.searchsorted(totals, before + samples, "right")))
        before = int(totals[begin - 1])
        ends.append(begin)
    return np.array(ends, np.int64)


def count_frames(num_samples: np.ndarray, num_frames: Callable[[int], int]) -> np.ndarray:
    """Return (N,) int64 numbers of frames for (N,) numbers of samples, from one call of a function for each different number."""
    values, places = np.unique(num_samples, return_inverse=True)
    return np.array([num_frames(value) for value in values.tolist()], np.int64)[places]
