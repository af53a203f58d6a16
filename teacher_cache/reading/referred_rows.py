"""Audio of the utterances of a reader, from the audio store or the cache to which its cache refers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from ray_distill.teacher_cache.embedded_audio import DECODERS
from ray_distill.teacher_cache.reading.audio_place import holder_of
from ray_distill.teacher_cache.reading.local_copies import CommittedFile, LocalCopies
from ray_distill.teacher_cache.reading.shard_rows import ShardRows
from ray_distill.teacher_cache.reading.split_rows import SplitRows
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError, Part, parts_of


class ReferredRows:
    """Audio of utterances of a cache that does not hold it. Safe to use from several threads.

    Args:
        cache: The cache.
        split: Split of the utterances.
        utterances: The utterances, which may be in other shards there.
        local, local_gb: As for `CacheReader`.
        location: Where the audio is now. Default: the recorded place.

    Attributes:
        bytes: Total size of the files with the audio of the split.
        is_remote, prefers_window: Whether they are in an object store.

    Raises:
        CacheError: If there is no such audio, it is not the cache's, or it lacks an utterance or is not finished.
    """

    def __init__(
        self,
        cache: Cache,
        split: str,
        utterances: SplitRows,
        local: str | Path | None = None,
        local_gb: float | None = None,
        location: str | None = None,
    ) -> None:
        holder = holder_of(cache, location)
        self._part = parts_of(holder.spec, len(holder.layer_sets), split)[0]
        self._rows = ShardRows(holder, split, [self._part], local=local, local_gb=local_gb)
        self._places = utterances.ids.places_in(self._rows.utterances.ids)
        # The last is that of what is not there, at place -1.
        lengths = np.append(self._rows.utterances.num_samples, -1)
        if len(lost := np.flatnonzero(lengths[self._places] != utterances.num_samples)):
            raise CacheError(
                f"the audio at {holder.store.location} lacks utterance {utterances.ids[int(lost[0])]} of the cache at "
                f"{cache.store.location}; repair it with `ray-distill cache repair {holder.store.location}`"
            )
        self.bytes = self._rows.bytes
        self.is_remote = self.prefers_window = holder.store.local is None

    @property
    def bytes_read(self) -> int:
        """Number of bytes read so far."""
        return self._rows.bytes_read

    def waveform(self, index: int) -> np.ndarray:
        """Return the (S,) float32 waveform of an utterance. CacheError if its file is damaged."""
        place = int(self._places[index])
        (value,) = self._rows.values(place, self._part, ["audio"])
        return decoded(self._rows, place, self._part, value)

    def files(self, indices: Sequence[int]) -> list[tuple[LocalCopies, CommittedFile]]:
        """Return the files that the audio of some utterances is read from, each once, with the copies that fetch them."""
        assert self._rows.copies is not None
        return [(self._rows.copies, file) for file in self._rows.files(self._places[list(indices)].tolist(), None)]


def decoded(rows: ShardRows, index: int, part: Part, value: pa.Scalar) -> np.ndarray:
    """Return the (S,) float32 waveform of a value of the column ``audio``. CacheError if it is damaged."""
    try:
        waveform = DECODERS[rows.cache.spec.audio](value.as_buffer())
    except ValueError as error:
        raise rows.damaged(index, part, str(error)) from error
    if len(waveform) != rows.utterances.num_samples[index]:
        raise rows.damaged(index, part, "the audio does not have the planned length")
    return waveform
