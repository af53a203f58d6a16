"""Targets of a cache at frames of 20 ms, for a teacher with another frame rate."""

from collections.abc import Sequence
from typing import Any

import torch

from ray_distill.teacher_cache.frames import FRAME_RATE, num_frames
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache_spec import CacheError
from ray_distill.teacher_cache.targets.frame_rate import (
    FrameRule,
    check_counts,
    check_masked,
    check_rule,
    spread_mask,
    teacher_positions,
)
from ray_distill.teacher_cache.targets.target_batch import Batch, CodedTargets


class StudentFrames:
    """A `TargetReader` of a cache whose frames become those of a student when they are read; the cache keeps the teacher's.

    Args:
        reader: Reader of the cache.
        rule: How frames are mapped; see `ray_distill.teacher_cache.targets.frame_rate`. Default None: ``average``, and
            ``nearest`` for discrete targets.

    Attributes:
        reader: Reader of the cache.
        rule: How frames are mapped.
        num_frames: (N,) int64 numbers of frames of 20 ms.
        cache, ids, planned_ids, failed, split, num_samples, layers, dim, draws, symbols, codecs, shards, prefers_window, needs_window,
            local_share, read_ahead, batches_at_once: As for `CacheReader`.

    Raises:
        CacheError: Symbols or so many frames can't be averaged, the cache has masked targets that can't be exact at its frame
            rate, or an utterance has too many or too few frames.
    """

    def __init__(self, reader: CacheReader, rule: FrameRule | None = None) -> None:
        spec, place = reader.cache.spec, reader.cache.store.location
        self.reader, self._rate = reader, spec.rate
        self.cache, self.ids, self.failed, self.split = reader.cache, reader.ids, reader.failed, reader.split
        self.planned_ids, self.num_samples = reader.planned_ids, reader.num_samples
        self.layers, self.dim, self.draws = reader.layers, reader.dim, reader.draws
        self.symbols, self.codecs, self.shards = reader.symbols, reader.codecs, reader.shards
        self.prefers_window, self.needs_window = reader.prefers_window, reader.needs_window
        self.local_share = reader.local_share
        self.read_ahead, self.batches_at_once = reader.read_ahead, reader.batches_at_once
        self.num_frames = num_frames(torch.from_numpy(reader.num_samples)).numpy()
        self._masked = bool(reader.draws) and reader.targets != "clean_only"
        try:
            self.rule = check_rule(self._rate, rule, discrete=reader.symbols is not None)
            check_counts(self._rate, reader.num_samples, reader.num_frames)
        except ValueError as error:
            raise CacheError(f"the cache at {place} can't be read: {error}") from error
        if self._masked:
            check_masked(f"the teacher of the cache at {place}", self._rate)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"StudentFrames({self.reader!r}, rule={self.rule!r})"

    @property
    def bytes_read(self) -> int:
        """Number of bytes read from shard files so far."""
        return self.reader.bytes_read

    def read(self, indices: Sequence[int], draw: int | None, *, audio: bool = True) -> Batch:
        """Return a padded batch; see `CacheReader.read`.

        Raises:
            CacheError: As for `CacheReader.read`, or the cache's masks are not those of its policy and seed.
        """
        batch = self.reader.read(indices, draw, audio=audio)
        rows = list(indices)
        counts, available = self.num_frames[rows].tolist(), batch.num_frames.tolist()
        positions = [teacher_positions(self._rate, self.rule, *pair) for pair in zip(counts, available, strict=True)]
        coded = batch.coded
        assert isinstance(coded, CodedTargets)
        columns = []
        for codec, codes in coded.columns:
            mapped = codes.new_zeros(len(rows), max(counts), positions[0].shape[1] * codes.shape[2])
            for row, found, chosen in zip(mapped, codes, positions, strict=True):
                row[: len(chosen)] = found[torch.from_numpy(chosen)].flatten(1)
            columns.append((codec, mapped))
        mask = None
        if draw is not None:
            mask = self.cache.spec.masks.frame_mask(draw, batch.ids, counts)
            if self._masked and not torch.equal(spread_mask(mask, self._rate, counts, available), _given(batch)):
                raise CacheError(
                    f"the cache at {self.cache.store.location} has masks that are not those of its policy and seed; build it again"
                )
        return Batch(
            batch.ids,
            batch.waveforms,
            batch.lengths,
            torch.tensor(counts),
            CodedTargets(coded.layers, tuple(columns), positions[0].shape[1]),
            mask,
        )


def _given(batch: Batch) -> torch.Tensor:
    assert batch.frame_mask is not None
    return batch.frame_mask


def open_reader(
    location: str, split: str, *arguments: Any, frames: FrameRule | None = None, **options: Any
) -> "SplitReader":
    """Return a reader of a split of a cache at frames of 20 ms, or at patches of a spectrogram.

    Args:
        location, split, arguments, options: As for `CacheReader`.
        frames: How frames of another rate are mapped; see `StudentFrames`. Frames of 20 ms remain what they are.
    """
    reader = CacheReader(location, split, *arguments, **options)
    return reader if reader.cache.spec.rate == FRAME_RATE else StudentFrames(reader, frames)


SplitReader = CacheReader | StudentFrames
"""A reader of one split of one cache."""
