"""Masks that are drawn anew for each epoch, over the targets of the clean pass."""

from collections.abc import Sequence
from dataclasses import replace

from ray_distill.teacher_cache.masks import MaskDraws
from ray_distill.teacher_cache.targets.target_batch import Batch, TargetReader


class FreshMasks:
    """A `TargetReader` that gives another reader's clean targets with masks of any draw.

    Nothing masked is cached: the draw is the epoch, so no two epochs have the same masks. A mask depends on the policy, the seed, the
    epoch and the utterance's id only, and so neither on the batch nor on the number of workers nor on a restart.

    Args:
        reader: Reader with a clean pass.
        masks: Policies and seed of the masks. ``masks.draws`` is not used.
    """

    draws: int | None = None

    def __init__(self, reader: TargetReader, masks: MaskDraws) -> None:
        self.num_samples, self.num_frames = reader.num_samples, reader.num_frames
        self.layers, self.dim = reader.layers, reader.dim
        self.symbols = getattr(reader, "symbols", None)
        self.teachers = getattr(reader, "teachers", ())
        self.batches_at_once: int = getattr(reader, "batches_at_once", 1)
        self.shards = getattr(reader, "shards", None)
        self.prefers_window: bool = getattr(reader, "prefers_window", False)
        self.needs_window: bool = getattr(reader, "needs_window", False)
        self.read_ahead = getattr(reader, "read_ahead", None)
        self._reader, self._masks = reader, masks

    def __repr__(self) -> str:
        return f"FreshMasks({self._reader!r}, {self._masks.policy!r}, seed={self._masks.seed})"

    @property
    def bytes_read(self) -> int | None:
        """Number of bytes read so far; None if the reader does not count them."""
        return getattr(self._reader, "bytes_read", None)

    def read(self, indices: Sequence[int], draw: int | None) -> Batch:
        """See `TargetReader.read`."""
        batch = self._reader.read(indices, None)
        if draw is None:
            return batch
        mask = self._masks.frame_mask(draw, batch.ids, batch.num_frames.tolist())
        return replace(batch, frame_mask=mask.to(batch.waveforms.device))
