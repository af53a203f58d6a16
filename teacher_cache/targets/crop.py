"""Random crops of utterances with their targets and masks, determined by seed, epoch and utterance id."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ray_distill.teacher_cache.frames import FRAME_SAMPLES, num_frames
from ray_distill.teacher_cache.targets.target_batch import Batch


def crop_starts(ids: Sequence[str], num_samples: Sequence[int], longest: int, seed: int, epoch: int) -> list[int]:
    """Draw the frame at which the crop of each utterance starts, uniformly; 0 for utterances that are not longer.

    Args:
        ids: B utterance ids.
        num_samples: (B,) lengths of the utterances.
        longest: Samples of a crop.
        seed: Seed of the run.
        epoch: 0-based epoch.
    """
    starts = []
    for name, samples in zip(ids, num_samples, strict=True):
        digest = hashlib.sha256(f"crop/{seed}/{epoch}/{name}".encode()).digest()
        last = max(0, int(samples) - longest) // FRAME_SAMPLES
        starts.append(int(np.random.default_rng(int.from_bytes(digest[:8], "big")).integers(last + 1)))
    return starts


def crop_batch(batch: Batch, longest: int, seed: int, epoch: int) -> Batch:
    """Return a batch whose utterances have at most ``longest`` samples.

    Crops start at frames, so the frames of a crop are frames of the utterance, with the same samples. Targets and masks are cut
    to them. The targets remain those of the whole utterance, which the teacher attended to.

    Args:
        batch: A batch of 20 ms frames.
        longest, seed, epoch: As for `crop_starts`.
    """
    if int(batch.lengths.max()) <= longest:
        return batch
    starts = crop_starts(batch.ids, batch.lengths.tolist(), longest, seed, epoch)
    lengths, frames = batch.lengths.clamp(max=longest), batch.num_frames.clamp(max=num_frames(longest))
    count = int(frames.max())

    def cut(tensor: Tensor, axis: int, offsets: Sequence[int], size: int) -> Tensor:
        """Return for each row ``size`` entries of one of its axes, from the row's offset on."""
        return torch.stack([row.narrow(axis, offset, size) for row, offset in zip(tensor, offsets, strict=True)])

    coded = (
        cut(batch.coded, 1, starts, count)
        if isinstance(batch.coded, Tensor)
        else batch.coded.map(lambda codes: cut(codes, 0, starts, count))
    )
    return replace(
        batch,
        waveforms=cut(batch.waveforms, 0, [start * FRAME_SAMPLES for start in starts], int(lengths.max())),
        lengths=lengths,
        num_frames=frames,
        coded=coded,
        frame_mask=None if batch.frame_mask is None else cut(batch.frame_mask, 0, starts, count),
    )
