"""What a training changes, and the optimiser step that changes it."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ray_distill.gpu import set_up_gpu
from ray_distill.student.model.student import Student
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.objectives.objective import DistillationLoss
from ray_distill.student.training.optimizer import make_optimizer, step_if_finite
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.train_state import Stateful
from ray_distill.student.training.validation import batch_loss, make_distiller
from ray_distill.student.weights import load_tensors, load_weights
from ray_distill.teacher_cache.targets.target_batch import Batch, TargetReader


def _can_defer(device: torch.device) -> bool:
    """Return whether the host should not wait for the outcome of each step. On a CPU there is nothing to wait for."""
    return device.type == "cuda"


class TrainedParts:
    """A student with its loss, optimiser, loss scale and average, as they are before the first step. They set the seeds of PyTorch.

    Args:
        config, settings, train_reader, validation_reader, rank, initial: As for `training_loop.train`.

    Attributes:
        student, distiller: The student, and the module with it and the loss.
        optimizer, scaler: The optimiser, and the loss scale of fp16.
        average: Moving average of the weights; None without ``settings.ema_decay``.
        defers: Whether the device decides if a step is taken, and the host does not wait for it. An average of the weights needs each
            outcome, and only a fused optimiser leaves the decision to the device.
    """

    def __init__(
        self,
        config: StudentConfig,
        settings: TrainSettings,
        train_reader: TargetReader,
        validation_reader: TargetReader,
        rank: Rank,
        initial: Path | None = None,
    ) -> None:
        self._settings, self._factor = settings, rank.world_size
        set_up_gpu(rank.device)
        torch.manual_seed(settings.seed)
        self.student = Student(config).to(rank.device)
        if initial is not None:
            load_weights(self.student, load_tensors(initial), initial)
        self.student.checkpoint_activations = settings.checkpoint_activations
        self.student.compile_layers = settings.compile
        # Without masks the mask embedding is unused, and DDP would wait for its gradient.
        self.student.mask_embedding.requires_grad_(train_reader.draws != 0 and settings.mask_embedding == "learned")
        self.distiller = make_distiller(self.student, settings, train_reader, validation_reader).to(rank.device)
        self._parameters = list(self.distiller.parameters())  # To find them takes the host milliseconds.
        # Ranks start from the same weights, but draw different dropout masks.
        torch.manual_seed(settings.seed * 1_000_003 + 1 + rank.index)
        self.optimizer = make_optimizer(self.distiller, settings)
        self.scaler = GradScaler(rank.device.type, enabled=settings.precision == "fp16")
        self.average: AveragedModel | None = None
        if settings.ema_decay is not None:
            average = get_ema_multi_avg_fn(settings.ema_decay)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(self.student, multi_avg_fn=average)
        self.defers = _can_defer(rank.device) and self.average is None and settings.optimizer == "adamw"

    def to_save(self) -> dict[str, Stateful]:
        """Return the parts of a checkpoint, by name."""
        parts: dict[str, Stateful] = {
            "student": self.student,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
        }
        if len(self.distiller.predictors.state_dict()):
            parts["predictors"] = self.distiller.predictors
        if self.distiller.gates is not None:
            parts["gates"] = self.distiller.gates
        if self.average is not None:
            parts["average"] = self.average
        return parts

    def backward(
        self,
        model: nn.Module,
        batch: Batch,
        frames: int,
        *,
        epoch: int,
        step: int,
        lengths: Sequence[int],
        cosines: bool = False,
    ) -> DistillationLoss:
        """Run forward and backward for one batch, and return its loss.

        Args:
            model: The distiller, or a DDP wrapper of it.
            batch: The batch, on the device.
            frames: Number of frames that the loss is divided by.
            epoch, step: 0-based epoch and optimiser step.
            lengths: ``batch.lengths`` on the host.
            cosines: Whether to compute cosine similarities as well. Default False.
        """
        self.distiller.set_progress(epoch, step)
        if self.distiller.gates is not None:
            self.distiller.gates.step = step
        loss = batch_loss(model, batch, self._settings, frames, cosines=cosines, lengths=lengths)
        # DDP averages gradients over ranks, but their sum is needed. If a loss is not finite, its gradients may still
        # be (with L1 they are); the factor then makes them NaN, which informs every rank at no cost.
        factor = self._factor + 0 * loss.total.detach()
        minimised = loss.total if loss.penalty is None else loss.total + loss.penalty
        self.scaler.scale(minimised * factor).backward()  # type: ignore[no-untyped-call]
        return loss

    def gradient_norm(self) -> Tensor:
        """Return the () norm of the gradients, from which the loss scale is removed."""
        self.scaler.unscale_(self.optimizer)
        return nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])

    def update(self, norm: Tensor) -> None:
        """Update weights and average, or nothing if the gradient norm is not finite."""
        if not self.defers and not math.isfinite(float(norm)):
            return
        if self._settings.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self._settings.max_grad_norm, norm)
        if self.defers:
            step_if_finite(self.optimizer, norm)
        else:
            self.scaler.step(self.optimizer)
        if self.average is not None:
            self.average.update_parameters(self.student)

    def end_step(self) -> None:
        """Adapt the loss scale, and drop the gradients."""
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
