"""HuBERT's objective on the teacher's clusters (HuBERT, arXiv 2106.07447; DiceHuBERT, arXiv 2507.02911).

The last layer's output is projected to ``unit_dim`` values. The logit of a cluster is the cosine similarity of the projection and the
cluster's learnt embedding, divided by ``unit_temperature``. Each teacher layer has a projection and embeddings of its own. Initial
values are fairseq's: embeddings uniform from 0 to 1, projections PyTorch's default. fairseq's penalty on the front end's features is
left out.
"""

from typing import Annotated, ClassVar, Literal, cast

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_distill.student.model.student import Student
from ray_distill.student.objectives.masked_prediction import MaskedPrediction, SymbolDistiller
from ray_distill.student.training.field_effects import CHANGES_LOSS_MEANING
from ray_distill.student.training.spec_augment import SpecAugment
from ray_distill.teacher_cache.targets.target_batch import SymbolLayout


class UnitPrediction(MaskedPrediction, frozen=True):
    """The student predicts the teacher's clusters at masked frames (HuBERT, DiceHuBERT)."""

    objective: Literal["units"] = "units"
    unit_temperature: Annotated[float, CHANGES_LOSS_MEANING] = pydantic.Field(default=0.1, gt=0)
    """Temperature that the cosine similarities are divided by (fairseq's ``logit_temp``)."""
    unit_dim: int = pydantic.Field(default=256, ge=1)
    """Width of the projection and of the clusters' embeddings (fairseq's ``final_dim``)."""

    codec: ClassVar[str] = "units"

    def distiller(
        self, student: Student, *, spec_augment: SpecAugment | None, seed: int, symbols: SymbolLayout | None = None
    ) -> "UnitDistiller":
        """See `Objective.distiller`."""
        return UnitDistiller(student, self, self._layout(symbols), spec_augment)


class UnitPredictor(nn.Module):
    """Projection and embeddings of the clusters of one layer.

    Args:
        width: Student width d.
        clusters: Number of clusters K.
        dim: Width of the embeddings.
        temperature: Divisor of the cosine similarities.
    """

    def __init__(self, width: int, clusters: int, dim: int, temperature: float) -> None:
        super().__init__()
        self.projection = nn.Linear(width, dim)
        self.embeddings = nn.Parameter(torch.empty(clusters, dim).uniform_())
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, K) float32 of frames (N, d)."""
        projected = F.normalize(self.projection(x).float(), dim=-1)
        # Half precision is too coarse for cosines at a low temperature.
        with torch.autocast(x.device.type, enabled=False):
            return projected @ F.normalize(self.embeddings.float(), dim=-1).T / self.temperature


class UnitDistiller(SymbolDistiller):
    """A student and the objective ``units``; see `SymbolDistiller`.

    Args:
        student: The student.
        settings: Settings of the objective.
        symbols: Layout of the targets.
        spec_augment: Augmentation of the student's features in training mode. None disables it.
    """

    def __init__(
        self, student: Student, settings: UnitPrediction, symbols: SymbolLayout, spec_augment: SpecAugment | None
    ) -> None:
        super().__init__(
            student,
            masked_weight=settings.masked_weight,
            unmasked_weight=settings.unmasked_weight,
            spec_augment=spec_augment,
        )
        width = student.config.encoder_embed_dim
        self.predictors.extend(
            UnitPredictor(width, symbols.alphabet, settings.unit_dim, settings.unit_temperature)
            for _ in range(symbols.layers)
        )

    def predict(self, layer: int, x: Tensor, symbols: Tensor) -> tuple[Tensor, Tensor]:
        """See `SymbolDistiller.predict`."""
        logits = cast(UnitPredictor, self.predictors[layer])(x)
        units = symbols[:, 0]
        return F.cross_entropy(logits, units, reduction="none"), (logits.detach().argmax(-1) == units).float()
