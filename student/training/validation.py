"""Loss of a batch in the training's precision, and validation over a split."""

from contextlib import nullcontext

import numpy as np
import torch
from torch import nn

from ray_distill.student.model.student import Student
from ray_distill.student.objectives.objective import DistillationLoss, Distiller
from ray_distill.student.training.metrics import cosine_row
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.teacher_cache.targets.batch_sampler import cut_by_seconds
from ray_distill.teacher_cache.targets.target_batch import Batch, TargetReader


def make_distiller(student: Student, settings: TrainSettings) -> Distiller:
    """Return the module with the student and the loss of the settings' objective."""
    objective = settings.chosen_objective
    return objective.distiller(student, spec_augment=settings.spec_augment, seed=settings.seed)


def batch_loss(
    model: nn.Module, batch: Batch, settings: TrainSettings, normalizer: float | None = None, *, cosines: bool = False
) -> DistillationLoss:
    """Return the loss of a batch, computed under autocast where the settings' precision asks for it.

    Args:
        model: A `Distiller`, or a DDP wrapper of one.
        batch: The batch, on the model's device.
        settings: Settings of the training.
        normalizer, cosines: As for `Distiller.forward`.
    """
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]
    with nullcontext() if dtype is None else torch.autocast(batch.waveforms.device.type, dtype):
        loss: DistillationLoss = model(
            batch.waveforms, batch.lengths, batch.frame_mask, batch.targets, normalizer, cosines=cosines
        )
    return loss


@torch.no_grad()
def validate(student: Student, reader: TargetReader, settings: TrainSettings, rank: Rank) -> dict[str, float]:
    """Compare the student on unmasked input with clean targets over the whole validation split.

    Returns:
        Means per real frame, the same on every rank: ``loss`` (weighted), ``layer_NN`` (unweighted) and
        ``cosine_unmasked_layer_NN``.
    """
    distiller = make_distiller(student, settings).eval()
    longest_first = np.argsort(-reader.num_samples, kind="stable").tolist()
    if settings.batch_size is not None:
        starts = range(0, len(longest_first), settings.batch_size)
        batches = [longest_first[start : start + settings.batch_size] for start in starts]
    else:
        assert settings.batch_seconds is not None
        batches = cut_by_seconds(longest_first, reader.num_samples, settings.batch_seconds)
    losses = torch.zeros(len(reader.layers) + 1, dtype=torch.float64, device=rank.device)
    cosines = torch.zeros(2, len(reader.layers) + 1, dtype=torch.float64, device=rank.device)
    for indices in batches[rank.index :: rank.world_size]:
        batch = reader.read(indices, None).to(rank.device)
        loss = batch_loss(distiller, batch, settings, 1.0, cosines=True)
        losses += torch.cat([loss.total[None], loss.per_layer]).double()
        assert loss.cosines is not None
        cosines += loss.cosines
    distiller.train()
    rank.sum(losses)
    rank.sum(cosines)
    total, *layers = (losses / cosines[1, -1]).tolist()
    by_layer = {f"layer_{layer:02d}": loss for layer, loss in zip(reader.layers, layers, strict=True)}
    return {"loss": total} | by_layer | cosine_row(cosines, reader.layers)
