"""STaR (Jang et al., ICASSP 2024): the student learns how the teacher's frames relate to each other, not each frame itself.

A temporal Gram matrix is G = X Yᵀ / width, for two (T, width) matrices of hidden states. In layer-wise relations X = Y is a
layer's output. In intra-layer relations X is a layer's input and Y its output (if only some of the teacher's layers are
used, the next lower of these takes the place of the input). The matrices of student and teacher have the same shape whatever
their widths, so no heads are needed.

The authors' loss code is not published. Division by the width is our choice, which keeps the scale independent of both
widths. The paper's intra-layer relation of the first layer is omitted, because a cache does not hold the encoder's input.

Shape suffixes: B batch, T frames, L layers, d student width, D teacher width.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ray_distill.student.model.student import Lengths, Student
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.objectives.objective import DistillationLoss, Distiller, ErrorKind, Objective, cosine_sums
from ray_distill.student.training.field_effects import CHANGES_LOSS_MEANING
from ray_distill.student.training.spec_augment import SpecAugment


class TemporalRelation(Objective, frozen=True):
    """The student matches temporal relations between the teacher's frames, without heads (STaR)."""

    objective: Literal["star"] = "star"
    relation_weights: Annotated[tuple[float, float], CHANGES_LOSS_MEANING] = (1.0, 1.0)
    """Weights of the layer-wise and of the intra-layer relations."""

    def check_student(self, config: StudentConfig) -> None:
        """See `Objective.check_student`."""
        if config.heads != "none":
            raise ValueError(
                f"train.objective star does not go with student.heads {config.heads}: star compares hidden states; set "
                "student.heads to none"
            )

    def distiller(self, student: Student, *, spec_augment: SpecAugment | None, seed: int) -> "RelationDistiller":
        """See `Objective.distiller`."""
        layer_weight, intra_weight = self.relation_weights
        return RelationDistiller(
            student, kind=self.loss, layer_weight=layer_weight, intra_weight=intra_weight, spec_augment=spec_augment
        )


def relation(x: Tensor, y: Tensor) -> Tensor:
    """Return temporal Gram matrices (B, T, T) float32 of (B, T, width) and (B, T, width), divided by the width."""
    with torch.autocast(x.device.type, enabled=False):  # Half precision overflows in the products of loud channels.
        return (x.float() @ y.float().transpose(1, 2)) / x.shape[-1]


class RelationDistiller(Distiller):
    """A student and the STaR loss in one forward pass.

    r_l is the mean squared (or absolute) difference of the relation matrices of layer l over all pairs of an utterance's
    real frames, averaged over utterances with their numbers of frames as weights. The loss is
    ``layer_weight * mean_l r_l + intra_weight * mean_l r_{l-1,l}``.

    Args:
        student: A student without heads, with as many layers as the targets.
        kind: Squared or absolute difference.
        layer_weight: Weight of the layer-wise relations. Default 1.
        intra_weight: Weight of the intra-layer relations. Default 1.
        spec_augment: Augmentation of the student's features in training mode. Default None: no augmentation.

    Raises:
        ValueError: unknown kind.
    """

    def __init__(
        self,
        student: Student,
        *,
        kind: ErrorKind = "mse",
        layer_weight: float = 1.0,
        intra_weight: float = 1.0,
        spec_augment: SpecAugment | None = None,
    ) -> None:
        super().__init__(student, kind=kind, spec_augment=spec_augment)
        self.layer_weight, self.intra_weight = layer_weight, intra_weight

    def forward(
        self,
        waveforms: Tensor,
        lengths: Lengths,
        frame_mask: Tensor | None,
        targets: Tensor,
        normalizer: float | Tensor | None = None,
        *,
        cosines: bool = False,
    ) -> DistillationLoss:
        """See `Distiller.forward`.

        Cosine similarities are those of the rows of the layer-wise relation matrices: a frame's relations to all frames.

        Returns:
            The loss, with each layer's weighted contribution to the total in ``per_layer``. It is not split into masked and
            unmasked frames.
        """
        outputs, num_frames, padded = self.encode(waveforms, lengths, frame_mask)
        layers, frames = len(outputs), padded.shape[1]
        if targets.ndim != 4 or targets.shape[:3] != (len(waveforms), layers, frames):
            raise ValueError(
                f"targets must be (B, L, T, D) = {(len(waveforms), layers, frames)} and a width, not {tuple(targets.shape)}"
            )
        ours = [x.masked_fill(padded[..., None], 0) for x in outputs]
        theirs = [x.masked_fill(padded[..., None], 0) for x in targets.unbind(1)]
        divisor = num_frames.sum() if normalizer is None else normalizer
        losses, similarities = [], []
        for layer in range(layers):
            found, expected = relation(ours[layer], ours[layer]), relation(theirs[layer], theirs[layer])
            loss = self.layer_weight / layers * self._error(found, expected, num_frames)
            if layer:
                found_intra = relation(ours[layer - 1], ours[layer])
                expected_intra = relation(theirs[layer - 1], theirs[layer])
                loss = loss + self.intra_weight / (layers - 1) * self._error(found_intra, expected_intra, num_frames)
            losses.append(loss / divisor)
            if cosines:
                similarities.append(F.cosine_similarity(found.detach(), expected, -1))
        per_layer = torch.stack(losses)
        hint, final = per_layer[:-1].sum(), per_layer[-1]
        result = DistillationLoss(hint + final, hint, final, per_layer)
        if cosines:
            result.cosines = cosine_sums(torch.stack(similarities), frame_mask, padded)
        return result

    def _error(self, found: Tensor, expected: Tensor, num_frames: Tensor) -> Tensor:
        """Return the sum over utterances of the number of frames times the mean difference over pairs of real frames.

        Args:
            found, expected: (B, T, T) float, zeros at padded rows and columns.
            num_frames: (B,) integer, real frames.
        """
        difference = found - expected
        errors = difference.square() if self.kind == "mse" else difference.abs()
        return (errors.sum((1, 2)) / num_frames).sum()
