"""The utterances of one split of a plan as columns, because an object for each would take a kilobyte."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError

_COLUMNS = ("id", "split", "num_samples", "num_frames", "shard", "row")
_ITERATED = 4096


class TextColumn(Sequence[str]):
    """A sequence of texts in an Arrow array. It is equal to any sequence of the same texts."""

    def __init__(self, texts: pa.LargeStringArray) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> "list[str]": ...

    def __getitem__(self, index: int | slice) -> "str | list[str]":
        found = self._texts[index]
        text: str | list[str] = found.to_pylist() if isinstance(index, slice) else found.as_py()
        return text

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self._texts), _ITERATED):
            yield from self._texts.slice(start, _ITERATED).to_pylist()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return f"TextColumn({len(self)} texts)"

    def take(self, rows: np.ndarray) -> "TextColumn":
        """Return the texts of some rows (M,)."""
        return TextColumn(self._texts.take(pa.array(rows)))

    def joined(self, others: "TextColumn") -> "TextColumn":
        """Return these texts, then the others."""
        return TextColumn(pa.concat_arrays([self._texts, others._texts]))

    def places_in(self, others: "TextColumn") -> np.ndarray:
        """Return the (N,) int32 position of each text among others; -1 for those that are not there."""
        if self._texts.equals(others._texts):
            return np.arange(len(self), dtype=np.int32)
        places = pc.fill_null(pc.index_in(self._texts, value_set=others._texts), -1)
        found: np.ndarray = places.to_numpy()
        return found


@dataclass(frozen=True)
class SplitRows:
    """Utterances of a split, in the order of shards and rows.

    Attributes:
        ids: N ids.
        num_samples: (N,) int64 numbers of samples.
        num_frames: (N,) int64 numbers of frames.
        shard: (N,) int32 number of the shard of each.
        row: (N,) int32 row in its shard.
    """

    ids: TextColumn
    num_samples: np.ndarray
    num_frames: np.ndarray
    shard: np.ndarray
    row: np.ndarray

    @classmethod
    def of_table(cls, table: pa.Table) -> "SplitRows":
        """Return rows of a plan as columns."""
        ids = table["id"].cast(pa.large_string()).combine_chunks()
        ids = ids if isinstance(ids, pa.Array) else ids.chunk(0)
        return cls(TextColumn(ids), *(_numbers(table[name]) for name in ("num_samples", "num_frames", "shard", "row")))

    def of_shard(self, shard: int) -> list[str]:
        """Return the ids of a shard in the order of rows."""
        start, end = np.searchsorted(self.shard, [shard, shard + 1])
        return self.ids[int(start) : int(end)]

    def rows_among(self, ids: pa.LargeStringArray) -> pa.Int32Array:
        """Return the (N,) position of each utterance among ids; null for those that are not there."""
        return pc.index_in(self.ids._texts, value_set=ids)

    def without(self, failed: Sequence[str]) -> "SplitRows":
        """Return the utterances but those with one of these ids."""
        if not failed:
            return self
        kept = pc.invert(pc.is_in(self.ids._texts, pa.array(failed, pa.large_string())))
        mask = kept.to_numpy(zero_copy_only=False)
        columns = (self.num_samples, self.num_frames, self.shard, self.row)
        return SplitRows(TextColumn(self.ids._texts.filter(kept)), *(column[mask] for column in columns))


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column as an array of its own, so that it does not keep the table."""
    values: np.ndarray = column.to_numpy()
    return values.copy() if column.num_chunks == 1 else values  # Several chunks were copied together.


class PlanSplits(dict[str, SplitRows]):
    """The splits of a plan by their names. All readers of the plan share them as long as one of them holds them."""

    @classmethod
    def of(cls, cache: Cache, split: str) -> "PlanSplits":
        """Read a split of a cache's plan, and the splits of a training, because decoding the plan is most of the work.

        Raises:
            CacheError: If the cache has no such split, or its plan is damaged.
        """
        key = cache.record["plan"], len(cache.layer_sets), cache.spec.masks.draws
        if (found := _open_plans.get(key)) is not None and split in found:
            return found
        plan = cache.plan_columns(_COLUMNS)
        splits = cls()
        for name in dict.fromkeys((split, "train", "validation")):
            places = np.flatnonzero(pc.equal(plan["split"], name))
            if len(places):
                # As in every plan of this program: nothing has to be copied.
                together = places[-1] - places[0] == len(places) - 1
                splits[name] = SplitRows.of_table(plan.slice(places[0], len(places)) if together else plan.take(places))
            elif name == split:
                names = sorted(pc.unique(plan["split"]).to_pylist())
                raise CacheError(f"the cache at {cache.store.location} has no split {split!r}; it has {names}")
        _open_plans[key] = splits
        return splits


_open_plans: WeakValueDictionary[tuple[str, int, int], PlanSplits] = WeakValueDictionary()
"""The plans that a reader has open, by their SHA-256 and the numbers by which their size was checked. The caches of several teachers
mostly have the same plan."""
