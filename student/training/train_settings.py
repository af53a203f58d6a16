"""How a student is trained: every hyper-parameter of a recipe, with the published value as default."""

from typing import Annotated, Literal, Self

import pydantic

from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.training.field_effects import CHANGES_LOSS_MEANING
from ray_distill.student.training.spec_augment import SpecAugment

_OBJECTIVE_KEYS = {
    "prediction": ("hint_weight", "final_weight", "hint_layers", "cosine_weight"),
    "star": ("relation_weights",),
}
"""Keys that the other objective has no use for."""


class TrainSettings(pydantic.BaseModel, frozen=True, extra="forbid"):
    """Training settings; defaults are ARMHuBERT-S-100h's.

    Attributes:
        targets: ``cached`` reads them from a cache; ``online`` runs the teacher in the loop (the comparison).
        epochs: passes over the training split.
        max_steps: stop after this many optimiser steps, and lay the schedule out over them; None: as epochs say.
        batch_size: utterances per worker and batch, as published; None when batch_seconds is given.
        batch_seconds: padded seconds of audio per worker and batch, instead of batch_size.
        accumulate: batches per optimiser step.
        workers: Ray Train workers (DDP ranks).
        use_gpu: one GPU per worker.
        precision: ``fp32``, ``bf16``, or ``fp16`` with loss scaling, which needs use_gpu.
        learning_rate: peak; 5e-3 with attention reuse, 5e-4 without (published).
        warmup_fraction: of all steps, linear from 0; then linear to 0 at the end.
        betas, eps, weight_decay: AdamW. The published yaml says weight decay 1e-6, but its optimiser's parameter groups
            override it: 0.01 on everything but biases.
        objective: ``prediction``: heads predict the teacher's layers (ARMHuBERT, DistilHuBERT); ``star``: temporal relations
            between frames are learnt (`ray_distill.student.objectives.temporal_relation`), by a student without heads.
        hint_weight: of ``prediction``: on the sum over layers below the last.
        final_weight: of ``prediction``: on the last layer.
        loss: ``mse`` or ``l1``.
        cosine_weight: of ``prediction``: on DistilHuBERT's second term, ``-log sigmoid(cos)``; 0 (published ARMHuBERT) leaves it out.
        relation_weights: of ``star``: on layer-wise and on intra-layer relations.
        hint_layers: of ``prediction``: of the layers below the last, so many drawn anew for each epoch (published
            ``distil_random_layer``) take part; None: all.
        count_padding: divide the loss by padded frames too, as the published code does. A cache has no targets for them, so
            they add no error.
        spec_augment: a policy (`spec_augment.SpecAugment`), ``{}`` for the published one; None leaves features alone.
        mask_embedding: ``learned``; ``frozen`` as it was drawn; or ``teacher``: the teacher's, frozen, which needs a student as wide.
        init_front_end: start from the teacher's convolutions and projection; the student's must have their shapes.
        init_encoder_layers: start from so many of the teacher's first layers, and its position convolution.
        max_grad_norm: clip gradients to this norm; None (published) does not clip.
        max_skipped_steps: a step whose loss or gradient is not finite is left out; the run stops after this many in a row.
            Ten leave a rare bad batch behind, and do not let a diverged run go on for hours. Under fp16 the steps by which
            the loss scale is looked for don't count while it can still fall.
        checkpoint_activations: keep only what each encoder layer gives and compute the rest again in backward: less memory for
            more time, for batches that would not fit. Changes no number.
        ema_decay: of an exponential moving average of the weights, as 0.999; it is then what is validated and exported.
            None (published) keeps none.
        draw_order: which mask draw an epoch trains with: ``rotate`` takes them in turn, ``in_order`` spreads them over the
            run, so that draws with policies of their own (masks.policies) make a schedule.
        validate_every: optimiser steps between validations (one more at the end); each is followed by a checkpoint.
        checkpoint_every: optimiser steps between checkpoints, besides those; None makes no others.
        keep_best: students kept of those that were validated.
        log_every: optimiser steps between metric rows.
        trackers: of ``wandb`` and ``mlflow``, what metrics are also sent to; see `training.metrics`. Default none.
        max_failures: how often a failed worker group is started again from the last checkpoint.
        seed: of initialisation, order and dropout.
    """

    targets: Literal["cached", "online"] = "cached"
    epochs: int = pydantic.Field(default=200, ge=1)
    max_steps: int | None = pydantic.Field(default=None, ge=1)
    batch_size: int | None = pydantic.Field(default=None, ge=1)
    batch_seconds: float | None = pydantic.Field(default=None, gt=0)
    accumulate: int = pydantic.Field(default=1, ge=1)
    workers: int = pydantic.Field(default=1, ge=1)
    use_gpu: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    learning_rate: float = pydantic.Field(default=5e-3, gt=0)
    warmup_fraction: float = pydantic.Field(default=0.05, ge=0, le=1)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.01
    objective: Annotated[Literal["prediction", "star"], CHANGES_LOSS_MEANING] = "prediction"
    hint_weight: Annotated[float, CHANGES_LOSS_MEANING] = 0.1
    final_weight: Annotated[float, CHANGES_LOSS_MEANING] = 1.0
    loss: Annotated[Literal["mse", "l1"], CHANGES_LOSS_MEANING] = "mse"
    cosine_weight: Annotated[float, CHANGES_LOSS_MEANING] = pydantic.Field(default=0.0, ge=0)
    relation_weights: Annotated[tuple[float, float], CHANGES_LOSS_MEANING] = (1.0, 1.0)
    hint_layers: int | None = pydantic.Field(default=None, ge=1)
    count_padding: bool = False
    spec_augment: SpecAugment | None = None
    mask_embedding: Literal["learned", "frozen", "teacher"] = "learned"
    init_front_end: bool = False
    init_encoder_layers: int = pydantic.Field(default=0, ge=0)
    max_grad_norm: float | None = pydantic.Field(default=None, gt=0)
    max_skipped_steps: int = pydantic.Field(default=10, ge=1)
    checkpoint_activations: bool = False
    ema_decay: float | None = pydantic.Field(default=None, gt=0, lt=1)
    draw_order: Literal["rotate", "in_order"] = "rotate"
    validate_every: int = pydantic.Field(default=1000, ge=1)
    checkpoint_every: int | None = pydantic.Field(default=None, ge=1)
    keep_best: int = pydantic.Field(default=1, ge=1)
    log_every: int = pydantic.Field(default=10, ge=1)
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    max_failures: int = pydantic.Field(default=2, ge=0)
    seed: int = pydantic.Field(default=0, ge=0)

    @pydantic.model_validator(mode="after")
    def _possible(self) -> Self:
        if (self.batch_size is None) == (self.batch_seconds is None):
            raise ValueError("give exactly one of train.batch_size and train.batch_seconds")
        if self.precision == "fp16" and not self.use_gpu:
            raise ValueError("train.precision fp16 needs train.use_gpu true; on a CPU use fp32 or bf16")
        if self.draw_order == "in_order" and self.targets == "online":
            raise ValueError(
                "train.draw_order in_order needs train.targets cached: online targets never run out of draws"
            )
        other = _OBJECTIVE_KEYS["star" if self.objective == "prediction" else "prediction"]
        for key in other:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"train.{key} does nothing with train.objective {self.objective}: it belongs to the other objective; leave it out"
                )
        return self

    @property
    def starts_from_teacher(self) -> bool:
        """Whether some of the student's first weights are the teacher's."""
        return self.init_front_end or self.init_encoder_layers > 0 or self.mask_embedding == "teacher"

    def check_student(self, config: StudentConfig) -> None:
        """Raises ValueError where such a student can't be trained so."""
        if (self.objective == "star") != (config.heads == "none"):
            raise ValueError(
                f"train.objective {self.objective} does not go with student.heads {config.heads}: star compares hidden states, and "
                "needs heads none; prediction needs heads"
            )
        if self.hint_layers is not None and self.hint_layers >= config.num_predictions:
            raise ValueError(
                f"train.hint_layers is {self.hint_layers}, but there are {config.num_predictions - 1} layers below the last to draw "
                "from; give fewer, or leave it out to learn from all"
            )
