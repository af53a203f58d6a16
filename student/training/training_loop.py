"""The training loop of one rank, in plain PyTorch. `ray_distill.student.training.ray_training` runs it on Ray Train workers."""

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ray_distill.student.model.student import Student
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.objectives.layer_loss import DistillationLoss, Distiller
from ray_distill.student.objectives.temporal_relation import RelationDistiller
from ray_distill.student.training.metrics import Metrics, Window, cosine_row
from ray_distill.student.training.optimizer import make_optimizer, schedule_factor
from ray_distill.student.training.prefetch import Micro, TrainingPlan, micro_batches
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.train_state import Checkpoints, Stateful
from ray_distill.student.weights import load_tensors, load_weights
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.targets.batch_sampler import cut_by_seconds
from ray_distill.teacher_cache.targets.target_batch import Batch, TargetReader

MIN_LOSS_SCALE = 1e-4
"""Where fp16's loss scale stops being looked for; fairseq's ``--min-loss-scale``."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished training says of itself: losses are per frame, weighted as in training; hours are of audio."""

    steps: int
    skipped_steps: int
    first_loss: float
    last_loss: float
    first_validation_loss: float
    last_validation_loss: float
    best_validation_loss: float
    best_step: int
    seconds: float
    cache_fingerprint: str | None = None
    """Of the cache that the targets were read from; None for online targets."""


def forward(
    model: nn.Module,
    batch: Batch,
    settings: TrainSettings,
    normalizer: float | None = None,
    *,
    hints: list[bool] | None = None,
    cosines: bool = False,
) -> DistillationLoss:
    """What `distiller_of` gives (perhaps in DDP) says of a batch on its device, in the settings' precision."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]
    with nullcontext() if dtype is None else torch.autocast(batch.waveforms.device.type, dtype):
        loss: DistillationLoss = model(
            batch.waveforms, batch.lengths, batch.frame_mask, batch.targets, normalizer, hints=hints, cosines=cosines
        )
    return loss


def distiller_of(student: Student, settings: TrainSettings) -> Distiller | RelationDistiller:
    """The student with the settings' loss."""
    if settings.objective == "star":
        layer_weight, intra_weight = settings.relation_weights
        return RelationDistiller(
            student,
            kind=settings.loss,
            layer_weight=layer_weight,
            intra_weight=intra_weight,
            spec_augment=settings.spec_augment,
        )
    return Distiller(
        student,
        kind=settings.loss,
        hint_weight=settings.hint_weight,
        final_weight=settings.final_weight,
        cosine_weight=settings.cosine_weight,
        spec_augment=settings.spec_augment,
    )


def hints_of(epoch: int, layers: int, settings: TrainSettings) -> list[bool] | None:
    """Which of the ``layers`` below the last take part in an epoch: a pure function of the seed; None: all."""
    if settings.hint_layers is None:
        return None
    chosen = np.random.default_rng((settings.seed, epoch)).permutation(layers)[: settings.hint_layers]
    return [layer in chosen for layer in range(layers)]


@torch.no_grad()
def validate(student: Student, reader: TargetReader, settings: TrainSettings, rank: Rank) -> dict[str, float]:
    """The unmasked student against the clean pass, over the whole validation split, per real frame.

    Returns:
        ``loss`` (weighted), ``layer_NN`` (unweighted) and ``cosine_unmasked_layer_NN``, the same on every rank.
    """
    distiller = distiller_of(student, settings).eval()
    order = np.argsort(-reader.num_samples, kind="stable").tolist()
    if settings.batch_size is not None:
        batches = [order[i : i + settings.batch_size] for i in range(0, len(order), settings.batch_size)]
    else:
        assert settings.batch_seconds is not None
        batches = cut_by_seconds(order, reader.num_samples, settings.batch_seconds)
    losses = torch.zeros(len(reader.layers) + 1, dtype=torch.float64, device=rank.device)
    cosines = torch.zeros(2, len(reader.layers) + 1, dtype=torch.float64, device=rank.device)
    for indices in batches[rank.index :: rank.world_size]:
        batch = reader.read(indices, None).to(rank.device)
        loss = forward(distiller, batch, settings, 1.0, cosines=True)
        losses += torch.cat([loss.total[None], loss.per_layer]).double()
        assert loss.cosines is not None
        cosines += loss.cosines
    distiller.train()
    rank.sum(losses)
    rank.sum(cosines)
    total, *layers = (losses / cosines[1, -1]).tolist()
    named = {f"layer_{layer:02d}": loss for layer, loss in zip(reader.layers, layers, strict=True)}
    return {"loss": total} | named | cosine_row(cosines, reader.layers)


def train(
    config: StudentConfig,
    settings: TrainSettings,
    train_reader: TargetReader,
    validation_reader: TargetReader,
    folder: Path,
    *,
    rank: Rank = Rank(),
    initial: Path | None = None,
    wrap: Callable[[nn.Module], nn.Module] = lambda distiller: distiller,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    on_validation: Callable[[dict[str, Any]], None] = lambda row: None,
    cache_fingerprint: str | None = None,
) -> TrainResult:
    """Trains a student, or goes on from ``folder/checkpoints/last``.

    The loss of an optimiser step is the sum over all its frames (all ranks, all accumulated batches) divided by their
    number, so that the result does not depend on how a batch is spread over ranks.

    Args:
        config: of the student; its layers and target_dim must be the readers'.
        settings: of the training.
        train_reader: targets of the training split.
        validation_reader: targets of the validation split.
        folder: run folder; gets ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/`` (see `Checkpoints`) and ``train.json``
            (the result, written when training is finished).
        rank: this process.
        initial: a safetensors file of tensors that the student starts from, by name, such as the teacher's; others are drawn.
        wrap: puts the student, with its loss, in DDP.
        on_row: called on every rank with each row of ``metrics.jsonl`` (see `Metrics`).
        on_validation: called on every rank, equally often, after each validation.
        cache_fingerprint: of the readers' cache, for the result; default None: they have none.

    Raises:
        ValueError: the student doesn't fit the targets, the checkpoint not the training, or a tracker is not installed.
        FloatingPointError: ``settings.max_skipped_steps`` steps in a row, or a validation, gave no finite loss.
        OSError: a checkpoint or the metrics can't be written.
    """
    if config.num_predictions != len(train_reader.layers) or config.target_dim != train_reader.dim:
        raise ValueError(
            f"the student predicts {config.num_predictions} layers of width {config.target_dim}, the targets have "
            f"{len(train_reader.layers)} layers of width {train_reader.dim}; set student.encoder_layers (of split heads, "
            "student.split_heads) and student.target_dim to match, or choose teacher.layers"
        )
    settings.check_student(config)
    for reader in (train_reader, validation_reader):
        _check_frames(config, reader)
    loop = _Loop(config, settings, train_reader, validation_reader, folder, rank, initial, wrap, on_row, on_validation)
    with loop.metrics:
        result = replace(loop.run(), cache_fingerprint=cache_fingerprint)
    if rank.index == 0:
        temporary = folder / ".train.json.tmp"
        temporary.write_text(json.dumps(asdict(result), indent=2) + "\n")
        temporary.replace(folder / "train.json")
    return result


def _check_frames(config: StudentConfig, reader: TargetReader) -> None:
    """ValueError where the student would make other frames of an utterance than the teacher did."""
    ours = config.num_frames(torch.as_tensor(reader.num_samples)).numpy()
    if (wrong := np.flatnonzero(ours != reader.num_frames)).size:
        first = wrong[0]
        raise ValueError(
            f"the student makes {ours[first]} frames of an utterance of {reader.num_samples[first]} samples, the targets have "
            f"{reader.num_frames[first]}; set student.patches to the teacher's, or give the student other student.conv_layers"
        )


@dataclass(frozen=True)
class _Share:
    """What one batch of this rank added to a step: its loss, and the seconds of each utterance."""

    loss: Tensor
    seconds: dict[str, float]


class _Loop:
    """A training under way; see `train` for the arguments."""

    def __init__(
        self,
        config: StudentConfig,
        settings: TrainSettings,
        train_reader: TargetReader,
        validation_reader: TargetReader,
        folder: Path,
        rank: Rank,
        initial: Path | None,
        wrap: Callable[[nn.Module], nn.Module],
        on_row: Callable[[dict[str, Any]], None],
        on_validation: Callable[[dict[str, Any]], None],
    ) -> None:
        self.settings, self.rank, self.on_row, self.on_validation = settings, rank, on_row, on_validation
        self.train_reader, self.validation_reader = train_reader, validation_reader
        torch.manual_seed(settings.seed)
        self.student = Student(config).to(rank.device)
        if initial is not None:
            load_weights(self.student, load_tensors(initial), initial, strict=False)
        self.student.checkpoint_activations = settings.checkpoint_activations
        # Without masks nothing reaches the mask embedding, and DDP would wait for its gradient.
        self.student.mask_embedding.requires_grad_(train_reader.draws != 0 and settings.mask_embedding == "learned")
        # Ranks start from equal weights but drop different units.
        torch.manual_seed(settings.seed * 1_000_003 + 1 + rank.index)
        self.optimizer = make_optimizer(self.student, settings)
        self.scaler = GradScaler(rank.device.type, enabled=settings.precision == "fp16")
        parts: dict[str, Stateful] = {
            "student": self.student,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
        }
        self.average: AveragedModel | None = None
        if settings.ema_decay is not None:
            average = get_ema_multi_avg_fn(settings.ema_decay)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(self.student, multi_avg_fn=average)
            parts["average"] = self.average
        self.plan = TrainingPlan(train_reader.num_samples, settings, rank.world_size)
        self.checkpoints = Checkpoints(folder / "checkpoints", parts, rank)
        self.state = self.checkpoints.load()
        self.started = time.monotonic() - self.state.seconds
        self.model = wrap(distiller_of(self.student, settings))
        self.window = Window(train_reader, rank)
        self.shares: list[_Share] = []
        configuration = {f"student.{key}": value for key, value in config.model_dump(mode="json").items()} | {
            f"train.{key}": value for key, value in settings.model_dump(mode="json").items()
        }
        done = None if self.is_fresh() else self.state.step
        self.metrics = Metrics(folder, done, settings.trackers, configuration, enabled=rank.index == 0)

    def run(self) -> TrainResult:
        settings, state, total_steps = self.settings, self.state, self.plan.total_steps
        if self.is_fresh():
            self.validate()
        self.student.train()
        mark = time.monotonic()
        batches = micro_batches(
            self.plan,
            self.train_reader,
            self.rank,
            state.step,
            settings.accumulate,
            count_padding=settings.count_padding,
        )
        for micro in batches:
            self.window.waited += time.monotonic() - mark
            self.backward(micro)
            if micro.last_of_step:
                self.step(micro)
                if self.is_logged(state.step):
                    self.log(micro)
                if state.step % settings.validate_every == 0 or state.step == total_steps:
                    self.validate()
                elif settings.checkpoint_every and state.step % settings.checkpoint_every == 0:
                    self.checkpoint()
            mark = time.monotonic()
        if state.first_loss is None or state.last_loss is None:
            raise FloatingPointError("no step of this training gave a finite loss; check the targets and the waveforms")
        assert state.first_validation_loss is not None and state.last_validation_loss is not None
        return TrainResult(
            state.step,
            state.skipped_steps,
            state.first_loss,
            state.last_loss,
            state.first_validation_loss,
            state.last_validation_loss,
            *state.best[0],
            time.monotonic() - self.started,
        )

    def is_fresh(self) -> bool:
        """Whether nothing is done yet: a run begins with a validation."""
        return self.state.first_validation_loss is None

    def is_logged(self, step: int) -> bool:
        """Whether a row is written when ``step`` optimiser steps are done."""
        return step % self.settings.log_every == 0 or step in (1, self.plan.total_steps)

    def backward(self, micro: Micro) -> None:
        """Forward and backward of one batch; ranks exchange gradients at the last one of a step only."""
        batch = micro.batch.to(self.rank.device)
        self.window.count(micro.num_samples)
        exchange = micro.last_of_step or self.rank.world_size == 1
        with nullcontext() if exchange else self.model.no_sync():  # type: ignore[operator]
            logged = self.is_logged(micro.step + 1)
            hints = hints_of(micro.epoch, len(self.train_reader.layers) - 1, self.settings)
            loss = forward(self.model, batch, self.settings, micro.step_frames, hints=hints, cosines=logged)
            # DDP averages gradients over ranks; the sum is wanted. A loss that is not finite need not have such gradients
            # (L1 has not): times NaN they tell every rank, at no cost.
            factor = self.rank.world_size + 0 * loss.total.detach()
            self.scaler.scale(loss.total * factor).backward()  # type: ignore[no-untyped-call]
        seconds = dict(zip(batch.ids, (micro.num_samples / SAMPLE_RATE).tolist(), strict=True))
        self.shares.append(_Share(loss.total.detach(), seconds))
        if loss.cosines is not None:
            self.window.cosines += loss.cosines

    def step(self, micro: Micro) -> None:
        """One optimiser step, or none where loss or gradient is not finite: the norm is the same on every rank."""
        settings, state = self.settings, self.state
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(micro.step)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        state.step += 1
        if math.isfinite(value := float(norm)):
            if settings.max_grad_norm is not None:
                nn.utils.clip_grads_with_norm_(self.student.parameters(), settings.max_grad_norm, norm)
            self.scaler.step(self.optimizer)
            if self.average is not None:
                self.average.update_parameters(self.student)
            state.gradient_norm, state.skipped_in_a_row = value, 0
            self.count_loss()
        else:
            self.skip(micro)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.shares.clear()

    def learning_rate(self, step: int) -> float:
        """Of a 0-based optimiser step."""
        return self.settings.learning_rate * schedule_factor(step, self.plan.total_steps, self.settings.warmup_fraction)

    def count_loss(self) -> None:
        for share in self.shares:
            self.window.loss += share.loss
        self.state.loss_steps += 1

    def skip(self, micro: Micro) -> None:
        """Counts and records a step that is left out; stops the run where there are too many in a row."""
        state, limit = self.state, self.settings.max_skipped_steps
        in_loss, seconds = self.blame()
        searching = self.scaler.is_enabled() and not in_loss and self.scaler.get_scale() > MIN_LOSS_SCALE
        cause = "loss scale" if searching else "loss" if in_loss else "gradient"
        state.skipped_steps += 1
        state.skipped_in_a_row += not searching
        if in_loss:
            self.window.cosines.zero_()
        else:
            self.count_loss()
        longest = max(seconds, key=lambda utterance: seconds[utterance])
        row = {
            "kind": "skipped",
            "step": state.step,
            "cause": cause,
            "learning_rate": self.learning_rate(micro.step),
            "utterances": list(seconds),
            "longest": longest,
            "longest_seconds": seconds[longest],
        }
        self.write(row)
        if state.skipped_in_a_row >= limit:
            some = ", ".join(list(seconds)[:8]) + (", ..." if len(seconds) > 8 else "")
            raise FloatingPointError(
                f"the {cause} was not finite in {limit} steps in a row, up to step {state.step} (learning rate "
                f"{row['learning_rate']:.3g}), there from utterances {some} (the longest is {longest}, {seconds[longest]:.1f} s); "
                "lower train.learning_rate, set train.max_grad_norm, or check what the cache holds of them"
            )

    def blame(self) -> tuple[bool, dict[str, float]]:
        """Whether a loss of this step is not finite, and the seconds of the utterances that may be why; from all ranks."""
        bad = [share for share in self.shares if not share.loss.isfinite()]
        mine = {name: seconds for share in bad or self.shares for name, seconds in share.seconds.items()}
        everyone: list[tuple[bool, dict[str, float]]] = self.rank.gather((bool(bad), mine))
        in_loss = any(bad for bad, _ in everyone)
        return in_loss, {k: v for bad, theirs in everyone if bad == in_loss for k, v in theirs.items()}

    def log(self, micro: Micro) -> None:
        """A training row; none where no step since the last one had a finite loss."""
        state = self.state
        state.loss_sum += self.window.take_loss()
        fields = self.window.close()
        if state.loss_steps == 0:
            return
        loss = state.loss_sum / state.loss_steps
        state.loss_sum, state.loss_steps = 0.0, 0
        if state.first_loss is None:
            state.first_loss = loss
        state.last_loss = loss
        row: dict[str, Any] = {
            "kind": "train",
            "step": state.step,
            "steps": self.plan.total_steps,
            "epoch": micro.epoch,
            "loss": loss,
            "learning_rate": self.learning_rate(micro.step),
        }
        if state.gradient_norm is not None:
            row["gradient_norm"] = state.gradient_norm
        if self.scaler.is_enabled():
            row["loss_scale"] = self.scaler.get_scale()
        self.write(row | fields | {"skipped_steps": state.skipped_steps})

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row to the run's record, and hands it on."""
        self.metrics.write(row)
        self.on_row(row)

    def validate(self) -> None:
        """Validates, keeps the student where it is among the best, and makes a checkpoint."""
        began = time.monotonic()
        state, settings = self.state, self.settings
        student = self.student if self.average is None else cast(Student, self.average.module)
        row: dict[str, Any] = {"kind": "validation", "step": state.step} | validate(
            student, self.validation_reader, settings, self.rank
        )
        loss = row["loss"]
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the validation loss is {loss} at step {state.step}; check the validation targets, or lower "
                "train.learning_rate"
            )
        if state.first_validation_loss is None:
            state.first_validation_loss = loss
        state.last_validation_loss = loss
        self.write(row)
        self.checkpoints.save_best(student, state, loss, settings.keep_best)
        self.window.leave_out(time.monotonic() - began)
        self.checkpoint()
        self.checkpoints.remove_old(state)
        self.on_validation(row)

    def checkpoint(self) -> None:
        """Makes ``last`` the state after this step."""
        began = time.monotonic()
        self.state.loss_sum += self.window.take_loss()
        self.state.seconds = began - self.started
        self.checkpoints.save(self.state)
        self.window.leave_out(time.monotonic() - began)
