"""Layer prediction (DistilHuBERT, FitHuBERT, ARMHuBERT): heads predict the teacher's layers."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, cast

import numpy as np
import pydantic
import torch
from torch import Tensor

from ray_distill.student.model.student import Student
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.objectives.layer_loss import CosineTerm, combine_layers, head_loss, weights_of_frames
from ray_distill.student.objectives.objective import (
    DistillationLoss,
    Distiller,
    Encoded,
    ErrorKind,
    FeatureObjective,
    Targets,
    check_kind,
    cosine_sums,
)
from ray_distill.student.objectives.teacher_heads import TeacherHeads
from ray_distill.student.training.field_effects import CHANGES_LOSS_MEANING
from ray_distill.student.training.spec_augment import SpecAugment
from ray_distill.teacher_cache.targets.target_batch import SymbolLayout

_Weight = Annotated[float, pydantic.Field(ge=0)]


class LayerPrediction(FeatureObjective, frozen=True):
    """Heads predict the teacher's layers (ARMHuBERT, DistilHuBERT)."""

    objective: Literal["prediction"] = "prediction"
    hint_weight: Annotated[float, CHANGES_LOSS_MEANING] = 0.1
    """Weight of the summed losses of all layers but the last."""
    final_weight: Annotated[float, CHANGES_LOSS_MEANING] = 1.0
    """Weight of the last layer's loss."""
    cosine_weight: Annotated[float, CHANGES_LOSS_MEANING] = pydantic.Field(default=0.0, ge=0)
    """Weight of DistilHuBERT's second term, ``-log sigmoid(cos)``. The published ARMHuBERT does not use it (0)."""
    cosine_term: Annotated[CosineTerm, CHANGES_LOSS_MEANING] = "log_sigmoid"
    """Form of the second term: ``log_sigmoid``, or ``plain``: 1 - cos, as in DPHuBERT. Needs a ``cosine_weight``."""
    frame_weights: tuple[_Weight, _Weight] = (1.0, 1.0)
    """Weights of the errors of masked and of unmasked frames in training: ``[1, 0]`` learns at masked frames only. Validations, whose
    input is unmasked, weigh all frames by 1, so their losses can be compared."""
    hint_layers: int | None = pydantic.Field(default=None, ge=1)
    """Number of layers below the last that take part in the loss, drawn anew for each epoch (published
    ``distil_random_layer``). None uses all."""

    uses_heads: ClassVar[bool] = True

    def check_student(self, config: StudentConfig) -> None:
        """See `Objective.check_student`."""
        if config.heads == "none":
            raise ValueError(
                "train.objective prediction does not go with student.heads none: prediction needs heads; choose layerwise "
                "or split heads, or another objective"
            )
        if self.cosine_term != "log_sigmoid" and not self.cosine_weight:
            raise ValueError(
                f"train.cosine_term {self.cosine_term} does nothing without train.cosine_weight; set cosine_weight, or remove it"
            )
        if self.hint_layers is not None and self.hint_layers >= config.num_predictions:
            raise ValueError(
                f"train.hint_layers is {self.hint_layers}, but there are {config.num_predictions - 1} layers below the last to draw "
                "from; give a smaller number, or remove it to learn from all"
            )

    def check_source(self, codec: str, *, cached: bool, draws: int, fresh_masks: bool) -> None:
        """See `Objective.check_source`."""
        super().check_source(codec, cached=cached, draws=draws, fresh_masks=fresh_masks)
        if not any(self.frame_weights):
            raise ValueError("train.frame_weights are both 0; one must be positive")
        if self.frame_weights != (1, 1) and not draws and not fresh_masks:
            raise ValueError(
                "train.frame_weights does nothing without masks; set masks.draws, or train.masks=fresh, or remove it"
            )

    def constant_loss(self, variance: Tensor) -> float | None:
        """See `Objective.constant_loss`. Only the squared error's best constant is the mean."""
        if self.loss != "mse" or self.cosine_weight:
            return None
        return self.target_size(variance)

    def target_size(self, variance: Tensor) -> float:
        """See `Objective.target_size`: the weighted sum of the variances, or with ``l1`` of the standard deviations."""
        sizes = variance if self.loss == "mse" else variance.sqrt()
        return float(self.hint_weight * sizes[:-1].sum() + self.final_weight * sizes[-1])

    def distiller(
        self, student: Student, *, spec_augment: SpecAugment | None, seed: int, symbols: SymbolLayout | None = None
    ) -> "LayerDistiller":
        """See `Objective.distiller`."""
        return LayerDistiller(
            student,
            kind=self.loss,
            hint_weight=self.hint_weight,
            final_weight=self.final_weight,
            cosine_weight=self.cosine_weight,
            cosine_term=self.cosine_term,
            frame_weights=self.frame_weights,
            hint_layers=self.hint_layers,
            seed=seed,
            spec_augment=spec_augment,
        )


class LayerDistiller(Distiller):
    """A student and its `distillation_loss` in one forward pass.

    It returns the same numbers as the two in turn, but works layer by layer, so that autograd saves one (B, T, D) tensor for
    each head and no (B, L, T, D) tensor is made beside the targets.

    Args:
        student: The student.
        kind, hint_weight, final_weight, cosine_weight, cosine_term, frame_weights: As for `distillation_loss`.
        hint_layers: Number of layers below the last that take part in each epoch. Default None: all.
        seed: Seed of the choice of hint layers. Default 0.
        spec_augment: Augmentation of the student's features in training mode. Default None: no augmentation.

    Attributes:
        hints: For each layer below the last, whether it takes part in the hint; None if all do. Set by `set_progress`.

    Raises:
        ValueError: unknown kind.

    Example:
        >>> distiller = LayerDistiller(Student(StudentConfig()))
        >>> waveforms, lengths = torch.randn(2, 16_000), torch.tensor([16_000, 12_000])
        >>> distiller(waveforms, lengths, None, torch.randn(2, 12, 49, 768)).total.backward()
    """

    def __init__(
        self,
        student: Student,
        *,
        kind: ErrorKind = "mse",
        hint_weight: float = 0.1,
        final_weight: float = 1.0,
        cosine_weight: float = 0.0,
        cosine_term: CosineTerm = "log_sigmoid",
        frame_weights: tuple[float, float] = (1.0, 1.0),
        hint_layers: int | None = None,
        seed: int = 0,
        spec_augment: SpecAugment | None = None,
    ) -> None:
        super().__init__(student, spec_augment=spec_augment)
        check_kind(kind)
        self.kind = kind
        self.hint_weight, self.final_weight, self.cosine_weight = hint_weight, final_weight, cosine_weight
        self.cosine_term: CosineTerm = cosine_term
        self.frame_weights, self.hint_layers, self.seed = frame_weights, hint_layers, seed
        self.hints: Sequence[bool] | None = None

    def use_heads(self, heads: TeacherHeads) -> None:
        """Predict with heads of the objective's own in place of the student's, for one of several teachers."""
        self.predictors.append(heads)

    @property
    def num_layers(self) -> int:
        """Number of layers that are predicted."""
        own = cast(TeacherHeads, self.predictors[0]).heads if self.predictors else self.student.heads
        return len(own)

    def set_progress(self, epoch: int, step: int) -> None:
        """Draw the epoch's hint layers."""
        if self.hint_layers is not None:
            self.hints = draw_hint_layers(self.hint_layers, self.num_layers - 1, self.seed, epoch)

    def loss(
        self,
        encoded: Encoded,
        frame_mask: Tensor | None,
        targets: Targets,
        divisor: float | Tensor,
        *,
        cosines: bool = False,
    ) -> DistillationLoss:
        """See `Distiller.loss`; targets are (B, P, T, D), one for each head."""
        padded = encoded.padded
        heads, head_inputs, dim = self.student.heads, encoded.head_inputs, self.student.config.target_dim
        if self.predictors:
            own = cast(TeacherHeads, self.predictors[0])
            heads, head_inputs, dim = own.heads, own.inputs(encoded.head_inputs, encoded.layers), own.dim
        assert isinstance(targets, Tensor)
        expected = (len(padded), len(head_inputs), padded.shape[1], dim)
        if targets.shape != expected:
            raise ValueError(f"targets must be (B, P, T, D) = {expected}, not {tuple(targets.shape)}")
        weights = weights_of_frames(frame_mask, self.frame_weights)
        sums, errors, similarities = zip(
            *(
                head_loss(
                    x,
                    head,
                    targets[:, layer],
                    padded,
                    self.kind,
                    cosines,
                    self.cosine_weight,
                    self.cosine_term,
                    weights,
                )
                for layer, (x, head) in enumerate(zip(head_inputs, heads, strict=True))
            ),
            strict=True,
        )
        loss = combine_layers(
            torch.stack(sums) / divisor,
            torch.stack(errors, 1),
            frame_mask,
            divisor,
            self.hint_weight,
            self.final_weight,
            self.hints,
        )
        if cosines:
            loss.cosines = cosine_sums(torch.stack(similarities), frame_mask, padded)
        return loss


def draw_hint_layers(count: int, layers: int, seed: int, epoch: int) -> list[bool]:
    """Draw ``count`` of the ``layers`` below the last for an epoch; the same arguments give the same layers."""
    drawn = np.random.default_rng((seed, epoch)).permutation(layers)[:count]
    return [layer in drawn for layer in range(layers)]
