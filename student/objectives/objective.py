"""The interface of a training objective: its settings, its module with student and loss, and the loss that it returns."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from copy import copy
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, get_args

import pydantic
import torch
from torch import Tensor, nn

from ray_distill.student.model.student import Lengths, Student
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.pruning.gates import Gates
from ray_distill.student.training.field_effects import CHANGES_LOSS_MEANING
from ray_distill.student.training.spec_augment import SpecAugment, augmentation
from ray_distill.teacher_cache.frames import padding_mask
from ray_distill.teacher_cache.targets.target_batch import Batch, SymbolLayout

ErrorKind = Literal["mse", "l1"]
"""Squared or absolute error."""


@dataclass
class DistillationLoss:
    """A loss and its parts: differentiable scalars unless stated otherwise.

    Attributes:
        total: hint + final.
        hint: Weighted sum over the layers below the last.
        final: Weighted loss of the last layer.
        per_layer: (L,) float, unweighted loss of each layer.
        mask_hint, unmask_hint: Unweighted contributions of masked and of unmasked frames to the layers below the last; None
            without a mask.
        mask_final, unmask_final: The same for the last layer.
        cosines: (2, L + 1) float64, not differentiable, only if requested from a `Distiller`: for masked, then for unmasked
            frames, each layer's cosine similarity of student and teacher summed over frames, and the number of frames.
            The values of several batches and ranks can be added up.
        accuracies: The same for the share of a frame's symbols that the student predicts, for objectives with discrete targets.
        penalty: What is minimised beside ``total``: the batch's share of the loss that closes gates; None without gates.
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
    accuracies: Tensor | None = None
    penalty: Tensor | None = None

    def agreement(self) -> Tensor:
        """Return the cosine similarities and the accuracies (2, 2, L + 1) float64, zeros where there are none."""
        empty = torch.zeros(2, len(self.per_layer) + 1, dtype=torch.float64, device=self.per_layer.device)
        return torch.stack([empty if sums is None else sums for sums in (self.cosines, self.accuracies)])

    def teachers(self) -> Tensor:
        """Return the losses of several teachers as `loss_names` names them, not differentiable; empty with a single teacher."""
        return self.total.new_empty(0)


class Encoded(NamedTuple):
    """Outputs of the student for a batch, from which objectives compute their losses.

    Attributes:
        layers: Output of each encoder layer, (B, T, d) float.
        head_inputs: Input of each head, (B, T, .) float; without heads the layers' outputs.
        num_frames: (B,) integer, real frames.
        padded: (B, T) bool, True at padding.
    """

    layers: list[Tensor]
    head_inputs: list[Tensor]
    num_frames: Tensor
    padded: Tensor


class TeachersTargets(NamedTuple):
    """Targets of a batch of several teachers.

    Attributes:
        wanted: Targets of each of the K teachers.
        present: (B, K) bool, whether each teacher has the utterance and a weight for it.
        domains: Domain of each utterance, on the host; None unless weights depend on it.
    """

    wanted: tuple[Tensor, ...]
    present: Tensor
    domains: tuple[str, ...] | None


Targets = Tensor | tuple[Tensor, ...] | TeachersTargets
"""Targets of a batch: (B, L, T, D) float features, (B, L, T, S) int64 symbols, for a mixture those of each part, or those of several
teachers."""


class Distiller(nn.Module, ABC):
    """A student and an objective's loss in one forward pass: the module that training wraps in DDP.

    Args:
        student: The student.
        spec_augment: Augmentation of the student's features in training mode. None disables it.

    Attributes:
        predictors: Modules of the objective that are trained with the student and are not part of it, such as the predictors of
            discrete targets. They are in the checkpoints from which a training continues. Default: none.
        gates: Gates by which the student is pruned. Default None.
    """

    def __init__(self, student: Student, *, spec_augment: SpecAugment | None = None) -> None:
        super().__init__()
        self.student, self.spec_augment = student, spec_augment
        self.gates: Gates | None = None
        self.predictors = nn.ModuleList()

    def set_progress(self, epoch: int, step: int) -> None:
        """Set the 0-based epoch and step, for objectives that vary. To be called before each forward pass of a training."""

    def row_fields(self) -> dict[str, float]:
        """Return fields of the objective's own for a row of metrics. Default: none."""
        return {}

    def with_student(self, student: Student) -> Self:
        """Return this module with another student and the same predictors, without hooks."""
        other = copy(self)
        other._modules = {**self._modules, "student": student}
        other._forward_pre_hooks, other._forward_hooks = OrderedDict(), OrderedDict()
        return other

    def forward(
        self,
        waveforms: Tensor,
        lengths: Lengths,
        frame_mask: Tensor | None,
        targets: Targets,
        normalizer: float | Tensor | None = None,
        *,
        cosines: bool = False,
    ) -> DistillationLoss:
        """Return the loss of a batch.

        Args:
            waveforms, lengths, frame_mask: The batch, as `Student.forward` takes it.
            targets: Targets, as `Objective.targets_of` returns them; (B, L, T, D) float teacher layers for most objectives.
            normalizer: Number of frames that the loss is divided by. Default: the real frames of this batch. With DDP or
                gradient accumulation, give the frames of the whole step and sum the losses.
            cosines: Whether to compute cosine similarities or accuracies as well.

        Raises:
            ValueError: a shape that does not fit.
        """
        if self.gates is not None:
            self.gates.set_gates(self.student)
        encoded = self.encode(waveforms, lengths, frame_mask)
        divisor = encoded.num_frames.sum() if normalizer is None else normalizer
        loss = self.loss(encoded, frame_mask, targets, divisor, cosines=cosines)
        if self.gates is not None and self.training:
            # The shares of all batches of a step add up to 1.
            loss.penalty = self.gates.penalty() * (encoded.num_frames.sum() / divisor)
        return loss

    @abstractmethod
    def loss(
        self,
        encoded: Encoded,
        frame_mask: Tensor | None,
        targets: Targets,
        divisor: float | Tensor,
        *,
        cosines: bool = False,
    ) -> DistillationLoss:
        """Return the loss of an encoded batch, the sum over frames divided by ``divisor``; see `forward`."""

    def encode(self, waveforms: Tensor, lengths: Lengths, frame_mask: Tensor | None) -> Encoded:
        """Run the student, with augmentation in training mode."""
        augment = augmentation(self.spec_augment, self.training)
        layers, head_inputs, num_frames = self.student.layer_outputs(waveforms, lengths, frame_mask, augment)
        return Encoded(layers, head_inputs, num_frames, padding_mask(num_frames, layers[0].shape[1]))


class Objective(pydantic.BaseModel, ABC, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Settings of a training objective, and all that the training asks of it.

    A subclass narrows ``objective`` to a `Literal` with its name, adds its keys, and is listed in `AnyObjective`, or is named by an
    entry point of another package.
    """

    objective: str
    """Name of the objective."""

    uses_heads: ClassVar[bool] = False
    """Whether the objective trains the student's heads."""
    validates_masked: ClassVar[bool] = False
    """Whether validation masks the student's input, if training draws masks of its own (``train.masks: fresh``)."""

    @abstractmethod
    def check_student(self, config: StudentConfig) -> None:
        """Raise ValueError if a student of this architecture cannot learn with this objective."""

    def check_targets(self, config: StudentConfig, num_layers: int, dim: int) -> None:
        """Raise ValueError if such a student cannot learn from ``num_layers`` teacher layers of width ``dim``."""
        config.check_targets(num_layers, dim)

    def check_source(self, codec: str, *, cached: bool, draws: int, fresh_masks: bool) -> None:
        """Raise ValueError if the objective cannot learn from such targets.

        Args:
            codec: Codec of the cache.
            cached: Whether the targets come from a cache.
            draws: Number of cached mask draws.
            fresh_masks: Whether training draws masks of its own.
        """

    def changed_options(self) -> dict[str, Any]:
        """Return the keys whose values are not the defaults, without ``objective``."""
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        return {name: value for name, value in self.model_dump(mode="json").items() if value != defaults[name]}

    def targets_of(self, batch: Batch) -> Targets:
        """Return the targets of a batch, on its device, in the form that `Distiller.forward` takes."""
        return batch.targets

    def constant_loss(self, variance: Tensor) -> float | None:
        """Return the validation loss of the best prediction that is the same for all frames.

        Args:
            variance: (L,) variance of each layer's targets, averaged over channels.

        Returns:
            The loss, or None if it is not a function of the variances.
        """
        return None

    def target_size(self, variance: Tensor) -> float | None:
        """Return the size of the loss of targets with some variance, by which several teachers are balanced.

        Args:
            variance: (L,) variance of each layer's targets, averaged over channels.

        Returns:
            The size, or None if the objective has none, because it does not compare features.
        """
        return None

    @abstractmethod
    def distiller(
        self, student: Student, *, spec_augment: SpecAugment | None, seed: int, symbols: SymbolLayout | None = None
    ) -> Distiller:
        """Return the module with student and loss.

        Args:
            student: The student to train or validate.
            spec_augment: Augmentation in training mode. None disables it.
            seed: Seed of everything random in the objective.
            symbols: Layout of discrete targets; None if the targets are features only.

        Raises:
            ValueError: The objective needs discrete targets, and there are none.
        """


class FeatureObjective(Objective, frozen=True):
    """Settings of an objective that compares real numbers of student and teacher."""

    loss: Annotated[ErrorKind, CHANGES_LOSS_MEANING] = "mse"
    """Error between student and teacher: squared (``mse``) or absolute (``l1``)."""


def check_kind(kind: str) -> None:
    """Raise ValueError if the kind of error is unknown."""
    if kind not in get_args(ErrorKind):
        raise ValueError(f"the loss kind {kind!r} is not known; known kinds: {', '.join(get_args(ErrorKind))}")


def cosine_sums(similarities: Tensor, frame_mask: Tensor | None, padded: Tensor) -> Tensor:
    """Sum cosine similarities over masked and over unmasked frames.

    Args:
        similarities: (L, B, T) float.
        frame_mask: (B, T) bool, True at masked frames; None if there are none.
        padded: (B, T) bool, True at padding.

    Returns:
        (2, L + 1) float64, as `DistillationLoss.cosines`.
    """
    masked = torch.zeros_like(padded) if frame_mask is None else frame_mask & ~padded
    frames = torch.stack([masked, ~padded & ~masked]).double()
    sums = torch.einsum("lbt,kbt->kl", similarities.double(), frames)
    return torch.cat([sums, frames.sum((1, 2))[:, None]], 1)
