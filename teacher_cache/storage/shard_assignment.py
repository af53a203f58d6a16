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
_SORTED = 1 << 17
"""Number of utterances, beyond whole shards, that are sorted at a time."""


def hash_order(texts: pa.LargeStringArray, prefix: str = "") -> np.ndarray:
    """Return the (N,) int32 order that sorts texts by their SHA-256. Equal texts keep their order.

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
    order = np.argsort(heads, kind="stable").astype(np.int32)
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
        (N,) int32 positions of the utterances in the order of shards and rows, and (K,) int64 sizes of the K shards.
    """
    order, ranks = hash_order(ids), _ranks(ids)
    placed, sizes, begin = np.empty_like(order), [np.zeros(0, np.int64)], 0
    for split in sorted(range(len(splits)), key=splits.__getitem__):
        chosen = order[split_of[order] == split]
        members = placed[begin : begin + len(chosen)]
        members[:] = chosen
        ends = _cut(num_samples[members], samples)
        _sort_shards(members, ends, ranks, num_samples)
        sizes.append(np.diff(ends, prepend=0))
        begin += len(members)
    return placed, np.concatenate(sizes)


def _sort_shards(members: np.ndarray, ends: np.ndarray, ranks: np.ndarray | None, num_samples: np.ndarray) -> None:
    """Sort each shard of the (M,) positions of utterances in place: the longest first, and equal lengths by the ids.

    Args:
        members: (M,) positions of utterances, shard by shard.
        ends: (K,) ends of the shards among them.
        ranks: (N,) positions of the ids in their sorted order. None if they are sorted.
        num_samples: (N,) numbers of samples.
    """
    begin = 0
    while begin < len(members):
        last = min(int(np.searchsorted(ends, begin + _SORTED)), len(ends) - 1)
        end = int(ends[last])
        some = members[begin:end]
        shards = np.searchsorted(ends, np.arange(begin, end), "right")
        members[begin:end] = some[np.lexsort((some if ranks is None else ranks[some], -num_samples[some], shards))]
        begin = end


def _ranks(ids: pa.LargeStringArray) -> np.ndarray | None:
    """Return the (N,) int32 positions of ids in their sorted order, or None if they are sorted. Equal ids keep their order."""
    if len(ids) < 2 or pc.all(pc.less_equal(ids[:-1], ids[1:])).as_py():
        return None
    ranks = np.empty(len(ids), np.int32)
    ranks[pc.array_sort_indices(ids).to_numpy()] = np.arange(len(ids), dtype=np.int32)
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
    values = np.sort(pc.unique(pa.array(num_samples)).to_numpy())
    frames = np.array([num_frames(value) for value in values.tolist()], np.int64)
    counts = np.empty(len(num_samples), np.int64)
    for begin in range(0, len(counts), _SORTED):
        counts[begin : begin + _SORTED] = frames[np.searchsorted(values, num_samples[begin : begin + _SORTED])]
    return counts
