"""Settings of a training: every hyper-parameter of a recipe, with the published value as its default."""

from typing import Annotated, Any, Literal, Self

import pydantic

from ray_distill.local_paths import Local
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.objectives.objective import Objective
from ray_distill.student.objectives.objective_keys import ObjectiveKeys, objective_of
from ray_distill.student.objectives.several_teachers import Aggregate, Balance, SeveralTeachers, TeacherTerm
from ray_distill.student.pruning.prune_settings import PruneSettings
from ray_distill.student.training.field_effects import CHANGES_LOSS_MEANING, CHANGES_NO_RESULT
from ray_distill.student.training.spec_augment import SpecAugment
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.targets.fitting_batch import BatchSeconds

PRUNING_OBJECTIVES = ("prediction", "star")
"""Objectives without predictors of their own, which a training with two phases can have."""


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str | int) and not isinstance(value, bool) else value


ONE_OR_MORE = pydantic.BeforeValidator(_one_or_more)
"""Mark of a list for which a single text or number stands too: ``trackers: wandb`` is ``trackers: [wandb]``."""


class TrainSettings(ObjectiveKeys, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Settings of a training. The defaults are those of ARMHuBERT-S on 100 hours.

    The keys of all objectives are fields too: ``objective``, ``loss``, ``hint_weight`` and so on.
    """

    targets: Literal["cached", "online"] = "cached"
    """Source of the targets: ``cached`` reads them from a cache, ``online`` runs the teacher at each step, for comparison."""
    masks: Annotated[Literal["cached", "fresh"], CHANGES_LOSS_MEANING] = "cached"
    """Masks of the student's input: ``cached`` uses the cached draws (``masks.draws``), ``fresh`` draws new ones for each epoch from
    ``masks.policy``, ``masks.seed``, the epoch and the utterance's id, with the targets of the clean pass everywhere. ``fresh`` needs
    ``masks.draws: 0``."""
    epochs: int = pydantic.Field(default=200, ge=1)
    """Passes over the training split."""
    max_steps: int | None = pydantic.Field(default=None, ge=1)
    """Limit on the number of optimiser steps; the learning-rate schedule then spans these steps. None trains for all epochs."""
    batch_size: int | None = pydantic.Field(default=None, ge=1)
    """Number of utterances per worker and batch, as published. Give either this or batch_seconds."""
    batch_seconds: BatchSeconds | None = None
    """Seconds of audio per worker and batch, padding included. ``auto`` measures before the first step how many fit on the GPUs, and
    the run keeps that number when it is resumed or made longer. Needs use_gpu. Give either this or batch_size."""
    crop_seconds: float | None = pydantic.Field(default=None, ge=1)
    """Longest part of an utterance that training uses in an epoch, as in DistilHuBERT. Longer utterances are cropped at a
    random frame, drawn from the seed, the epoch and the utterance's id, with their targets and masks. The targets are those
    of the whole utterance. None uses whole utterances."""
    shuffle: Literal["full", "window"] | None = None
    """Order of the utterances of an epoch: ``full`` shuffles all of them; ``window`` shuffles the shards of the cache, and utterances
    within a window over at least 16 of them, so that shards are read one after another. None means ``window`` for a cache in an object
    store and ``full`` otherwise; a resumed run keeps the order that it has."""
    accumulate: int = pydantic.Field(default=1, ge=1)
    """Number of batches per optimiser step (gradient accumulation)."""
    workers: int = pydantic.Field(default=1, ge=1)
    """Number of workers (DDP ranks) of Ray Train. On a local Ray, a single worker is a plain Ray task, which starts sooner."""
    use_gpu: bool = False
    """Whether each worker uses a GPU."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic: ``fp32``, or autocast to ``bf16`` or ``fp16``. ``fp16`` uses loss scaling and needs use_gpu."""
    learning_rate: float = pydantic.Field(default=5e-3, gt=0)
    """Peak learning rate. Published: 5e-3 with attention reuse, 5e-4 without."""
    warmup_fraction: float = pydantic.Field(default=0.05, ge=0, le=1)
    """Share of the steps in which the learning rate rises linearly from 0; after them it falls linearly to 0."""
    optimizer: Literal["adamw", "published"] = "adamw"
    """Optimiser: PyTorch's ``adamw``, or ``published``: the update and the schedule of S3PRL's ``AdamW_with_schedule``, which adds eps
    before the bias correction, scales the weight decay by it, and counts the schedule from step 1."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's betas."""
    eps: float = 1e-6
    """AdamW's epsilon."""
    weight_decay: float = 0.01
    """AdamW's weight decay, not applied to biases. The published yaml says 1e-6, but the parameter groups of its optimiser
    override that with 0.01."""
    count_padding: bool = False
    """Whether the loss is divided by all frames, padded ones included, as in the published code. A cache has no targets for
    padded frames, so they add no error."""
    spec_augment: SpecAugment | None = None
    """SpecAugment policy; ``{}`` is the published one. None disables augmentation."""
    mask_embedding: Literal["learned", "frozen", "teacher"] = "learned"
    """Mask embedding: ``learned``, ``frozen`` at its random initial value, or ``teacher``: frozen at the teacher's, which needs
    a student of the teacher's width."""
    balance: Annotated[Balance, CHANGES_LOSS_MEANING] = "weights"
    """Balance of the losses of several teachers (``teachers``): ``weights`` adds them up with the teachers' weights, ``variance`` also
    divides each by the size that follows from the variance of the teacher's targets, and ``uncertainty`` learns a log variance s for
    each teacher, with the loss weight * (exp(-s) * loss + s)."""
    aggregate: Annotated[Aggregate, CHANGES_LOSS_MEANING] = "heads"
    """What the student predicts of several teachers (``teachers``): each one's layers with heads of their own (``heads``), or with
    one set of heads the ``average`` of the teachers' layers with their weights, or all channels side by side (``concatenate``);
    see EKD (arXiv 2302.12757)."""
    init_from: Local[str | None] = None
    """Student whose weights the training starts from: the folder of a run, an export or a checkpoint. All parts but the heads must
    have the shapes of this student's; heads with other shapes start anew. None starts from random weights."""
    init_front_end: bool = False
    """Whether convolutions and projection start from the teacher's, which must have the same shapes."""
    init_encoder_layers: int = pydantic.Field(default=0, ge=0)
    """Number of encoder layers, counted from the first, that start from the teacher's, with its position convolution."""
    init_teacher: str | None = None
    """Name of the teacher that init_front_end, init_encoder_layers and mask_embedding ``teacher`` copy from, if there are several.
    None takes the first."""
    prune: PruneSettings | None = None
    """Structured pruning in a first phase of the training: a table with ``sparsity`` and what else differs from DPHuBERT. The student
    starts as a copy of the teacher (``init_front_end``, ``init_encoder_layers``) or of ``init_from``. None prunes nothing."""
    max_grad_norm: float | None = pydantic.Field(default=None, gt=0)
    """Gradient clipping threshold (norm). None, as published, disables clipping."""
    max_skipped_steps: Annotated[int, CHANGES_NO_RESULT] = pydantic.Field(default=10, ge=1)
    """Number of consecutive steps with a loss or gradient that is not finite after which the run stops. Such steps are skipped;
    ten tolerate a rare bad batch, but end a diverged run soon. Steps by which fp16 searches its loss scale do not count while
    the scale can still fall."""
    checkpoint_activations: Annotated[bool, CHANGES_NO_RESULT] = False
    """Activation checkpointing: recompute each encoder layer in the backward pass instead of storing its activations. Uses less
    memory and more time; results do not change."""
    compile: bool = False
    """Whether torch.compile compiles the encoder layers for training, which takes a minute or two at the start and needs a C++
    compiler. One program serves all layers of a kind and all sizes of batches. Results differ by rounding and by the random
    numbers of dropout. Names of weights do not change, so checkpoints with and without it are interchangeable."""
    ema_decay: float | None = pydantic.Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, for example 0.999. The average is then validated and exported.
    None, as published, disables it."""
    draw_order: Literal["rotate", "in_order"] = "rotate"
    """Mask draw of each epoch: ``rotate`` cycles through the draws, ``in_order`` spreads them over the run, which turns draws
    with different policies (masks.policies) into a schedule."""
    validate_every: int | Literal["epoch"] = 1000
    """Optimiser steps between validations, or ``epoch``, as published: a validation after each epoch. A last validation follows
    the last step; each validation writes a checkpoint."""
    checkpoint_every: Annotated[int | None, CHANGES_NO_RESULT] = pydantic.Field(default=None, ge=1)
    """Optimiser steps between additional checkpoints. None writes checkpoints at validations only."""
    keep_best: Annotated[int, CHANGES_NO_RESULT] = pydantic.Field(default=1, ge=1)
    """Number of validated students to keep, those with the lowest validation losses."""
    log_every: int = pydantic.Field(default=10, ge=1)
    """Optimiser steps between rows of metrics."""
    trackers: Annotated[tuple[Literal["wandb", "mlflow"], ...], ONE_OR_MORE, CHANGES_NO_RESULT] = ()
    """Experiment trackers that also receive the metrics: ``wandb``, ``mlflow``."""
    max_failures: Annotated[int, CHANGES_NO_RESULT] = pydantic.Field(default=2, ge=0)
    """Number of times that failed workers are restarted from the last checkpoint."""
    seed: int = pydantic.Field(default=0, ge=0)
    """Seed of initialisation, data order and dropout."""

    @pydantic.model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.batch_size is None and self.batch_seconds is None:
            raise ValueError("give one of train.batch_size and train.batch_seconds")
        if self.batch_size is not None and self.batch_seconds is not None:
            seconds = self.batch_seconds if self.batch_seconds == "auto" else f"{self.batch_seconds:g}"
            raise ValueError(
                f"train.batch_size is {self.batch_size} and train.batch_seconds is {seconds}, but a batch has one "
                "size; set one of them to null, as in train.batch_seconds=null"
            )
        if self.batch_seconds == "auto" and not self.use_gpu:
            raise ValueError(
                "train.batch_seconds auto measures the memory of a GPU, but this training runs on the CPU; give the seconds, as in "
                "train.batch_seconds=30, or set train.use_gpu=true"
            )
        if self.validate_every != "epoch" and self.validate_every < 1:
            raise ValueError(
                f"train.validate_every is {self.validate_every}; give a positive number of optimiser steps, or epoch"
            )
        if self.precision == "fp16" and not self.use_gpu:
            raise ValueError("train.precision fp16 needs train.use_gpu true; on a CPU use fp32 or bf16")
        if self.shuffle == "window" and self.targets == "online":
            raise ValueError("train.shuffle window needs train.targets cached, because online targets have no shards")
        if self.draw_order == "in_order" and self.targets == "online":
            raise ValueError(
                "train.draw_order in_order needs train.targets cached: online targets have no fixed number of draws"
            )
        if self.draw_order == "in_order" and self.masks == "fresh":
            raise ValueError(
                "train.draw_order in_order does nothing with train.masks fresh, which has a draw for each epoch; remove one of them"
            )
        objective_of(self)
        return self

    @property
    def starts_from_teacher(self) -> bool:
        """Whether some of the student's initial weights are the teacher's."""
        return self.init_front_end or self.init_encoder_layers > 0 or self.mask_embedding == "teacher"

    @pydantic.model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.init_from is not None and self.starts_from_teacher:
            raise ValueError(
                "train.init_from gives all weights of the encoder, so train.init_front_end, init_encoder_layers and mask_embedding "
                "teacher can't copy the teacher's; remove one or the other"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _can_prune(self) -> Self:
        if self.prune is None:
            return self
        if self.init_from is None and not self.init_encoder_layers:
            raise ValueError(
                "train.prune needs a student that has learned something; set train.init_front_end and train.init_encoder_layers for a "
                "copy of the teacher, or train.init_from for another student"
            )
        if self.objective not in PRUNING_OBJECTIVES:
            raise ValueError(
                f"train.prune does not go with train.objective {self.objective}, whose predictors would be lost between the phases; "
                f"choose {' or '.join(PRUNING_OBJECTIVES)}"
            )
        if self.count_padding:
            raise ValueError("train.prune does not go with train.count_padding; remove one of them")
        return self

    def pruning_phase(self) -> "TrainSettings":
        """Return the settings of the first phase of a training with ``prune``."""
        assert self.prune is not None
        changes = {
            "epochs": self.prune.steps,  # More than enough, since an epoch has at least one step.
            "max_steps": self.prune.steps,
            "learning_rate": self.prune.weight_learning_rate,
            "warmup_fraction": self.prune.warmup_steps / self.prune.steps,
            "ema_decay": None,
        }
        return self.model_copy(update=changes)

    @property
    def seconds_of_batch(self) -> float | None:
        """``batch_seconds``, after ``auto`` was replaced by the seconds that fit."""
        assert self.batch_seconds != "auto", "the training has not measured how many seconds fit"
        return self.batch_seconds

    def describe_batch(self, found: float | None = None) -> str:
        """Say how large a batch is.

        Args:
            found: Seconds that ``auto`` has found. Default None: it has not measured yet.
        """
        if self.batch_seconds is None:
            return f"{self.batch_size} utterance{'' if self.batch_size == 1 else 's'}"
        if self.batch_seconds != "auto":
            return f"{self.batch_seconds:g} s of audio"
        return "as much audio as fits (auto)" if found is None else f"{found:g} s of audio (auto)"

    @property
    def crop_samples(self) -> int | None:
        """``crop_seconds`` in samples."""
        return None if self.crop_seconds is None else round(self.crop_seconds * SAMPLE_RATE)

    def check_student(self, config: StudentConfig) -> None:
        """Raise ValueError if these settings cannot train such a student."""
        if self.crop_seconds is not None and config.patches is not None:
            raise ValueError(
                "train.crop_seconds crops at frames, but the student has patches; remove train.crop_seconds"
            )
        self.chosen_objective.check_student(config)
        if self.prune is not None:
            self.prune.check_student(config)

    @property
    def chosen_objective(self) -> Objective:
        """Settings of the objective named by ``objective``."""
        return objective_of(self)


class SeveralTeacherSettings(TrainSettings, frozen=True):
    """Settings of a training from several teachers. Every teacher has an objective of its own."""

    terms: tuple[TeacherTerm, ...]
    """The teachers."""

    @property
    def chosen_objective(self) -> Objective:
        """The weighted sum of the teachers' objectives."""
        try:
            return SeveralTeachers(terms=self.terms, balance=self.balance)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            raise ValueError(str(first.get("ctx", {}).get("error", first["msg"]))) from error
