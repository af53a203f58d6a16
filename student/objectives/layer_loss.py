"""The published distillation loss over real frames, for all layers at once and for a single head."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_distill.student.objectives.objective import DistillationLoss, ErrorKind, check_kind
from ray_distill.teacher_cache.frames import padding_mask

_ERRORS = {"mse": F.mse_loss, "l1": F.l1_loss}

CosineTerm = Literal["log_sigmoid", "plain"]
"""Second term of a layer's error: ``-log sigmoid(cos)`` (DistilHuBERT, USAD) or ``1 - cos`` (DPHuBERT)."""


def distillation_loss(
    projections: Tensor,
    targets: Tensor,
    num_frames: Tensor,
    frame_mask: Tensor | None = None,
    *,
    kind: ErrorKind = "mse",
    hint_weight: float = 0.1,
    final_weight: float = 1.0,
    cosine_weight: float = 0.0,
    cosine_term: CosineTerm = "log_sigmoid",
    frame_weights: tuple[float, float] = (1.0, 1.0),
    hints: Sequence[bool] | None = None,
    count_padding: bool = False,
    normalizer: float | Tensor | None = None,
) -> DistillationLoss:
    """Return ``hint_weight * sum_{l<L} m_l + final_weight * m_L``.

    m_l is the error of layer l, averaged over D, summed over frames and divided by the number of frames. The published code
    counts padded frames too; here only real frames count, unless ``count_padding`` is set. Without padding both agree. With
    ``frame_mask=None`` and clean targets this is the published (unmasked) validation loss. `LayerDistiller` computes the
    same with less memory.

    Args:
        projections: (B, L, T, D) float, outputs of the student's heads.
        targets: (B, L, T, D) float, composite targets of the mask draw, or clean targets.
        num_frames: (B,) integer, real frames.
        frame_mask: (B, T) bool, True at masked frames; only used for ``frame_weights``, and to split the loss into masked and
            unmasked frames.
        kind: Squared or absolute error. Default ``mse``.
        hint_weight: Weight of the layers below the last. Default 0.1, as published.
        final_weight: Weight of the last layer. Default 1.0, as published.
        cosine_weight: Weight, in each m_l, of the second term, a function of cos(projection, target) (in DistilHuBERT 1). Default 0.
        cosine_term: The second term; see `cosine_error`. Default ``log_sigmoid``.
        frame_weights: Weights of the errors of masked and of unmasked frames. The number of frames to divide by does not change.
            Default (1, 1). Without masks they have no effect.
        hints: For each layer below the last, whether it takes part in the hint. Default: all do. ``per_layer`` and the
            contributions by mask always include all layers.
        count_padding: Whether to count padded frames, in the sum and in the number of frames, as the published code does.
            Both tensors must then hold meaningful values there. Default False.
        normalizer: Number of frames to divide by. Default: the real frames of this batch (all frames with
            ``count_padding``). With DDP or gradient accumulation, give the frames of the whole step and sum the losses.

    Raises:
        ValueError: a shape that does not fit, or an unknown kind.
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
    check_kind(kind)
    if count_padding:
        num_frames = torch.full_like(num_frames, frames)
    padded = padding_mask(num_frames, frames)
    divisor = num_frames.sum() if normalizer is None else normalizer
    # (B, L, T): each frame's error, averaged over D. The fused loss saves its inputs for backward, not their difference.
    per_frame = _ERRORS[kind](projections.float(), targets.float(), reduction="none").mean(-1)
    if cosine_weight:
        cosines = F.cosine_similarity(projections.float(), targets.float(), -1)
        per_frame = per_frame + cosine_weight * cosine_error(cosines, cosine_term)
    per_frame = per_frame.masked_fill(padded[:, None], 0)
    if (weights := weights_of_frames(frame_mask, frame_weights)) is not None:
        per_frame = per_frame * weights[:, None]
    per_layer = per_frame.sum((0, 2)) / divisor
    return combine_layers(per_layer, per_frame.detach(), frame_mask, divisor, hint_weight, final_weight, hints)


def cosine_error(cosines: Tensor, term: CosineTerm) -> Tensor:
    """Return the second term of each frame's error for cosine similarities of any shape: 0 or more, and 1 - cos for ``plain``.

    DPHuBERT minimises -cos. The 1 changes no gradient, and keeps losses positive, as charts and comparisons expect.
    """
    return 1 - cosines if term == "plain" else -F.logsigmoid(cosines)


def weights_of_frames(frame_mask: Tensor | None, frame_weights: tuple[float, float]) -> Tensor | None:
    """Return the (B, T) weight of each frame, or None if all are 1: without masks, or with equal weights of 1."""
    if frame_mask is None or frame_weights == (1, 1):
        return None
    masked, unmasked = frame_weights
    return torch.where(frame_mask, masked, unmasked)


def combine_layers(
    per_layer: Tensor,
    per_frame: Tensor,
    frame_mask: Tensor | None,
    divisor: float | Tensor,
    hint_weight: float,
    final_weight: float,
    hints: Sequence[bool] | None,
) -> DistillationLoss:
    """Combine the layers' losses (L,) and the frames' errors (B, L, T) into a loss; see `distillation_loss`."""
    hint_losses = per_layer[:-1]
    if hints is not None:
        if len(hints) != len(hint_losses):
            raise ValueError(
                f"hints has {len(hints)} entries for {len(hint_losses)} layers below the last; give one for each"
            )
        # Unused layers are multiplied by 0 and stay in the graph, because DDP waits for the gradient of each head.
        used = torch.tensor(hints, dtype=hint_losses.dtype).to(hint_losses.device, non_blocking=True)
        hint_losses = hint_losses * used
    hint, final = hint_weight * hint_losses.sum(), final_weight * per_layer[-1]
    loss = DistillationLoss(hint + final, hint, final, per_layer)
    if frame_mask is not None:
        masked = (per_frame * frame_mask[:, None]).sum((0, 2)) / divisor
        unmasked = per_layer.detach() - masked
        loss.mask_hint, loss.mask_final = masked[:-1].sum(), masked[-1]
        loss.unmask_hint, loss.unmask_final = unmasked[:-1].sum(), unmasked[-1]
    return loss


def head_loss(
    x: Tensor,
    head: nn.Module,
    targets: Tensor,
    padded: Tensor,
    kind: ErrorKind,
    cosines: bool,
    cosine_weight: float = 0.0,
    cosine_term: CosineTerm = "log_sigmoid",
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of one layer, with the same numbers as the head followed by `distillation_loss`.

    Args:
        x: (B, T, d) float, input of the head.
        head: A linear layer, or the identity.
        targets: (B, T, D) float.
        padded: (B, T) bool, True at padding.
        kind: Squared or absolute error.
        cosines: Whether to compute cosine similarities.
        cosine_weight: Weight of the cosine term in the error. Default 0.
        cosine_term: The cosine term; see `cosine_error`. Default ``log_sigmoid``.
        weights: (B, T) float, weight of each frame's error. Default None: 1.

    Returns:
        () float, sum of the errors of real frames; then, without gradients, (B, T) error of each real frame averaged over
        D, weighted, and (B, T) cosine similarities, or an empty tensor if they were not requested.
    """
    projections, targets = head(x).float(), targets.float()
    # Targets may hold anything at padding, NaN included, which must not reach the gradients.
    error = (projections - targets).masked_fill(padded[..., None], 0)
    per_frame = (error.square() if kind == "mse" else error.abs()).mean(-1)
    similarities = x.new_empty(0)
    if cosine_weight:
        padded_rows = padded[..., None]
        similarities = F.cosine_similarity(
            projections.masked_fill(padded_rows, 0), targets.masked_fill(padded_rows, 0), -1
        )
        per_frame = per_frame + cosine_weight * cosine_error(similarities, cosine_term).masked_fill(padded, 0)
    elif cosines:
        similarities = F.cosine_similarity(projections.detach(), targets, -1)
    if weights is not None:
        per_frame = per_frame * weights
    return per_frame.sum(), per_frame.detach(), similarities.detach()
