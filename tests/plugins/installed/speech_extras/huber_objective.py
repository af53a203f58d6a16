"""An objective: heads predict the teacher's layers with Huber's loss, which outliers move less than a squared error."""

from typing import Annotated, ClassVar, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_distill.student import Student, StudentConfig
from ray_distill.student.objectives.objective import DistillationLoss, Distiller, Encoded, Objective, Targets
from ray_distill.student.training.field_effects import CHANGES_LOSS_MEANING
from ray_distill.student.training.spec_augment import SpecAugment
from ray_distill.teacher_cache.targets.target_batch import SymbolLayout


class HuberPrediction(Objective, frozen=True):
    """Heads predict the teacher's layers, with Huber's loss."""

    objective: Literal["huber"] = "huber"
    delta: Annotated[float, CHANGES_LOSS_MEANING] = pydantic.Field(default=1.0, gt=0)
    """Error from which the loss is linear."""

    uses_heads: ClassVar[bool] = True

    def check_student(self, config: StudentConfig) -> None:
        """See `Objective.check_student`."""
        if config.heads == "none":
            raise ValueError("train.objective huber needs heads; set student.heads=layerwise")

    def distiller(
        self, student: Student, *, spec_augment: SpecAugment | None, seed: int, symbols: SymbolLayout | None = None
    ) -> "HuberDistiller":
        """See `Objective.distiller`."""
        return HuberDistiller(student, self.delta, spec_augment)


class HuberDistiller(Distiller):
    """A student and Huber's loss."""

    def __init__(self, student: Student, delta: float, spec_augment: SpecAugment | None) -> None:
        super().__init__(student, spec_augment=spec_augment)
        self.delta = delta

    def loss(
        self,
        encoded: Encoded,
        frame_mask: Tensor | None,
        targets: Targets,
        divisor: float | Tensor,
        *,
        cosines: bool = False,
    ) -> DistillationLoss:
        """See `Distiller.loss`; targets are (B, L, T, D)."""
        assert isinstance(targets, Tensor)
        pairs = zip(self.student.heads, encoded.head_inputs, strict=True)
        predicted = torch.stack([head(x) for head, x in pairs], 1).float()
        padded = encoded.padded[:, None, :, None]  # Targets may hold anything at padding.
        errors = F.huber_loss(
            predicted.masked_fill(padded, 0), targets.masked_fill(padded, 0), reduction="none", delta=self.delta
        )
        per_layer = errors.mean(-1).sum((0, 2)) / divisor
        hint, final = per_layer[:-1].sum(), per_layer[-1]
        return DistillationLoss(hint + final, hint, final, per_layer)
