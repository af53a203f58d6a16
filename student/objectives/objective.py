"""The interface of a training objective: its settings, its module with student and loss, and the loss that it returns."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import pydantic
import torch
from torch import Tensor, nn

from ray_distill.student.model.student import Lengths, Student
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.training.field_effects import CHANGES_LOSS_MEANING
from ray_distill.student.training.spec_augment import SpecAugment, augmentation
from ray_distill.teacher_cache.frames import padding_mask

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


class Distiller(nn.Module, ABC):
    """A student and an objective's loss in one forward pass: the module that training wraps in DDP.

    Args:
        student: The student; its parameters (under ``student.``) are all the parameters of this module.
        kind: Error between student and teacher.
        spec_augment: Augmentation of the student's features in training mode. None disables it.

    Raises:
        ValueError: unknown kind.
    """

    def __init__(self, student: Student, *, kind: ErrorKind = "mse", spec_augment: SpecAugment | None = None) -> None:
        super().__init__()
        check_kind(kind)
        self.student, self.kind, self.spec_augment = student, kind, spec_augment

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, for objectives that vary between epochs. To be called before each forward pass of a training."""

    @abstractmethod
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
        """Return the loss of a batch.

        Args:
            waveforms, lengths, frame_mask: The batch, as `Student.forward` takes it.
            targets: (B, L, T, D) float, teacher layers.
            normalizer: Number of frames that the loss is divided by. Default: the real frames of this batch. With DDP or
                gradient accumulation, give the frames of the whole step and sum the losses.
            cosines: Whether to compute cosine similarities as well.

        Raises:
            ValueError: a shape that does not fit.
        """

    def encode(
        self, waveforms: Tensor, lengths: Lengths, frame_mask: Tensor | None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Run the student, with augmentation in training mode.

        Returns:
            The inputs of the heads, or without heads the layers' outputs, (B, T, d) each; the number of real frames (B,);
            and the padding (B, T) bool.
        """
        augment = augmentation(self.spec_augment, self.training)
        _, head_inputs, num_frames = self.student.layer_outputs(waveforms, lengths, frame_mask, augment)
        return head_inputs, num_frames, padding_mask(num_frames, head_inputs[0].shape[1])


class Objective(pydantic.BaseModel, ABC, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Settings of a training objective, and all that the training asks of it.

    A subclass narrows ``objective`` to a `Literal` with its name, adds its keys, and is listed in `AnyObjective`.
    """

    objective: str
    """Name of the objective."""
    loss: Annotated[ErrorKind, CHANGES_LOSS_MEANING] = "mse"
    """Error between student and teacher: squared (``mse``) or absolute (``l1``)."""

    @abstractmethod
    def check_student(self, config: StudentConfig) -> None:
        """Raise ValueError if a student of this architecture cannot learn with this objective."""

    def constant_loss(self, variance: Tensor) -> float | None:
        """Return the validation loss of the best prediction that is the same for all frames.

        Args:
            variance: (L,) variance of each layer's targets, averaged over channels.

        Returns:
            The loss, or None if it is not a function of the variances.
        """
        return None

    @abstractmethod
    def distiller(self, student: Student, *, spec_augment: SpecAugment | None, seed: int) -> Distiller:
        """Return the module with student and loss.

        Args:
            student: The student to train or validate.
            spec_augment: Augmentation in training mode. None disables it.
            seed: Seed of everything random in the objective.
        """


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
