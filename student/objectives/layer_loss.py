"""The published distillation loss, counting real frames only, and a student with its loss as one module."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ray_distill.student.model.student import Student
from ray_distill.student.training.spec_augment import SpecAugment, augmentation
from ray_distill.teacher_cache.frames import padding_mask

Kind = Literal["mse", "l1"]

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
        cosines: (2, L + 1) float64, from a `Distiller` that was asked for them: for masked, then for unmasked frames, each
            layer's cosine similarity of projections and targets summed over frames, and the number of frames. Sums of
            batches and ranks can be added up. Not differentiable.
    """

    total: Tensor
    hint: Tensor
    final: Tensor
    per_layer: Tensor
    mask_hint: Tensor | None = None
    unmask_hint: Tensor | None = None
    mask_final: Tensor | None = None
    unmask_final: Tensor | None = None
    cosines: Tensor | None = None


def distillation_loss(
    projections: Tensor,
    targets: Tensor,
    num_frames: Tensor,
    frame_mask: Tensor | None = None,
    *,
    kind: Kind = "mse",
    hint_weight: float = 0.1,
    final_weight: float = 1.0,
    cosine_weight: float = 0.0,
    hints: Sequence[bool] | None = None,
    count_padding: bool = False,
    normalizer: float | Tensor | None = None,
) -> DistillationLoss:
    """``hint_weight * sum_{l<L} m_l + final_weight * m_L``, m_l averaged over D, summed over frames, divided by frames.

    The published code counts padded frames too; here only real ones count, unless asked. Without padding the two agree. With
    ``frame_mask=None`` and clean targets this is the published (unmasked) validation loss. `Distiller` gives the same for
    less memory.

    Args:
        projections: (B, L, T, D) of the student's heads.
        targets: (B, L, T, D): composite targets of the draw, or clean ones.
        num_frames: (B,) real frames.
        frame_mask: (B, T) bool, only to split the loss into masked and unmasked frames.
        kind: squared or absolute error.
        hint_weight: published 0.1.
        final_weight: published 1.0.
        cosine_weight: m_l also has this times ``-log sigmoid(cos(projection, target))``: DistilHuBERT's second term, there 1.
        hints: for each layer below the last, whether it takes part in the hint; None: all do. ``per_layer`` and the shares by
            mask keep all.
        count_padding: count padded frames as the published code does, in the sum and in what it is divided by. What both tensors
            hold there must then mean something.
        normalizer: frames to divide by; default this batch's real frames (all, with count_padding). Under DDP or accumulation
            give those of the whole step, and sum.

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
    check_kind(kind)
    if count_padding:
        num_frames = torch.full_like(num_frames, frames)
    padded = padding_mask(num_frames, frames)
    divisor = num_frames.sum() if normalizer is None else normalizer
    # (B, L, T): each frame's error, averaged over D. The fused loss keeps its inputs for backward, not their difference.
    per_frame = _ERRORS[kind](projections.float(), targets.float(), reduction="none").mean(-1)
    if cosine_weight:
        cosines = F.cosine_similarity(projections.float(), targets.float(), -1)
        per_frame = per_frame - cosine_weight * F.logsigmoid(cosines)
    per_frame = per_frame.masked_fill(padded[:, None], 0)
    per_layer = per_frame.sum((0, 2)) / divisor
    return _weighted(per_layer, per_frame.detach(), frame_mask, divisor, hint_weight, final_weight, hints)


def check_kind(kind: str) -> None:
    """Raises ValueError where it is no known kind of error."""
    if kind not in get_args(Kind):
        raise ValueError(f"the loss kind {kind!r} is not known; known kinds: {', '.join(get_args(Kind))}")


def _weighted(
    per_layer: Tensor,
    per_frame: Tensor,
    frame_mask: Tensor | None,
    divisor: float | Tensor,
    hint_weight: float,
    final_weight: float,
    hints: Sequence[bool] | None,
) -> DistillationLoss:
    chosen = per_layer[:-1]
    if hints is not None:  # Layers left out stay in the graph: distributed training waits for each head's gradient.
        if len(hints) != len(chosen):
            raise ValueError(
                f"hints has {len(hints)} entries for {len(chosen)} layers below the last; give one for each"
            )
        chosen = chosen * torch.tensor(hints, dtype=chosen.dtype).to(chosen.device, non_blocking=True)
    hint, final = hint_weight * chosen.sum(), final_weight * per_layer[-1]
    loss = DistillationLoss(hint + final, hint, final, per_layer)
    if frame_mask is not None:
        masked = (per_frame * frame_mask[:, None]).sum((0, 2)) / divisor
        unmasked = per_layer.detach() - masked
        loss.mask_hint, loss.mask_final = masked[:-1].sum(), masked[-1]
        loss.unmask_hint, loss.unmask_final = unmasked[:-1].sum(), unmasked[-1]
    return loss


class Distiller(nn.Module):
    """A student and its `distillation_loss` in one forward: what training puts in DDP.

    It gives the same numbers as the two apart, a layer at a time: each head's projections and errors are gone once their loss
    and gradients are known, so that no (B, L, T, D) tensor stands beside the targets.

    Args:
        student: whose parameters (under ``student.``) are all this module's.
        kind, hint_weight, final_weight, cosine_weight: as `distillation_loss` takes them.
        spec_augment: what is done to the student's features in training mode; None does nothing.

    Raises:
        ValueError: an unknown kind.

    Example:
        >>> distiller = Distiller(Student(StudentConfig()))
        >>> waveforms, lengths = torch.randn(2, 16_000), torch.tensor([16_000, 12_000])
        >>> distiller(waveforms, lengths, None, torch.randn(2, 12, 49, 768)).total.backward()
    """

    def __init__(
        self,
        student: Student,
        *,
        kind: Kind = "mse",
        hint_weight: float = 0.1,
        final_weight: float = 1.0,
        cosine_weight: float = 0.0,
        spec_augment: SpecAugment | None = None,
    ) -> None:
        super().__init__()
        check_kind(kind)
        self.student = student
        self.kind, self.hint_weight, self.final_weight, self.cosine_weight = (
            kind,
            hint_weight,
            final_weight,
            cosine_weight,
        )
        self.spec_augment = spec_augment

    def forward(
        self,
        waveforms: Tensor,
        lengths: Tensor,
        frame_mask: Tensor | None,
        targets: Tensor,
        normalizer: float | Tensor | None = None,
        *,
        hints: Sequence[bool] | None = None,
        cosines: bool = False,
    ) -> DistillationLoss:
        """The loss of a batch.

        Args:
            waveforms, lengths, frame_mask: as `Student.forward` takes them.
            targets, normalizer, hints: as `distillation_loss` takes them.
            cosines: whether cosine similarities are wanted too.

        Raises:
            ValueError: shapes that don't fit.
        """
        augment = augmentation(self.spec_augment, self.training)
        _, seen, num_frames = self.student.layer_outputs(waveforms, lengths, frame_mask, augment)
        expected = (len(waveforms), len(seen), seen[0].shape[1], self.student.config.target_dim)
        if targets.shape != expected:
            raise ValueError(f"targets must be (B, P, T, D) = {expected}, not {tuple(targets.shape)}")
        padded = padding_mask(num_frames, expected[2])
        sums, errors, similarities = zip(
            *(
                _head_loss(x, head, targets[:, layer], padded, self.kind, cosines, self.cosine_weight)
                for layer, (x, head) in enumerate(zip(seen, self.student.heads, strict=True))
            ),
            strict=True,
        )
        divisor = num_frames.sum() if normalizer is None else normalizer
        loss = _weighted(
            torch.stack(sums) / divisor,
            torch.stack(errors, 1),
            frame_mask,
            divisor,
            self.hint_weight,
            self.final_weight,
            hints,
        )
        if cosines:
            loss.cosines = cosine_sums(torch.stack(similarities), frame_mask, padded)
        return loss


def cosine_sums(similarities: Tensor, frame_mask: Tensor | None, padded: Tensor) -> Tensor:
    """(L, B, T) and, both (B, T) bool, masked frames and padding, to the (2, L + 1) of `DistillationLoss.cosines`."""
    masked = torch.zeros_like(padded) if frame_mask is None else frame_mask & ~padded
    frames = torch.stack([masked, ~padded & ~masked]).double()
    sums = torch.einsum("lbt,kbt->kl", similarities.double(), frames)
    return torch.cat([sums, frames.sum((1, 2))[:, None]], 1)


def _head_loss(
    x: Tensor,
    head: nn.Module,
    targets: Tensor,
    padded: Tensor,
    kind: Kind,
    cosines: bool,
    cosine_weight: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer's loss.

    Args:
        x: (B, T, d), what the head sees.
        head: a linear layer, or the identity.
        targets: (B, T, D).
        padded: (B, T) bool.
        kind: of error.
        cosines: whether they are wanted.
        cosine_weight: of the cosine's term in the error.

    Returns:
        () the errors' sum over real frames; then without gradient (B, T) each real frame's error, averaged over D, and
        (B, T) cosine similarities, empty if not wanted.
    """
    weight, bias = (head.weight, head.bias) if isinstance(head, nn.Linear) else (None, None)
    result: tuple[Tensor, Tensor, Tensor] = _HeadLoss.apply(
        x, weight, bias, targets, padded, kind, cosines, cosine_weight, torch.is_grad_enabled()
    )  # type: ignore[no-untyped-call]
    return result


class _HeadLoss(torch.autograd.Function):
    """Computes its gradients in forward, up to the factor that only backward knows, and keeps nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        targets: Tensor,
        padded: Tensor,
        kind: Kind,
        cosines: bool,
        cosine_weight: float,
        differentiable: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        projections = x if weight is None else F.linear(x, weight, bias)
        targets = targets.float()
        wide = projections.float()
        similarities = x.new_empty(0)
        if cosines or cosine_weight:
            similarities = F.cosine_similarity(wide, targets, -1)
        error = wide - targets
        per_frame = (error.square() if kind == "mse" else error.abs()).mean(-1)
        if cosine_weight:
            per_frame -= cosine_weight * F.logsigmoid(similarities)
        per_frame = per_frame.masked_fill(padded, 0)
        if differentiable:
            # The gradient of the sum is factor * error (or its sign). Matrix products see it scaled by the root of the number
            # of frames, so that half precision neither overflows in the sum over frames nor underflows before it.
            scale = padded.numel() ** -0.5
            ctx.factor = (2 if kind == "mse" else 1) / error.shape[-1] / scale
            error = error if kind == "mse" else error.sign_()
            if cosine_weight:
                error += _cosine_slope(wide, targets, similarities) * (cosine_weight / ctx.factor / scale)
            error = error.masked_fill_(padded[..., None], 0).mul_(scale)
            if weight is None:
                gradients = [error.to(x.dtype)]
            else:
                assert bias is not None
                rows = error.to(projections.dtype).flatten(0, 1)
                gradients = [
                    (rows @ weight).view_as(x).to(x.dtype),
                    (rows.t() @ x.flatten(0, 1)).to(weight.dtype),
                    rows.sum(0, dtype=bias.dtype),
                ]
            ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(per_frame, similarities)
        return per_frame.sum(), per_frame, similarities

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        factor = gradient * ctx.factor
        gradients = [saved * factor for saved in ctx.saved_tensors]
        return (*gradients, *(None,) * (9 - len(gradients)))


def _cosine_slope(projections: Tensor, targets: Tensor, cosines: Tensor) -> Tensor:
    """Gradient of ``-log sigmoid(cos(p, t))`` with respect to p, of shape (B, T, D); cosines are (B, T)."""
    norms = projections.norm(dim=-1, keepdim=True).clamp_min(1e-8), targets.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    cosines = cosines[..., None]
    slope: Tensor = targets / (norms[0] * norms[1]) - projections * (cosines / norms[0].square())
    return slope * (torch.sigmoid(cosines) - 1)
