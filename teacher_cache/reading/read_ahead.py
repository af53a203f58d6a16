"""Fetching of the files of later batches while earlier ones are trained on."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # Training code that imports this works without Parquet.
    from ray_distill.teacher_cache.reading.local_copies import CommittedFile, LocalCopies


class ReadAhead:
    """Batches that will be read soon. Their files are fetched in the order in which batches are named, and kept until then.

    Args:
        files: Function that returns the files of a batch with the local copies that fetch them, given its utterances and mask draw.
    """

    def __init__(
        self, files: Callable[[Sequence[int], int | None], "Sequence[tuple[LocalCopies, CommittedFile]]"]
    ) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._expected: Counter[tuple[tuple[int, ...], int | None]] = Counter()

    def expect(self, indices: Sequence[int], draw: int | None) -> None:
        """Name a batch that will be read."""
        with self._lock:
            self._expected[tuple(indices), draw] += 1
        for copies, file in self._files(indices, draw):
            copies.want(file)

    def met(self, indices: Sequence[int], draw: int | None) -> None:
        """Tell that a batch was read. Nothing happens if it was not expected."""
        key = (tuple(indices), draw)
        with self._lock:
            count = self._expected.pop(key, 0)
            if not count:
                return
            if count > 1:
                self._expected[key] = count - 1
        for copies, file in self._files(indices, draw):
            copies.unwant(file)

    def clear(self) -> None:
        """Expect none of the batches any more."""
        for indices, draw in list(self._expected.elements()):
            self.met(indices, draw)


class SeveralReadAhead:
    """As `ReadAhead`, for batches that are read from several caches.

    Args:
        aheads: That of each cache; None for a cache without local copies.
        reads: Function that returns the reads of a batch: the number of the cache, and the rows of its reader.
    """

    def __init__(
        self,
        aheads: Sequence[ReadAhead | None],
        reads: Callable[[Sequence[int]], Iterable[tuple[int, Sequence[int]]]],
    ) -> None:
        self._aheads, self._reads = aheads, reads

    def expect(self, indices: Sequence[int], draw: int | None) -> None:
        """Name a batch that will be read."""
        for number, rows in self._reads(indices):
            if (ahead := self._aheads[number]) is not None:
                ahead.expect(rows, draw)

    def clear(self) -> None:
        """Expect none of the batches any more."""
        for ahead in self._aheads:
            if ahead is not None:
                ahead.clear()
