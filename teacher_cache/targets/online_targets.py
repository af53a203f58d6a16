"""The teacher in the loop: targets computed anew each time, batch for batch what a cache would give."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.embedded_audio import quantize
from ray_distill.teacher_cache.masks import draw_mask
from ray_distill.teacher_cache.storage.cache_spec import MaskDraws, Targets
from ray_distill.teacher_cache.storage.shard_plan import Utterance
from ray_distill.teacher_cache.targets.target_batch import Batch, pad_waveforms
from ray_distill.teacher_cache.teachers import Teacher


class OnlineReader:
    """The same batches as a cache would give, from the teacher itself.

    Args:
        utterances: of one split; index order is theirs.
        teacher: on the device it is to run on.
        masks: policies and seed of the draws; with ``draws`` 0 there are none, else one more for each epoch.
        layers: 1-based layers; default all.
        targets: as `CacheSpec.targets`: ``clean_only`` leaves out the masked pass, the others mean the same here. Default
            ``clean_and_masked``.
    """

    draws: int | None = None

    def __init__(
        self,
        utterances: Sequence[Utterance],
        teacher: Teacher,
        masks: MaskDraws,
        layers: Sequence[int] | None = None,
        targets: Targets = "clean_and_masked",
    ) -> None:
        self.utterances = utterances
        self.num_samples = np.array([utterance.num_samples for utterance in utterances])
        self.num_frames = np.array([teacher.num_frames(utterance.num_samples) for utterance in utterances])
        self.layers = tuple(layers or range(1, teacher.num_layers + 1))
        self.dim = teacher.dim
        self._teacher = teacher
        self._masks = masks
        self._clean_only = targets == "clean_only"
        if masks.draws == 0:
            self.draws = 0

    def read(self, indices: Sequence[int], draw: int | None) -> Batch:
        """See TargetReader; all tensors are on the teacher's device."""
        members = [self.utterances[i] for i in indices]
        waveforms, lengths = pad_waveforms([load_source(utterance) for utterance in members])
        device = self._teacher.device
        waveforms, lengths = waveforms.to(device), lengths.to(device)
        frames = self._teacher.num_frames(lengths)
        targets = self._teacher.hidden_states(waveforms, lengths, layers=self.layers)
        frame_mask = None
        if draw is not None:
            frame_mask = masks_of(self._masks, draw, [u.id for u in members], frames.tolist()).to(device)
            if not self._clean_only:
                masked = self._teacher.hidden_states(waveforms, lengths, frame_mask, layers=self.layers)
                targets = torch.where(frame_mask[:, None, :, None], targets, masked)
        return Batch([u.id for u in members], waveforms, lengths, frames, targets, frame_mask)


def masks_of(masks: MaskDraws, draw: int, ids: Sequence[str], frames: Sequence[int]) -> Tensor:
    """(B, T) bool: each utterance's own mask of this draw, False at padding."""
    out = torch.zeros(len(ids), max(frames), dtype=torch.bool)
    policy = masks.policy_of(draw)
    for row, utterance_id, count in zip(out, ids, frames, strict=True):
        row[:count] = torch.from_numpy(draw_mask(policy, masks.seed, draw, utterance_id, count))
    return out


def load_source(utterance: Utterance) -> np.ndarray:
    """(S,) float32 of an utterance as teachers and students hear it.

    Raises:
        ValueError: the file can't be decoded, or is not the one that was indexed.
    """
    waveform = load_audio(Path(utterance.path))
    if hashlib.sha256(waveform.tobytes()).hexdigest() != utterance.sha256:
        raise ValueError(f"{utterance.path} changed since the corpus was indexed; run the index stage again")
    return quantize(waveform)
