"""Prediction of the entries of N codebooks (MVQ-KD, arXiv 2211.00508; SPEAR, arXiv 2510.25955).

``joint`` is the default predictor of k2-fsa's ``multi_quantization``: the logits of codebook n are

    b_n + B_n x + W_n relu(A x + a + sum over m < n of E_m[i_m])

with the true entries i_m of the codebooks before n, so that entries that depend on each other are predicted together.
``independent`` is b_n + B_n x alone, its option ``is_joint=False``, which icefall's MVQ-KD and SPEAR use: one linear classifier for
each codebook. Initial values are normal with a standard deviation of 1 / sqrt(inputs), for E_m of 0.5 / sqrt(N), and 0 for b_n.
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


class CodebookPrediction(MaskedPrediction, frozen=True):
    """The student predicts the entries of the codebooks that make up the teacher's layer (MVQ-KD, SPEAR)."""

    objective: Literal["mvq"] = "mvq"
    codebooks: Annotated[Literal["joint", "independent"], CHANGES_LOSS_MEANING] = "joint"
    """Prediction of the codebooks: ``joint``, each given the entries of those before it, or ``independent``."""
    codebook_hidden: int = pydantic.Field(default=512, ge=1)
    """Width of the hidden layer of the joint prediction."""

    codec: ClassVar[str] = "mvq"

    def distiller(
        self, student: Student, *, spec_augment: SpecAugment | None, seed: int, symbols: SymbolLayout | None = None
    ) -> "CodebookDistiller":
        """See `Objective.distiller`."""
        return CodebookDistiller(student, self, self._layout(symbols), spec_augment)


class CodebookPredictor(nn.Module):
    """Classifiers of the entries of N codebooks of one layer.

    Args:
        width: Student width d.
        count: Number of codebooks N.
        size: Entries of a codebook.
        hidden: Width of the hidden layer of the joint prediction, or None for independent classifiers.
    """

    def __init__(self, width: int, count: int, size: int, hidden: int | None) -> None:
        super().__init__()
        self.direct = nn.Parameter(torch.randn(count, size, width) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(count, size))
        self.hidden: nn.Linear | None = None
        if hidden is not None:
            self.hidden = nn.Linear(width, hidden)
            self.out = nn.Parameter(torch.randn(count, size, hidden) * hidden**-0.5)
            self.entries = nn.Parameter(torch.randn(count - 1, size, hidden) * 0.5 * count**-0.5)

    def forward(self, x: Tensor, entries: Tensor) -> Tensor:
        """Return the logits (codebooks, F, size) float of frames (F, d), given their true entries (F, codebooks) int64."""
        logits = x @ self.direct.transpose(1, 2) + self.bias[:, None]
        if self.hidden is None:
            return logits
        before = [self.hidden(x)]
        for number in range(len(self.direct) - 1):
            before.append(before[-1] + self.entries[number][entries[:, number]])
        return logits + torch.stack(before).relu() @ self.out.transpose(1, 2)


class CodebookDistiller(SymbolDistiller):
    """A student and the objective ``mvq``; see `SymbolDistiller`. A frame's cross-entropy is the mean over the codebooks.

    Args:
        student: The student.
        settings: Settings of the objective.
        symbols: Layout of the targets.
        spec_augment: Augmentation of the student's features in training mode. None disables it.
    """

    def __init__(
        self, student: Student, settings: CodebookPrediction, symbols: SymbolLayout, spec_augment: SpecAugment | None
    ) -> None:
        super().__init__(
            student,
            masked_weight=settings.masked_weight,
            unmasked_weight=settings.unmasked_weight,
            spec_augment=spec_augment,
        )
        # A single codebook has none before it, so there is nothing to predict jointly.
        joint = settings.codebooks == "joint" and symbols.per_frame > 1
        self.predictors.extend(
            CodebookPredictor(
                student.config.encoder_embed_dim,
                symbols.per_frame,
                symbols.alphabet,
                settings.codebook_hidden if joint else None,
            )
            for _ in range(symbols.layers)
        )

    def predict(self, layer: int, x: Tensor, symbols: Tensor) -> tuple[Tensor, Tensor]:
        """See `SymbolDistiller.predict`."""
        logits = cast(CodebookPredictor, self.predictors[layer])(x, symbols).float()
        errors = F.cross_entropy(logits.permute(1, 2, 0), symbols, reduction="none")
        right = symbols == logits.detach().argmax(-1).T
        return errors.mean(1), right.float().mean(1)
