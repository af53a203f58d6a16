"""The published distillation loss, counting real frames only."""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from teacher_cache.frames import padding_mask

_ERRORS = {"mse": F.mse_loss, "l1": F.l1_loss}


@dataclass
class DistillationLoss:
    """A loss and its parts, all differentiable scalars unless said otherwise.

    Attributes:
        total: hint + final.
        hint: weighted sum over the layers below the last.
        final: weighted loss of the last layer.
        per_layer: (L,) unweighted.
        mask_hint, unmask_hint: unweighted share of the hint layers from masked and unmasked frames; None without a mask.
        mask_final, unmask_final: the same of the last layer.
    """

    total: Tensor
    hint: Tensor
    final: Tensor
    per_layer: Tensor
    mask_hint: Tensor | None = None
    unmask_hint: Tensor | None = None
    mask_final: Tensor | None = None
    unmask_final: Tensor | None = None


def distillation_loss(
    projections: Tensor,
    targets: Tensor,
    num_frames: Tensor,
    frame_mask: Tensor | None = None,
    *,
    kind: Literal["mse", "l1"] = "mse",
    hint_weight: float = 0.1,
    final_weight: float = 1.0,
    normalizer: float | Tensor | None = None,
) -> DistillationLoss:
    """``hint_weight * sum_{l<L} m_l + final_weight * m_L``, m_l averaged over D, summed over frames, divided by frames.

    The published code counts padded frames too; here only real ones count. Without padding the two agree. With
    ``frame_mask=None`` and clean targets this is the published (unmasked) validation loss.

    Args:
        projections: (B, L, T, D) of the student's heads.
        targets: (B, L, T, D): composite targets of the draw, or clean ones.
        num_frames: (B,) real frames.
        frame_mask: (B, T) bool, only to split the loss into masked and unmasked frames.
        kind: squared or absolute error.
        hint_weight: published 0.1.
        final_weight: published 1.0.
        normalizer: frames to divide by; default this batch's real frames. Under DDP or accumulation give those of the
            whole step, and sum.

    Raises:
        ValueError: shapes that don't fit, or an unknown kind.
    """
    if projections.shape != targets.shape:
        raise ValueError(
            f"projections {tuple(projections.shape)} and targets {tuple(targets.shape)} must have one shape"
        )
    batch, _, frames, _ = projections.shape
    if num_frames.shape != (batch,):
        raise ValueError(f"num_frames must be {(batch,)}, not {tuple(num_frames.shape)}")
    if frame_mask is not None and frame_mask.shape != (batch, frames):
        raise ValueError(f"frame_mask must be {(batch, frames)}, not {tuple(frame_mask.shape)}")
    if kind not in _ERRORS:
        raise ValueError(f"the loss kind {kind!r} is not known; known kinds: {', '.join(_ERRORS)}")
    padded = padding_mask(num_frames, frames)
    divisor = num_frames.sum() if normalizer is None else normalizer
    # (B, L, T): each frame's error, averaged over D. The fused loss keeps its inputs for backward, not their difference.
    per_frame = _ERRORS[kind](projections.float(), targets.float(), reduction="none").mean(-1)
    per_frame = per_frame.masked_fill(padded[:, None], 0)
    per_layer = per_frame.sum((0, 2)) / divisor
    hint, final = hint_weight * per_layer[:-1].sum(), final_weight * per_layer[-1]
    loss = DistillationLoss(hint + final, hint, final, per_layer)
    if frame_mask is not None:
        masked = (per_frame * frame_mask[:, None]).detach().sum((0, 2)) / divisor
        unmasked = per_layer.detach() - masked
        loss.mask_hint, loss.mask_final = masked[:-1].sum(), masked[-1]
        loss.unmask_hint, loss.unmask_final = unmasked[:-1].sum(), unmasked[-1]
    return loss
