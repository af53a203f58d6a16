"""STaR (Jang et al., ICASSP 2024): the student learns how frames relate to each other, not what each is.

A temporal Gram matrix is G = X Yᵀ / width of two (T, width) matrices of hidden states. Layer-wise relations have X = Y, one layer's
output; intra-layer relations X, the layer's input, and Y, its output (where only some of the teacher's layers are learnt from: the
one below of those). Student and teacher have both of one shape whatever their
widths, so no head is needed. The authors' loss code is not published; dividing by the width, so that neither the widths nor their
ratio decide the scale, is ours. Of the paper's intra-layer relations the first layer's is left out: a cache has no
encoder input.

Shape suffixes: B batch, T frames, L layers, d student width, D teacher width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_distill.student.model.student import Student
from ray_distill.student.objectives.layer_loss import DistillationLoss, Kind, check_kind, cosine_sums
from ray_distill.student.training.spec_augment import SpecAugment, augmentation
from ray_distill.teacher_cache.frames import padding_mask


def relation(x: Tensor, y: Tensor) -> Tensor:
    """(B, T, width), (B, T, width) → (B, T, T) float32 temporal Gram matrices, divided by the width."""
    with torch.autocast(x.device.type, enabled=False):  # Half precision can't hold the products of loud channels.
        return (x.float() @ y.float().transpose(1, 2)) / x.shape[-1]


class RelationDistiller(nn.Module):
    """A student and the STaR loss in one forward; takes what `ray_distill.student.objectives.layer_loss.Distiller` takes.

    With r_l the mean squared (or absolute) difference of relation matrices of layer l over all pairs of real frames of an utterance,
    weighted by utterances' frames, the loss is ``layer_weight * mean_l r_l + intra_weight * mean_l r_{l-1,l}``.

    Args:
        student: without heads, with as many layers as the targets.
        kind: of difference.
        layer_weight: of the layer-wise relations.
        intra_weight: of the intra-layer ones.
        spec_augment: as `ray_distill.student.objectives.layer_loss.Distiller` takes it.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(
        self,
        student: Student,
        *,
        kind: Kind = "mse",
        layer_weight: float = 1.0,
        intra_weight: float = 1.0,
        spec_augment: SpecAugment | None = None,
    ) -> None:
        super().__init__()
        check_kind(kind)
        self.student = student
        self.kind, self.layer_weight, self.intra_weight = kind, layer_weight, intra_weight
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
        """The loss of a batch, per frame.

        Args:
            waveforms, lengths, frame_mask: as `Student.forward` takes them.
            targets: (B, L, T, D).
            normalizer: frames to divide by; default this batch's real frames.
            hints: must be None: all layers take part.
            cosines: whether cosine similarities are wanted: here of the rows of the layer-wise relation matrices, a frame's relation
                to all frames.

        Returns:
            ``per_layer`` holds each layer's weighted share of the total; there is no split into masked and unmasked.

        Raises:
            ValueError: shapes that don't fit.
        """
        assert hints is None
        augment = augmentation(self.spec_augment, self.training)
        _, seen, num_frames = self.student.layer_outputs(waveforms, lengths, frame_mask, augment)
        layers, frames = len(seen), seen[0].shape[1]
        if targets.ndim != 4 or targets.shape[:3] != (len(waveforms), layers, frames):
            raise ValueError(
                f"targets must be (B, L, T, D) = {(len(waveforms), layers, frames)} and a width, not {tuple(targets.shape)}"
            )
        padded = padding_mask(num_frames, frames)
        ours = [x.masked_fill(padded[..., None], 0) for x in seen]
        theirs = [x.masked_fill(padded[..., None], 0) for x in targets.unbind(1)]
        divisor = num_frames.sum() if normalizer is None else normalizer
        shares, similarities = [], []
        for layer in range(layers):
            found, wanted = relation(ours[layer], ours[layer]), relation(theirs[layer], theirs[layer])
            share = self.layer_weight / layers * self._error(found, wanted, num_frames)
            if layer:
                found_intra = relation(ours[layer - 1], ours[layer])
                wanted_intra = relation(theirs[layer - 1], theirs[layer])
                share = share + self.intra_weight / (layers - 1) * self._error(found_intra, wanted_intra, num_frames)
            shares.append(share / divisor)
            if cosines:
                similarities.append(F.cosine_similarity(found.detach(), wanted, -1))
        per_layer = torch.stack(shares)
        hint, final = per_layer[:-1].sum(), per_layer[-1]
        loss = DistillationLoss(hint + final, hint, final, per_layer)
        if cosines:
            loss.cosines = cosine_sums(torch.stack(similarities), frame_mask, padded)
        return loss

    def _error(self, found: Tensor, wanted: Tensor, num_frames: Tensor) -> Tensor:
        """() sum over utterances of frames times the mean difference over pairs of real frames; both are 0 elsewhere."""
        difference = found - wanted
        errors = difference.square() if self.kind == "mse" else difference.abs()
        return (errors.sum((1, 2)) / num_frames).sum()
