"""Loss of a batch in the training's precision, and validation over a split, also of the best constant prediction."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from ray_distill.student.model.student import Student
from ray_distill.student.objectives.objective import DistillationLoss, Distiller
from ray_distill.student.objectives.several_teachers import SeveralTeachers
from ray_distill.student.pruning.gates import Gates
from ray_distill.student.training.metrics import agreement_fields, empty_agreement
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.teacher_cache.frames import padding_mask
from ray_distill.teacher_cache.targets.batch_sampler import cut_by_seconds
from ray_distill.teacher_cache.targets.several_caches import TeacherTargets, layer_names, loss_names
from ray_distill.teacher_cache.targets.target_batch import Batch, TargetReader

_MEASURED = 200
"""Maximum number of utterances from which the variance of targets is measured."""


def make_distiller(
    student: Student,
    settings: TrainSettings,
    reader: TargetReader | None = None,
    validation: TargetReader | None = None,
) -> Distiller:
    """Return the module with the student and the loss of the settings' objective, and the gates if the student is pruned.

    Args:
        student: The student.
        settings: Settings of the training.
        reader: Reader of the targets, which objectives with discrete targets need. Default None.
        validation: Reader of the validation split, which ``balance`` variance needs. Default None.
    """
    distiller = _make_distiller(student, settings, reader, validation)
    if settings.prune is not None:
        distiller.gates = Gates(student.config, settings.prune, settings.seed)
    return distiller


def _make_distiller(
    student: Student, settings: TrainSettings, reader: TargetReader | None, validation: TargetReader | None
) -> Distiller:
    symbols = getattr(reader, "symbols", None)
    objective = settings.chosen_objective
    if isinstance(objective, SeveralTeachers):
        teachers: tuple[TeacherTargets, ...] = getattr(reader, "teachers", ())
        layouts = [teacher.symbols for teacher in teachers] or [None] * len(objective.terms)
        sizes = None
        if validation is not None and objective.balance == "variance":
            sizes = loss_sizes(objective, validation, student.mask_embedding.device)
        return objective.distiller_for(
            student, layouts, spec_augment=settings.spec_augment, seed=settings.seed, sizes=sizes
        )
    return objective.distiller(student, spec_augment=settings.spec_augment, seed=settings.seed, symbols=symbols)


def batch_loss(
    model: nn.Module,
    batch: Batch,
    settings: TrainSettings,
    normalizer: float | None = None,
    *,
    cosines: bool = False,
    lengths: Sequence[int] | None = None,
) -> DistillationLoss:
    """Return the loss of a batch, computed under autocast where the settings' precision asks for it.

    Args:
        model: A `Distiller`, or a DDP wrapper of one.
        batch: The batch, on the model's device.
        settings: Settings of the training.
        normalizer, cosines: As for `Distiller.forward`.
        lengths: ``batch.lengths`` on the host, with which the host does not wait for a GPU. Default: they are read from there.
    """
    targets = settings.chosen_objective.targets_of(batch)
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]
    with nullcontext() if dtype is None else torch.autocast(batch.waveforms.device.type, dtype):
        loss: DistillationLoss = model(
            batch.waveforms,
            batch.lengths if lengths is None else lengths,
            batch.frame_mask,
            targets,
            normalizer,
            cosines=cosines,
        )
    return loss


@torch.no_grad()
def validate(
    distiller: Distiller, reader: TargetReader, settings: TrainSettings, rank: Rank, *, constant: bool = False
) -> dict[str, float]:
    """Compare the student with clean targets over the whole validation split.

    Its input is unmasked, except for objectives that predict masked frames (`Objective.validates_masked`) with fresh masks: then each
    utterance has the same mask in all validations.

    Args:
        distiller: The student and its loss.
        reader: Targets of the validation split.
        settings: Settings of the training.
        rank: This process.
        constant: Whether to measure the best constant prediction too, which is the same in every validation. Default False.

    Returns:
        Means per real frame, the same on every rank: ``loss`` (weighted), with several teachers ``teacher_loss_NAME`` (before it is
        balanced, over the frames that the teacher has; also by domain, see `loss_names`), ``layer_NN`` or ``layer_NAME_NN``
        (unweighted) and ``cosine_unmasked_layer_NN`` or accuracies; with ``constant`` and the squared error also ``constant_loss`` and
        ``constant_layer_NN``, the losses of predicting the mean of the split's targets (see `TargetVariance`).
    """
    objective = settings.chosen_objective
    draw = 0 if objective.validates_masked and settings.masks == "fresh" else None
    distiller.eval()
    longest_first = np.argsort(-reader.num_samples, kind="stable").tolist()
    if settings.batch_size is not None:
        starts = range(0, len(longest_first), settings.batch_size)
        batches = [longest_first[start : start + settings.batch_size] for start in starts]
    else:
        assert settings.seconds_of_batch is not None
        batches = cut_by_seconds(longest_first, reader.num_samples, settings.seconds_of_batch)
    teachers: tuple[TeacherTargets, ...] = getattr(reader, "teachers", ())
    parts = loss_names(reader)
    losses = torch.zeros(1 + len(parts) + len(reader.layers), dtype=torch.float64, device=rank.device)
    agreement = empty_agreement(reader, rank.device)
    frames = torch.zeros_like(losses)
    variances = target_variances(reader, rank)
    for indices in batches[rank.index :: rank.world_size]:
        batch = reader.read(indices, draw).moved(rank.device)
        loss = batch_loss(distiller, batch, settings, 1.0, cosines=True)
        losses += torch.cat([loss.total[None], loss.teachers(), loss.per_layer]).double()
        agreement += loss.agreement()
        frames += _counted_frames(batch, teachers, len(losses))
        if constant:
            add_targets(variances, batch)
    distiller.train()
    rank.sum(losses)
    rank.sum(agreement)
    rank.sum(frames)
    names = layer_names(reader, reader.layers)
    fields = ["loss", *(f"teacher_loss_{part}" for part in parts), *(f"layer_{name}" for name in names)]
    row = dict(zip(fields, (losses / frames.clamp(min=1)).tolist(), strict=True))
    row |= agreement_fields(agreement, reader)
    if constant:
        per_layer = torch.cat([variance.per_layer() for variance in variances])
        if (lowest := objective.constant_loss(per_layer)) is not None:
            row["constant_loss"] = lowest
            row |= {f"constant_layer_{name}": value for name, value in zip(names, per_layer.tolist(), strict=True)}
    return row


def _counted_frames(batch: Batch, teachers: Sequence[TeacherTargets], count: int) -> Tensor:
    """Return the numbers of real frames (count,) that the loss, each teacher's loss and each layer's loss are about."""
    frames = batch.num_frames.sum()
    if batch.present is None:
        return frames.expand(count)
    of_utterances = (batch.present * batch.num_frames[:, None]).T  # (K, B)
    of_teachers = of_utterances.sum(1)
    parts = [frames]
    for k, teacher in enumerate(teachers):
        parts.append(of_teachers[k])
        for domain in teacher.domains:
            assert batch.domains is not None
            members = torch.tensor([one == domain for one in batch.domains], device=frames.device)
            parts.append((of_utterances[k] * members).sum())
    layers = [of_teachers[k].expand(len(teacher.layers)) for k, teacher in enumerate(teachers)]
    return torch.cat([torch.stack(parts), *layers])


def target_variances(reader: TargetReader, rank: Rank) -> list["TargetVariance"]:
    """Return an empty sum for each teacher of a reader."""
    teachers: tuple[TeacherTargets, ...] = getattr(reader, "teachers", ())
    shapes = [(teacher.layers, teacher.dim) for teacher in teachers] or [(reader.layers, reader.dim)]
    return [TargetVariance(len(layers), dim, rank) for layers, dim in shapes]


def add_targets(variances: Sequence["TargetVariance"], batch: Batch) -> None:
    """Count the targets of each teacher in a batch, without the utterances that the teacher lacks."""
    if batch.present is None:
        variances[0].add(batch.targets, batch.num_frames)
        return
    for k, variance in enumerate(variances):
        variance.add(batch.of_teacher(k).targets, batch.num_frames * batch.present[:, k])


def loss_sizes(objective: SeveralTeachers, reader: TargetReader, device: torch.device) -> list[float]:
    """Return the size of each teacher's loss for ``balance`` variance.

    The variance is that of the clean targets of up to 200 utterances, at even distances over the longest-first order of the split. All
    ranks read the same ones.

    Args:
        objective: The objective.
        reader: Targets of the validation split.
        device: Device on which the targets are decoded.

    Raises:
        ValueError: The targets of a teacher have no variance.
    """
    variances = target_variances(reader, Rank(device=device))
    order = np.argsort(-reader.num_samples, kind="stable").tolist()
    for index in order[:: -(-len(order) // _MEASURED)]:
        add_targets(variances, reader.read([index], None).moved(device))
    sizes = []
    for term, variance in zip(objective.terms, variances, strict=True):
        size = term.settings.target_size(variance.per_layer())
        if not size or not math.isfinite(size):
            raise ValueError(
                f"train.balance variance divides by the variance of the targets, but that of teacher {term.name} is {size}; choose "
                "weights or uncertainty"
            )
        sizes.append(size)
    return sizes


class TargetVariance:
    """Sums over the real frames of batches, from which the variance of the targets follows exactly.

    Args:
        layers: Number of layers L.
        dim: Width D.
        rank: This process.
    """

    def __init__(self, layers: int, dim: int, rank: Rank) -> None:
        self._rank = rank
        self._count = torch.zeros((), dtype=torch.float64, device=rank.device)
        self._sums = torch.zeros(2, layers, dim, dtype=torch.float64, device=rank.device)

    def add(self, targets: Tensor, num_frames: Tensor) -> None:
        """Count a batch: (B, L, T, D) float targets, and (B,) integer numbers of real frames."""
        real = ~padding_mask(num_frames, targets.shape[2])
        self._count += real.sum()
        for layer in range(targets.shape[1]):  # One layer at a time, since float64 needs twice the memory.
            frames = targets[:, layer][real].double()
            self._sums[0, layer] += frames.sum(0)
            self._sums[1, layer] += frames.square().sum(0)

    def per_layer(self) -> Tensor:
        """Return the (L,) float64 variances of all ranks' frames, averaged over the channels. Every rank must call this.

        This is the smallest squared error, averaged over D and over frames, of a prediction that is the same for all frames; the
        prediction is the mean of each channel.
        """
        count = self._rank.sum(self._count.clone())
        sums = self._rank.sum(self._sums.clone())
        mean, square = sums / count
        variance: Tensor = (square - mean.square()).clamp(min=0)
        return variance.mean(1)
