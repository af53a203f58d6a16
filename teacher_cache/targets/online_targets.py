"""Targets computed by the teacher during training, equal to those of a cache."""

from collections.abc import Sequence

import numpy as np
import torch

from ray_distill.teacher_cache.masks import MaskDraws
from ray_distill.teacher_cache.precision import Precision
from ray_distill.teacher_cache.source_audio import load_waveform
from ray_distill.teacher_cache.storage.cache_spec import Targets
from ray_distill.teacher_cache.storage.shard_plan import Utterance
from ray_distill.teacher_cache.targets.target_batch import Batch, pad_waveforms
from ray_distill.teacher_cache.teachers import Teacher


class OnlineReader:
    """A `TargetReader` that runs the teacher on every batch. Batches equal those of a cache, up to rounding.

    Args:
        utterances: Utterances of one split. They define the order of indices.
        teacher: Teacher, on the device on which it computes.
        masks: Policies and seed of the mask draws. Any draw can be read, unless ``masks.draws`` is 0.
        layers: 1-based layers. Default all.
        targets: Kind of targets, as in `CacheSpec.targets`. ``clean_only`` skips the masked pass; the other two give the
            same targets here. Default ``clean_and_masked``.
        precision: Precision of the teacher's arithmetic, as in `CacheSpec.precision`. Default ``fp32``.
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
    ) -> None:
        self.utterances = utterances
        self.num_samples = np.array([utterance.num_samples for utterance in utterances])
        self.num_frames = np.array([teacher.num_frames(utterance.num_samples) for utterance in utterances])
        self.layers = tuple(layers or range(1, teacher.num_layers + 1))
        self.dim = teacher.dim
        self._teacher = teacher
        self._masks = masks
        self._clean_only = targets == "clean_only"
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
        frames = teacher.num_frames(lengths)
        targets = teacher(waveforms, lengths, layers=layers, precision=precision)
        frame_mask = None
        if draw is not None:
            frame_mask = self._masks.frame_mask(draw, ids, frames.tolist()).to(teacher.device)
            if not self._clean_only:
                masked = teacher(waveforms, lengths, frame_mask, layers, precision=precision)
                targets = torch.where(frame_mask[:, None, :, None], targets, masked)
        return Batch(ids, waveforms, lengths, frames, targets, frame_mask)
