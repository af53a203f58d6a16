"""Weighted sums of objectives on the same targets, each from a given step on."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self, cast

import pydantic
from torch import Tensor

from ray_distill.student.model.student import Student
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.objectives.codebook_prediction import CodebookPrediction
from ray_distill.student.objectives.composite import CompositeDistiller
from ray_distill.student.objectives.layer_prediction import LayerPrediction
from ray_distill.student.objectives.objective import DistillationLoss, Distiller, Encoded, Objective, Targets
from ray_distill.student.objectives.unit_prediction import UnitPrediction
from ray_distill.student.training.field_effects import CHANGES_LOSS_MEANING
from ray_distill.student.training.spec_augment import SpecAugment
from ray_distill.teacher_cache.targets.target_batch import Batch, SymbolLayout

AnyPart = Annotated[LayerPrediction | UnitPrediction | CodebookPrediction, pydantic.Field(discriminator="objective")]
"""Settings of an objective that can be part of a mixture. ``star`` compares other tensors of a student without heads."""


class Part(pydantic.BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """One objective of a mixture."""

    settings: AnyPart
    """The objective: ``objective`` with its name, and its keys as in ``train``."""
    weight: float = pydantic.Field(default=1.0, gt=0)
    """Weight of its loss in the sum."""
    from_step: int = pydantic.Field(default=0, ge=0)
    """First optimiser step, counted from 0, at which it takes part. Validation always counts all parts."""


class Mixture(Objective, frozen=True):
    """A weighted sum of objectives, each from a step on."""

    objective: Literal["mixture"] = "mixture"
    parts: Annotated[tuple[Part, ...], CHANGES_LOSS_MEANING] = ()
    """Objectives of the sum, each a table with ``settings`` (``objective`` and its keys), ``weight`` and ``from_step``."""

    uses_heads: ClassVar[bool] = True

    @property
    def validates_masked(self) -> bool:  # type: ignore[override]
        """See `Objective.validates_masked`."""
        return any(part.settings.validates_masked for part in self.parts)

    @pydantic.model_validator(mode="after")
    def _check_parts(self) -> Self:
        names = [part.settings.objective for part in self.parts]
        if len(set(names)) < len(names) or len(names) < 2:
            raise ValueError(
                f"train.parts of objective mixture has the objectives {names}; give two or more different ones"
            )
        if min(part.from_step for part in self.parts) > 0:
            raise ValueError("train.parts: no objective takes part from step 0; set from_step of one of them to 0")
        return self

    def check_student(self, config: StudentConfig) -> None:
        """See `Objective.check_student`."""
        headless = config.without_heads()
        with_heads = any(part.settings.uses_heads for part in self.parts)
        for part in self.parts:
            part.settings.check_student(headless if with_heads and not part.settings.uses_heads else config)

    def check_targets(self, config: StudentConfig, num_layers: int, dim: int) -> None:
        """See `Objective.check_targets`."""
        for part in self.parts:
            part.settings.check_targets(config, num_layers, dim)

    def check_source(self, codec: str, *, cached: bool, draws: int, fresh_masks: bool) -> None:
        """See `Objective.check_source`."""
        for part in self.parts:
            part.settings.check_source(codec, cached=cached, draws=draws, fresh_masks=fresh_masks)

    def targets_of(self, batch: Batch) -> Targets:
        """See `Objective.targets_of`."""
        return tuple(cast(Tensor, part.settings.targets_of(batch)) for part in self.parts)

    def distiller(
        self, student: Student, *, spec_augment: SpecAugment | None, seed: int, symbols: SymbolLayout | None = None
    ) -> "MixtureDistiller":
        """See `Objective.distiller`."""
        made = [part.settings.distiller(student, spec_augment=None, seed=seed, symbols=symbols) for part in self.parts]
        return MixtureDistiller(
            student,
            made,
            [part.weight for part in self.parts],
            [part.from_step for part in self.parts],
            spec_augment,
        )


class MixtureDistiller(CompositeDistiller):
    """A student and the weighted sum of several losses, from one forward pass of the student.

    A part that has not begun has the weight 0, but is computed, because DDP waits for the gradient of each of its parameters.
    ``per_layer`` and the total are sums of the weighted losses of the parts.

    Args:
        student: The student.
        parts: Distillers of the parts, with this student.
        weights: Weight of each part.
        from_steps: First step of each part.
        spec_augment: Augmentation of the student's features in training mode. None disables it.
    """

    def __init__(
        self,
        student: Student,
        parts: Sequence[Distiller],
        weights: Sequence[float],
        from_steps: Sequence[int],
        spec_augment: SpecAugment | None,
    ) -> None:
        super().__init__(student, parts, spec_augment)
        self.weights, self.from_steps = tuple(weights), tuple(from_steps)

    def loss(
        self,
        encoded: Encoded,
        frame_mask: Tensor | None,
        targets: Targets,
        divisor: float | Tensor,
        *,
        cosines: bool = False,
    ) -> DistillationLoss:
        """See `Distiller.loss`; targets are a tuple with those of each part."""
        found = [
            part.loss(encoded, frame_mask, wanted, divisor, cosines=cosines)
            for part, wanted in zip(self.parts, cast(tuple[Tensor, ...], targets), strict=True)
        ]
        weights = [
            weight if not self.training or self._step >= start else 0.0
            for weight, start in zip(self.weights, self.from_steps, strict=True)
        ]
        pairs = list(zip(found, weights, strict=True))
        hint = sum((loss.hint * weight for loss, weight in pairs), start=found[0].hint.new_zeros(()))
        final = sum((loss.final * weight for loss, weight in pairs), start=hint.new_zeros(()))
        per_layer = sum((loss.per_layer * weight for loss, weight in pairs), start=found[0].per_layer.new_zeros(()))
        result = DistillationLoss(hint + final, hint, final, per_layer)
        for loss in found:
            result.cosines = loss.cosines if result.cosines is None else result.cosines
            result.accuracies = loss.accuracies if result.accuracies is None else result.accuracies
        return result
