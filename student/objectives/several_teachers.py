"""Weighted sums of the losses of several teachers, each with an objective and targets of its own.

Every teacher's loss is that of its objective alone, divided by the frames of the optimiser step. An utterance that a teacher lacks
adds nothing to its loss. A weight may depend on the domain of the utterance; see `domain_losses`. How the losses are balanced:

- ``weights``: the sum of weight * loss.
- ``variance``: weight * loss / size, where the size follows from the variance of the teacher's targets (`Objective.target_size`).
- ``uncertainty``: weight * (exp(-s) * loss + s) with a learnt s for each teacher, the log variance of its error (Kendall et al.,
  arXiv 1705.07115), which begins at 0. The minimum over s is at the log of the loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self, cast

import pydantic
import torch
from torch import Tensor, nn

from ray_distill.student.model.student import Student
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.objectives.codebook_prediction import CodebookPrediction
from ray_distill.student.objectives.composite import CompositeDistiller
from ray_distill.student.objectives.domain_losses import added, chosen_rows, rows_by_domain
from ray_distill.student.objectives.layer_prediction import LayerDistiller, LayerPrediction
from ray_distill.student.objectives.masked_prediction import MaskedPrediction
from ray_distill.student.objectives.objective import (
    DistillationLoss,
    Distiller,
    Encoded,
    Objective,
    Targets,
    TeachersTargets,
)
from ray_distill.student.objectives.teacher_heads import TeacherHeads
from ray_distill.student.objectives.temporal_relation import TemporalRelation
from ray_distill.student.objectives.unit_prediction import UnitPrediction
from ray_distill.student.training.spec_augment import SpecAugment
from ray_distill.teacher_cache.targets.domains import Weight, counted_domains, counts
from ray_distill.teacher_cache.targets.target_batch import Batch, SymbolLayout

Balance = Literal["weights", "variance", "uncertainty"]
"""How the losses of several teachers are balanced."""

Aggregate = Literal["heads", "average", "concatenate"]
"""How a student learns from several teachers: with heads for each, or from one target for all."""

TEACHER_OBJECTIVES = (LayerPrediction, TemporalRelation, UnitPrediction, CodebookPrediction)
"""Objectives with which a student can learn from one of several teachers."""
TeacherObjective = Annotated[
    LayerPrediction | TemporalRelation | UnitPrediction | CodebookPrediction, pydantic.Field(discriminator="objective")
]
"""Settings of the objective of one of several teachers."""


class TeacherTerm(pydantic.BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """The part of one teacher in the loss."""

    name: str
    """Name of the teacher."""
    settings: TeacherObjective
    """Its objective."""
    weight: Weight = 1.0
    """Weight of its loss, or of its loss for each domain; none is negative."""
    start_step: int = pydantic.Field(default=0, ge=0)
    """First optimiser step, counted from 0, at which it takes part."""
    stop_step: int | None = pydantic.Field(default=None, ge=1)
    """First optimiser step at which it takes no more part. None for the end of the training."""
    num_layers: int
    """Number of its layers."""
    dim: int
    """Its width."""

    def counts_at(self, step: int) -> bool:
        """Return whether the teacher takes part in a 0-based optimiser step."""
        return self.start_step <= step and (self.stop_step is None or step < self.stop_step)


class SeveralTeachers(Objective, frozen=True):
    """A weighted sum of the losses of several teachers."""

    objective: Literal["several_teachers"] = "several_teachers"
    terms: tuple[TeacherTerm, ...]
    """The teachers."""
    balance: Balance = "weights"
    """How their losses are balanced."""

    @pydantic.model_validator(mode="after")
    def _check_terms(self) -> Self:
        if not any(counts(term.weight) and term.counts_at(0) for term in self.terms):
            raise ValueError(
                "teachers: no teacher takes part in the first step; give one of them a positive weight and start_step 0"
            )
        for term in self.terms:
            if term.stop_step is not None and term.stop_step <= term.start_step:
                raise ValueError(
                    f"teachers.{term.name}: stop_step {term.stop_step} is not after start_step {term.start_step}, so the teacher "
                    "would never take part; give a larger stop_step"
                )
            if self.balance == "variance" and not isinstance(term.settings, LayerPrediction):
                raise ValueError(
                    f"train.balance variance divides by the variance of features, but teacher {term.name} has the objective "
                    f"{term.settings.objective}; choose weights or uncertainty"
                )
        return self

    @property
    def owner(self) -> int:
        """Number of the teacher that the student's own heads predict: the first whose objective uses heads, or else the first."""
        return next((k for k, term in enumerate(self.terms) if term.settings.uses_heads), 0)

    @property
    def uses_heads(self) -> bool:  # type: ignore[override]
        """See `Objective.uses_heads`."""
        return any(term.settings.uses_heads for term in self.terms)

    @property
    def validates_masked(self) -> bool:  # type: ignore[override]
        """See `Objective.validates_masked`."""
        return any(term.settings.validates_masked for term in self.terms)

    def check_student(self, config: StudentConfig) -> None:
        """See `Objective.check_student`."""
        headless = config.without_heads()
        for term in self.terms:
            of_term = config.model_copy(update={"split_heads": term.num_layers}) if config.heads == "split" else config
            no_heads = self.uses_heads and isinstance(term.settings, MaskedPrediction)
            try:
                term.settings.check_student(headless if no_heads else of_term)
            except ValueError as error:
                raise ValueError(f"teachers.{term.name}: {error}") from error
        with_heads = sum(term.settings.uses_heads for term in self.terms)
        inner = config.heads == "split" or config.head_dim is not None
        if with_heads > 1 and inner and config.time_reduction is not None:
            raise ValueError(
                "teachers: heads of several teachers that are split or have a head_dim do not go with student.time_reduction; set "
                "student.heads to layerwise without head_dim, or remove student.time_reduction"
            )

    def check_targets(self, config: StudentConfig, num_layers: int, dim: int) -> None:
        """See `Objective.check_targets`. The numbers of layers and the widths of the teachers are those of the terms."""
        for k, term in enumerate(self.terms):
            if isinstance(term.settings, MaskedPrediction):
                continue
            if k == self.owner:
                term.settings.check_targets(config, term.num_layers, term.dim)
            elif config.heads != "split" and term.num_layers != config.num_predictions:
                with_heads = "" if config.head_layers is None else " with heads"
                raise ValueError(
                    f"teachers.{term.name}: the student has {config.num_predictions} layers{with_heads}, but it is to learn "
                    f"{term.num_layers} of this teacher, one with each; set student.heads to split, or choose "
                    f"{config.num_predictions} with its key layers, if it has as many"
                )

    def targets_of(self, batch: Batch) -> Targets:
        """See `Objective.targets_of`."""
        assert batch.present is not None
        of_terms = (term.settings.targets_of(batch.of_teacher(k)) for k, term in enumerate(self.terms))
        return TeachersTargets(tuple(cast(Tensor, targets) for targets in of_terms), batch.present, batch.domains)

    def constant_loss(self, variance: Tensor) -> float | None:
        """See `Objective.constant_loss`; ``variance`` has the layers of all teachers, one after another."""
        weights = [term.weight for term in self.terms if not isinstance(term.weight, dict)]
        if self.balance != "weights" or len(weights) < len(self.terms):
            return None
        parts = variance.split_with_sizes([term.num_layers for term in self.terms])
        losses = [term.settings.constant_loss(part) for term, part in zip(self.terms, parts, strict=True)]
        if any(loss is None for loss in losses):
            return None
        return sum(weight * cast(float, loss) for weight, loss in zip(weights, losses, strict=True))

    def distiller(
        self, student: Student, *, spec_augment: SpecAugment | None, seed: int, symbols: SymbolLayout | None = None
    ) -> "SeveralDistiller":
        """See `Objective.distiller`, for teachers without discrete targets."""
        return self.distiller_for(student, [symbols] * len(self.terms), spec_augment=spec_augment, seed=seed)

    def distiller_for(
        self,
        student: Student,
        symbols: Sequence[SymbolLayout | None],
        *,
        spec_augment: SpecAugment | None,
        seed: int,
        sizes: Sequence[float] | None = None,
    ) -> "SeveralDistiller":
        """Return the module with student and loss.

        Args:
            student, spec_augment, seed: As for `Objective.distiller`.
            symbols: Layout of each teacher's discrete targets; None for features.
            sizes: Size of each teacher's loss, with ``balance`` variance. Default None: 1 for all.
        """
        made = []
        for k, (term, layout) in enumerate(zip(self.terms, symbols, strict=True)):
            part = term.settings.distiller(student, spec_augment=None, seed=seed, symbols=layout)
            if isinstance(part, LayerDistiller) and k != self.owner:
                part.use_heads(TeacherHeads(student.config, term.num_layers, term.dim))
            made.append(part)
        return SeveralDistiller(student, self.terms, made, LossBalance(self.balance, len(made), sizes), spec_augment)


@dataclass
class SeveralLoss(DistillationLoss):
    """The losses of several teachers. ``per_layer`` has the layers of all teachers, one after another.

    ``hint`` and ``final`` are the sums of the teachers' ones times their weights, before the losses are balanced.

    Attributes:
        parts: Loss of each teacher, before it is weighted.
        domains: For each teacher the losses of the domains for which it has a weight, before they are weighted.
    """

    parts: tuple[DistillationLoss, ...] = ()
    domains: tuple[dict[str, Tensor], ...] = ()

    def agreement(self) -> Tensor:
        """Return those of the teachers (2, 2, sum of L + 1), one after another."""
        return torch.cat([part.agreement() for part in self.parts], -1)

    def teachers(self) -> Tensor:
        """See `DistillationLoss.teachers`."""
        losses = ((part.total, *domains.values()) for part, domains in zip(self.parts, self.domains, strict=True))
        return torch.stack([loss.detach() for of_teacher in losses for loss in of_teacher])


class LossBalance(nn.Module):
    """The factor of each teacher's loss; see this file's docstring.

    Args:
        kind: How the losses are balanced.
        count: Number of teachers.
        sizes: Sizes of the losses for ``variance``. Default None: 1 for all, to be replaced by those of a checkpoint.

    Attributes:
        kind: How the losses are balanced.
        sizes: (K,) float32, stored in checkpoints; None unless ``kind`` is ``variance``.
        log_variance_bias: (K,) float32 parameter; None unless ``kind`` is ``uncertainty``. By its name it has no weight decay.
    """

    def __init__(self, kind: Balance, count: int, sizes: Sequence[float] | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.sizes: Tensor | None
        given = torch.tensor(sizes or [1.0] * count, dtype=torch.float32) if kind == "variance" else None
        self.register_buffer("sizes", given)
        self.log_variance_bias = nn.Parameter(torch.zeros(count)) if kind == "uncertainty" else None

    def factors(self, count: int) -> list[float]:
        """Return the current factor of each teacher's loss, without its weight."""
        if self.log_variance_bias is not None:
            return [math.exp(-value) for value in self.log_variance_bias.tolist()]
        return [1.0] * count if self.sizes is None else [1 / size for size in self.sizes.tolist()]

    def forward(self, teacher: int, loss: Tensor, share: Tensor) -> Tensor:
        """Return the balanced loss of a teacher.

        Args:
            teacher: Number of the teacher.
            loss: () float.
            share: () float, share of the optimiser step's frames that the loss is about. The shares of a step's batches add up to
                at most 1.
        """
        if self.log_variance_bias is not None:
            log_variance = self.log_variance_bias[teacher]
            return (-log_variance).exp() * loss + log_variance * share
        return loss if self.sizes is None else loss / self.sizes[teacher]


class SeveralDistiller(CompositeDistiller):
    """A student and the losses of several teachers, from one forward pass of the student.

    A teacher that takes no part in a step has the weight 0, but is computed, because DDP waits for the gradient of each of its
    parameters. Validation always counts all teachers.

    Args:
        student: The student.
        terms: The teachers.
        parts: Distiller of each teacher, with this student.
        balance: Balance of the losses.
        spec_augment: Augmentation of the student's features in training mode. None disables it.
    """

    def __init__(
        self,
        student: Student,
        terms: Sequence[TeacherTerm],
        parts: Sequence[Distiller],
        balance: LossBalance,
        spec_augment: SpecAugment | None,
    ) -> None:
        super().__init__(student, parts, spec_augment)
        self.terms = tuple(terms)
        self.predictors.append(balance)

    @property
    def balance(self) -> LossBalance:
        """Balance of the losses."""
        return cast(LossBalance, self.predictors[-1])

    def counted(self) -> list[bool]:
        """Return for each teacher whether it takes part in the current step of a training, or in a validation."""
        return [not self.training or term.counts_at(self._step) for term in self.terms]

    def row_fields(self) -> dict[str, float]:
        """Return the factor of each teacher's loss as ``teacher_weight_NAME``, by domain as ``teacher_weight_NAME.DOMAIN``."""
        fields = {}
        factors = self.balance.factors(len(self.terms))
        for term, counted, factor in zip(self.terms, self.counted(), factors, strict=True):
            weights = term.weight if isinstance(term.weight, dict) else {"": term.weight}
            for domain, weight in weights.items():
                name = f"{term.name}.{domain}" if domain else term.name
                fields[f"teacher_weight_{name}"] = counted * weight * factor
        return fields

    def loss(
        self,
        encoded: Encoded,
        frame_mask: Tensor | None,
        targets: Targets,
        divisor: float | Tensor,
        *,
        cosines: bool = False,
    ) -> SeveralLoss:
        """See `Distiller.loss`."""
        assert isinstance(targets, TeachersTargets)
        found, balanced, hints, finals, by_domain = [], [], [], [], []
        for k, (part, term, counted) in enumerate(zip(self.parts, self.terms, self.counted(), strict=True)):
            lacking = ~targets.present[:, k]
            seen = encoded._replace(padded=encoded.padded | lacking[:, None])
            losses = {}
            for domain, weight, rows in rows_by_domain(term.weight, targets.domains):
                some, mask, wanted = chosen_rows(rows, seen, frame_mask, targets.wanted[k])
                loss = part.loss(some, mask, wanted, divisor, cosines=cosines)
                share = (~some.padded).sum() / divisor
                balanced.append(self.balance(k, loss.total, share) * (weight * counted))
                hints.append(loss.hint * weight)
                finals.append(loss.final * weight)
                losses[domain] = loss
            found.append(added(list(losses.values())))
            none = found[k].total.new_zeros(())
            domains = counted_domains(term.weight)
            by_domain.append({domain: losses[domain].total if domain in losses else none for domain in domains})
        return SeveralLoss(
            sum(balanced[1:], start=balanced[0]),
            torch.stack(hints).sum(),
            torch.stack(finals).sum(),
            torch.cat([loss.per_layer for loss in found]),
            parts=tuple(found),
            domains=tuple(by_domain),
        )
