"""The shard files that a cache lacks, found with arrays: a file becomes an object only when its shard is asked for."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ray_distill.teacher_cache.storage.cache import ShardFile


class MissingFiles(Mapping[int, "list[ShardFile]"]):
    """The files without a commit record, by the number of their shard, ascending. Shards without such files are not in it.

    Args:
        numbers: (K,) numbers of shards, ascending.
        absent: (K, P) bool, whether a shard lacks its first to P-th file.
        files: Function from a shard's number to its files.
    """

    def __init__(self, numbers: np.ndarray, absent: np.ndarray, files: "Callable[[int], list[ShardFile]]") -> None:
        some = absent.any(1)
        self._numbers, self._absent, self._files = numbers[some], absent[some], files

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers.tolist())

    def __contains__(self, number: object) -> bool:
        return self._position(number) is not None

    def __getitem__(self, number: int) -> "list[ShardFile]":
        position = self._position(number)
        if position is None:
            raise KeyError(number)
        return [file for file, absent in zip(self._files(number), self._absent[position], strict=False) if absent]

    def _position(self, number: object) -> int | None:
        if not isinstance(number, int):
            return None
        position = int(np.searchsorted(self._numbers, number))
        return position if position < len(self) and self._numbers[position] == number else None
