"""Prediction of discrete targets at masked and at unmasked frames, the common part of the objectives ``units`` and ``mvq``.

Shape suffixes: B batch, T frames, L teacher layers, S symbols of a frame and layer, N chosen frames, d student width.
"""

from abc import abstractmethod
from typing import Annotated, ClassVar

import pydantic
import torch
from torch import Tensor

from ray_distill.student.model.student import Student
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.objectives.objective import DistillationLoss, Distiller, Encoded, Objective, Targets
from ray_distill.student.training.field_effects import CHANGES_LOSS_MEANING
from ray_distill.student.training.spec_augment import SpecAugment
from ray_distill.teacher_cache.targets.target_batch import Batch, SymbolLayout


class MaskedPrediction(Objective, frozen=True):
    """Settings of an objective that predicts symbols from the student's last layer."""

    masked_weight: Annotated[float, CHANGES_LOSS_MEANING] = pydantic.Field(default=1.0, ge=0)
    """Weight of masked frames."""
    unmasked_weight: Annotated[float, CHANGES_LOSS_MEANING] = pydantic.Field(default=0.0, ge=0)
    """Weight of unmasked frames. The default 0, as in HuBERT, computes no loss there."""

    validates_masked: ClassVar[bool] = True
    codec: ClassVar[str]
    """Kind of codec that has the symbols."""

    def check_student(self, config: StudentConfig) -> None:
        """See `Objective.check_student`."""
        if config.heads != "none":
            raise ValueError(
                f"train.objective {self.objective} does not go with student.heads {config.heads}: it predicts symbols from the last "
                "layer, without the student's heads; set student.heads to none"
            )
        if self.masked_weight == self.unmasked_weight == 0:
            raise ValueError("train.masked_weight and train.unmasked_weight are both 0; one must be positive")

    def check_targets(self, config: StudentConfig, num_layers: int, dim: int) -> None:
        """See `Objective.check_targets`. Any number of layers and any width will do."""

    def check_source(self, codec: str, *, cached: bool, draws: int, fresh_masks: bool) -> None:
        """See `Objective.check_source`."""
        if not cached or codec.partition(":")[0] != self.codec:
            found = f"cache.codec is {codec}" if cached else "train.targets is online"
            example = {"units": "units:500", "mvq": "mvq:16"}[self.codec]
            raise ValueError(
                f"train.objective {self.objective} learns from a cache of codec {self.codec}, but {found}; set cache.codec, such as "
                f"{example}, or make such a cache from another one with `ray-distill cache derive`"
                f"{'; also set masks.draws=0 and train.masks=fresh' if draws else ''}"
            )
        if draws:
            raise ValueError(
                f"train.objective {self.objective} learns from the clean teacher, so no masked pass is cached; set masks.draws=0 and "
                "train.masks=fresh"
            )
        if not fresh_masks and self.unmasked_weight == 0:
            raise ValueError(
                f"train.objective {self.objective} needs masked frames, since train.unmasked_weight is 0; set train.masks=fresh, or "
                "give train.unmasked_weight"
            )

    def targets_of(self, batch: Batch) -> Targets:
        """See `Objective.targets_of`."""
        return batch.symbols

    def _layout(self, symbols: SymbolLayout | None) -> SymbolLayout:
        if symbols is None:
            raise ValueError(
                f"train.objective {self.objective} needs discrete targets; read them from a cache of codec {self.codec}"
            )
        return symbols


class SymbolDistiller(Distiller):
    """A student and the cross-entropy of its predictions of symbols.

    The loss of a layer is the sum over masked frames of the cross-entropy times ``masked_weight``, plus that over unmasked frames
    times ``unmasked_weight``, divided by the number of real frames, masked or not. (fairseq divides by the frames that are counted.
    The two differ by about the share of masked frames, a factor to which AdamW is insensitive.) The total is the sum over layers.

    Args:
        student: The student.
        masked_weight: Weight of masked frames.
        unmasked_weight: Weight of unmasked frames; without masks all frames are unmasked.
        spec_augment: Augmentation of the student's features in training mode. None disables it.
    """

    def __init__(
        self, student: Student, *, masked_weight: float, unmasked_weight: float, spec_augment: SpecAugment | None
    ) -> None:
        super().__init__(student, spec_augment=spec_augment)
        self.masked_weight, self.unmasked_weight = masked_weight, unmasked_weight

    @abstractmethod
    def predict(self, layer: int, x: Tensor, symbols: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy (N,) float32 of each frame for one layer, and the share (N,) of its symbols predicted right.

        Args:
            layer: 0-based position of the teacher layer.
            x: (N, d) float, the student's last layer.
            symbols: (N, S) int64.
        """

    def loss(
        self,
        encoded: Encoded,
        frame_mask: Tensor | None,
        targets: Targets,
        divisor: float | Tensor,
        *,
        cosines: bool = False,
    ) -> DistillationLoss:
        """See `Distiller.loss`; targets are (B, L, T, S) int64 symbols."""
        assert isinstance(targets, Tensor)
        x, padded = encoded.layers[-1], encoded.padded
        batch, frames = padded.shape
        layers = len(self.predictors)
        if targets.ndim != 4 or targets.shape[:3] != (batch, layers, frames):
            raise ValueError(
                f"targets must be (B, L, T, S) = {(batch, layers, frames)} and a number of symbols, not {tuple(targets.shape)}"
            )
        masked = torch.zeros_like(padded) if frame_mask is None else frame_mask
        counted = ~padded
        if self.masked_weight == 0:
            counted = counted & ~masked
        if self.unmasked_weight == 0:
            counted = counted & masked
        chosen, is_masked = x[counted], masked[counted]
        weights = torch.where(is_masked, self.masked_weight, self.unmasked_weight)
        losses, right = [], []
        for layer in range(layers):
            error, correct = self.predict(layer, chosen, targets[:, layer][counted])
            losses.append((error * weights).sum() / divisor)
            right.append(correct)
        per_layer = torch.stack(losses)
        hint, final = per_layer[:-1].sum(), per_layer[-1]
        result = DistillationLoss(hint + final, hint, final, per_layer)
        if cosines:
            kinds = torch.stack([is_masked, ~is_masked]).double()
            sums = torch.einsum("ln,kn->kl", torch.stack(right).double(), kinds)
            result.accuracies = torch.cat([sums, kinds.sum(1)[:, None]], 1)
        return result
