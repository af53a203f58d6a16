"""Settings of structured pruning (DPHuBERT, arXiv 2305.17651)."""

from typing import Literal, Self

import pydantic

from ray_distill.student.model.student_config import StudentConfig

Part = Literal["channels", "heads", "units", "blocks"]
"""What a gate can remove."""


class PruneSettings(pydantic.BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Structured pruning in a first phase of the training (DPHuBERT). Gates close while the student learns; what they closed is
    removed, and the smaller student is trained in the second phase as all other keys say. The defaults are the published ones."""

    sparsity: float = pydantic.Field(gt=0, lt=1)
    """Share of the student's parameters to remove, without those of the heads."""
    steps: int = pydantic.Field(default=50_000, ge=1)
    """Optimiser steps of the first phase. ``train.epochs`` and ``train.max_steps`` count those of the second."""
    rise_steps: int = pydantic.Field(default=5_000, ge=1)
    """Optimiser steps in which the sparsity rises linearly from 0 to ``sparsity``."""
    remove: tuple[Part, ...] = pydantic.Field(default=("channels", "heads", "units"), min_length=1)
    """What has gates and may be removed: ``channels`` of all convolutions but the last, attention ``heads``, hidden ``units`` of the
    feed-forward parts, and ``blocks``: the whole attention or feed-forward part of a layer."""
    weight_learning_rate: float = pydantic.Field(default=2e-4, gt=0)
    """Peak learning rate of the weights in the first phase."""
    warmup_steps: int = pydantic.Field(default=15_000, ge=0)
    """Optimiser steps of the first phase in which both learning rates rise linearly from 0; after them they fall linearly to 0."""
    gate_learning_rate: float = pydantic.Field(default=0.02, gt=0)
    """Peak learning rate of the gates and of the multipliers of the sparsity's loss."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        for key, what in (("rise_steps", "the sparsity"), ("warmup_steps", "the learning rate")):
            if getattr(self, key) > self.steps:
                raise ValueError(
                    f"train.prune.{key} {getattr(self, key):,} is more than train.prune.steps {self.steps:,}, so {what} would not be "
                    "reached; lower it"
                )
        if len(set(self.remove)) < len(self.remove):
            raise ValueError(f"train.prune.remove names a part twice: {', '.join(self.remove)}; name each once")
        return self

    def check_student(self, config: StudentConfig) -> None:
        """Raise ValueError if a student of this architecture can't be pruned."""
        if config.layer_type != "transformer":
            raise ValueError(
                f"train.prune prunes Transformer layers; student.layer_type {config.layer_type} can't be pruned"
            )
        if "heads" in self.remove and any(config.reuses):
            raise ValueError(
                "train.prune.remove heads does not go with student.attention_reuse, because a reused map has the heads of an earlier "
                "layer; set it to none, or leave heads out"
            )
        if "blocks" in self.remove and any(config.reuses):
            raise ValueError(
                "train.prune.remove blocks does not go with student.attention_reuse, because later layers need the map of a removed "
                "one; set it to none, or leave blocks out"
            )
        if "channels" in self.remove and config.patches is not None:
            raise ValueError("train.prune.remove channels does nothing for a student of patches; leave channels out")
        if "channels" in self.remove and config.conv_norm != "group_norm":
            raise ValueError(
                "train.prune.remove channels needs student.conv_norm group_norm: a layer norm averages over the channels, so none "
                "can be removed exactly; leave channels out"
            )
