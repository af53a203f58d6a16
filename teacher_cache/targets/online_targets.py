"""Targets computed by the teacher during training, equal to those of a cache."""

from collections.abc import Sequence

import numpy as np
import torch

from ray_distill.teacher_cache.frames import FRAME_RATE, num_frames
from ray_distill.teacher_cache.masks import MaskDraws
from ray_distill.teacher_cache.precision import Precision
from ray_distill.teacher_cache.source_audio import load_waveform
from ray_distill.teacher_cache.storage.cache_spec import Targets
from ray_distill.teacher_cache.storage.shard_plan import Utterance
from ray_distill.teacher_cache.targets.frame_rate import (
    FrameRule,
    check_masked,
    check_rule,
    map_frames,
    spread_mask,
)
from ray_distill.teacher_cache.targets.target_batch import Batch, pad_waveforms
from ray_distill.teacher_cache.teachers import Teacher


class OnlineReader:
    """A `TargetReader` that runs the teacher on every batch. Batches equal those of a cache, up to rounding.

    Args:
        utterances: Utterances of one split. They define the order of indices.
        teacher: Teacher, on the device on which it computes.
        masks: Policies and seed of the mask draws. Any draw can be read, unless ``masks.draws`` is 0.
        layers: 1-based layers. Default all.
        targets: Kind of targets, as in `CacheSpec.targets`. ``clean_only`` skips the masked pass, and ``masked_everywhere`` the
            clean one; the other two give the same targets here. Default ``clean_and_masked``.
        precision: Precision of the teacher's arithmetic, as in `CacheSpec.precision`. Default ``fp32``.
        frames: How frames of another rate than 50 become those of a student, as for `StudentFrames`. Default None: ``average``.

    Raises:
        ValueError: The teacher's frames can't be averaged, or can't have exact masked targets.
    """

    draws: int | None = None

    def __init__(
        self,
        utterances: Sequence[Utterance],
        teacher: Teacher,
        masks: MaskDraws,
        layers: Sequence[int] | None = None,
        targets: Targets = "clean_and_masked",
        precision: Precision = "fp32",
        frames: FrameRule | None = None,
    ) -> None:
        self.utterances = utterances
        self.num_samples = np.array([utterance.num_samples for utterance in utterances])
        self._rate = FRAME_RATE if teacher.patches is not None else teacher.frame_rate
        self._rule = check_rule(self._rate, frames, discrete=False)
        if masks.draws and targets != "clean_only":
            check_masked(teacher.name, self._rate)
        counted = teacher.num_frames if self._rate == FRAME_RATE else num_frames
        self.num_frames = np.array([counted(utterance.num_samples) for utterance in utterances])
        self.layers = tuple(layers or range(1, teacher.num_layers + 1))
        self.dim = teacher.dim
        self._teacher = teacher
        self._masks = masks
        self._targets = targets
        self._precision: Precision = precision
        if masks.draws == 0:
            self.draws = 0

    def __repr__(self) -> str:
        return f"OnlineReader({len(self.utterances)} utterances, {self._teacher!r}, precision={self._precision!r})"

    def read(self, indices: Sequence[int], draw: int | None) -> Batch:
        """See `TargetReader.read`. All tensors are on the teacher's device."""
        members = [self.utterances[i] for i in indices]
        ids = [utterance.id for utterance in members]
        teacher, layers, precision = self._teacher, self.layers, self._precision
        waveforms, lengths = pad_waveforms([load_waveform(utterance) for utterance in members])
        waveforms, lengths = waveforms.to(teacher.device), lengths.to(teacher.device)
        theirs = teacher.num_frames(lengths)
        frames = theirs if self._rate == FRAME_RATE else num_frames(lengths)
        frame_mask = mask = None
        if draw is not None:
            frame_mask = mask = self._masks.frame_mask(draw, ids, frames.tolist()).to(teacher.device)
            if self._targets == "clean_only":
                mask = None
            elif self._rate != FRAME_RATE:
                spread = spread_mask(frame_mask.cpu(), self._rate, frames.tolist(), theirs.tolist())
                mask = spread.to(teacher.device)
        targets = teacher(waveforms, lengths, mask, layers, precision=precision)
        if mask is not None and self._targets != "masked_everywhere":
            clean = teacher(waveforms, lengths, layers=layers, precision=precision)
            targets = torch.where(mask[:, None, :, None], clean, targets)
        if self._rate != FRAME_RATE:
            whole = targets.new_zeros(*targets.shape[:2], int(frames.max()), self.dim)
            for row, found, count, available in zip(whole, targets, frames.tolist(), theirs.tolist(), strict=True):
                row[:, :count] = map_frames(found[:, :available], self._rate, self._rule, count)
            targets = whole
        return Batch(ids, waveforms, lengths, frames, targets, frame_mask)
