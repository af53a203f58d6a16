"""The training loop of one rank, in plain PyTorch. `ray_distill.student.training.ray_training` runs it on Ray Train workers."""

import json
import math
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ray_distill.student.model.student import Student
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.pruning.removal import save_pruned
from ray_distill.student.training import run_files
from ray_distill.student.training.metrics import Metrics, MetricWindow
from ray_distill.student.training.optimizer import learning_rate
from ray_distill.student.training.prefetch import MicroBatch, TrainingPlan, micro_batches
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.steps.step_memory import find_fitting_batch
from ray_distill.student.training.steps.trained_parts import TrainedParts
from ray_distill.student.training.target_source import TargetSource
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.train_state import BatchRecord, Checkpoints, StepRecord, TrainResult
from ray_distill.student.training.validation import validate
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.targets.fitting_batch import FittingBatch
from ray_distill.teacher_cache.targets.target_batch import TargetReader

MIN_LOSS_SCALE = 1e-4
"""Loss scale of fp16 below which the search for it ends; fairseq's ``--min-loss-scale``."""


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
    source: TargetSource | None = None,
) -> TrainResult:
    """Train a student, or continue from ``folder/checkpoints/last``.

    The loss of an optimiser step is the sum over all its frames (all ranks, all accumulated batches) divided by their
    number, so the result does not depend on how a batch is spread over ranks. (In the published code each accumulated batch
    counts equally, whatever its number of frames.)

    Args:
        config: Architecture of the student; its layers and target_dim must be the readers'.
        settings: Settings of the training.
        train_reader: Targets of the training split.
        validation_reader: Targets of the validation split.
        folder: Run folder; receives the files of `run_files`, at the end of the training ``train.json`` with the result, and if
            ``settings.prune`` is given, which makes this the first of two phases (see `train_in_phases`), the pruned student.
        rank: This process. Default: the only one.
        initial: Safetensors file of initial weights by name, such as the teacher's; all others are random. Default None.
        wrap: Function that wraps the module with student and loss in DDP. Default: no wrapping.
        on_row: Function called on every rank with each row of ``metrics.jsonl`` (see `Metrics`).
        on_validation: Function called on every rank, equally often, after each validation.
        source: Source of the readers' targets; a run with another source is refused. Default None: unknown, and not compared.

    Raises:
        ValueError: the student does not fit the targets, the checkpoint not the training, or a tracker is not installed.
        FloatingPointError: the loss or gradient is not finite in ``settings.max_skipped_steps`` consecutive steps, a validation
            loss is not finite, or no step has a finite loss.
        OSError: a checkpoint or the metrics can't be written.
    """
    settings.check_student(config)
    settings.chosen_objective.check_targets(config, len(train_reader.layers), train_reader.dim)
    for reader in (train_reader, validation_reader):
        config.check_frames(reader.num_samples, reader.num_frames)
        if settings.masks == "fresh" and reader.draws is not None:
            raise ValueError("train.masks fresh needs readers that draw masks for each epoch; wrap them in FreshMasks")
    loop = _Loop(
        config, settings, train_reader, validation_reader, folder, rank, initial, wrap, on_row, on_validation, source
    )
    with loop.metrics:
        result = replace(loop.run(), cache_fingerprint=None if source is None else source.cache_fingerprint)
    if rank.index == 0:
        if loop.distiller.gates is not None:
            save_pruned(loop.student, loop.distiller.gates, folder / run_files.PRUNED)
        run_files.replace_text(folder / run_files.RESULT, json.dumps(asdict(result), indent=2) + "\n")
    return result


class _Loop:
    """A training in progress; see `train` for the arguments."""

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
        source: TargetSource | None,
    ) -> None:
        self.settings, self.rank, self.on_row, self.on_validation = settings, rank, on_row, on_validation
        self.train_reader, self.validation_reader = train_reader, validation_reader
        self.parts = TrainedParts(config, settings, train_reader, validation_reader, rank, initial)
        self.student, self.distiller = self.parts.student, self.parts.distiller
        self.checkpoints = Checkpoints(folder / run_files.CHECKPOINTS, self.parts.to_save(), rank, source)
        self.state = self.checkpoints.load()
        found: FittingBatch | None = None
        if settings.batch_seconds == "auto":
            if (seconds := self.state.batch_seconds) is None:
                found = self.measure(config)
                seconds = found.seconds
            self.settings = settings = settings.model_copy(update={"batch_seconds": seconds})
        self.state.batch_seconds = settings.seconds_of_batch
        self.plan = TrainingPlan.of(train_reader, settings, rank.world_size, self.state)
        self.started = time.monotonic() - self.state.seconds
        self.model = wrap(self.distiller)
        self.window = MetricWindow(train_reader, rank)
        self.step_batches: list[BatchRecord] = []
        self.unread_steps: list[StepRecord] = []  # On a GPU, the outcomes of steps are read together.
        configuration = {f"student.{key}": value for key, value in config.model_dump(mode="json").items()} | {
            f"train.{key}": value for key, value in settings.model_dump(mode="json").items()
        }
        resumed_step = None if self.is_fresh() else self.state.step
        self.metrics = Metrics(folder, resumed_step, settings.trackers, configuration, enabled=rank.index == 0)
        if resumed_step is not None:
            now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            self.metrics.write({"kind": "resumed", "step": resumed_step, "time": now})
        if found is not None:
            self.write({"kind": "batch", "step": 0} | found.row_fields())

    def measure(self, config: StudentConfig) -> FittingBatch:
        """Find how many seconds of audio per batch fit, for a training that begins."""
        if not self.is_fresh():
            raise ValueError(
                "train.batch_seconds auto measures before the first step, but this training has begun with another setting; give that "
                "one again"
            )
        return find_fitting_batch(config, self.settings, self.train_reader, self.validation_reader, self.rank)

    def run(self) -> TrainResult:
        settings, state = self.settings, self.state
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
        with closing(batches):  # An error stops the reading ahead, too.
            for micro in batches:
                self.window.waited += time.monotonic() - mark
                self.backward(micro)
                if micro.last_of_step:
                    self.step(micro)
                    if self.is_logged(state.step):
                        self.log(micro)
                    if self.plan.validates_after(state.step):
                        self.validate()
                    elif settings.checkpoint_every and state.step % settings.checkpoint_every == 0:
                        self.checkpoint()
                mark = time.monotonic()
        if state.first_loss is None or state.last_loss is None:
            raise FloatingPointError("no step of this training had a finite loss; check the targets and the waveforms")
        assert state.first_validation_loss is not None and state.last_validation_loss is not None
        return TrainResult(
            state.step,
            state.skipped_steps,
            state.first_loss,
            state.last_loss,
            state.first_validation_loss,
            state.last_validation_loss,
            *(state.best or [(state.last_validation_loss, state.step)])[0],
            time.monotonic() - self.started,
        )

    def is_fresh(self) -> bool:
        """Return whether the training is new: no validation has been done yet."""
        return self.state.first_validation_loss is None

    def is_logged(self, step: int) -> bool:
        """Return whether a row of metrics is written after ``step`` optimiser steps."""
        return step % self.settings.log_every == 0 or step in (1, self.plan.total_steps)

    def backward(self, micro: MicroBatch) -> None:
        """Run forward and backward for one batch; ranks exchange gradients only at the last batch of a step."""
        batch = micro.batch.moved(self.rank.device)
        self.window.count(micro.num_samples)
        logged = self.is_logged(micro.step + 1)
        exchange = micro.last_of_step or self.rank.world_size == 1
        with nullcontext() if exchange else self.model.no_sync():  # type: ignore[operator]
            loss = self.parts.backward(
                self.model,
                batch,
                micro.step_frames,
                epoch=micro.epoch,
                step=micro.step,
                lengths=micro.num_samples.tolist(),
                cosines=logged,
            )
        seconds = dict(zip(batch.ids, (micro.num_samples / SAMPLE_RATE).tolist(), strict=True))
        self.step_batches.append(BatchRecord(loss.total.detach(), seconds))
        if logged:
            self.window.add_step(loss)

    def step(self, micro: MicroBatch) -> None:
        """Take an optimiser step, or skip it if a loss or gradient is not finite; the norm is the same on every rank."""
        state, parts = self.state, self.parts
        rate = self.learning_rate(micro.step)
        for group in parts.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        norm = parts.gradient_norm()
        state.step += 1
        scale = parts.scaler.scale(torch.ones_like(norm))
        self.unread_steps.append(StepRecord(state.step, rate, norm, scale, self.step_batches))
        self.step_batches = []
        parts.update(norm)
        if not parts.defers:
            self.read_steps()
        parts.end_step()

    def read_steps(self) -> None:
        """Read the outcomes of the steps since the last call from the device, and count or record them in order."""
        records, self.unread_steps = self.unread_steps, []
        for record in records:
            if math.isfinite(norm := float(record.norm)):
                self.state.gradient_norm, self.state.skipped_in_a_row = norm, 0
                self.count_loss(record)
            else:
                self.skip(record)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a 0-based optimiser step."""
        return learning_rate(self.settings, step, self.plan.total_steps)

    def count_loss(self, record: StepRecord) -> None:
        for batch in record.batches:
            self.window.loss += batch.loss
        self.state.loss_steps += 1

    def skip(self, record: StepRecord) -> None:
        """Count and record a skipped step; raise FloatingPointError after too many in a row."""
        state, limit = self.state, self.settings.max_skipped_steps
        in_loss, seconds = self.find_suspects(record)
        searching = self.parts.scaler.is_enabled() and not in_loss and float(record.loss_scale) > MIN_LOSS_SCALE
        cause = "loss scale" if searching else "loss" if in_loss else "gradient"
        state.skipped_steps += 1
        state.skipped_in_a_row += not searching
        if not in_loss:
            self.count_loss(record)
        elif self.is_logged(record.step):
            self.window.forget_step()
        longest = max(seconds, key=lambda utterance: seconds[utterance])
        row = {
            "kind": "skipped",
            "step": record.step,
            "cause": cause,
            "learning_rate": record.learning_rate,
            "utterances": list(seconds),
            "longest": longest,
            "longest_seconds": seconds[longest],
        }
        self.write(row)
        if state.skipped_in_a_row >= limit:
            some = ", ".join(list(seconds)[:8]) + (", ..." if len(seconds) > 8 else "")
            raise FloatingPointError(
                f"the {cause} was not finite in {limit} steps in a row, up to step {record.step} (learning rate "
                f"{record.learning_rate:.3g}); the last of these steps had utterances {some} (the longest is {longest}, "
                f"{seconds[longest]:.1f} s); lower train.learning_rate, set train.max_grad_norm, or check these utterances in the "
                "cache"
            )

    def find_suspects(self, record: StepRecord) -> tuple[bool, dict[str, float]]:
        """Return whether a loss of a step is not finite, and the seconds of the utterances that may be the cause.

        The utterances of all ranks are returned: those of batches without a finite loss, or else all of the step's.
        """
        bad = [batch for batch in record.batches if not batch.loss.isfinite()]
        mine = {name: seconds for batch in bad or record.batches for name, seconds in batch.seconds.items()}
        everyone: list[tuple[bool, dict[str, float]]] = self.rank.gather((bool(bad), mine))
        in_loss = any(bad for bad, _ in everyone)
        return in_loss, {k: v for bad, theirs in everyone if bad == in_loss for k, v in theirs.items()}

    def log(self, micro: MicroBatch) -> None:
        """Write a training row, unless no step since the last row had a finite loss."""
        self.read_steps()
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
        if self.parts.scaler.is_enabled():
            row["loss_scale"] = self.parts.scaler.get_scale()
        if self.distiller.gates is not None:
            row |= self.distiller.gates.row_fields()
        self.write(row | self.distiller.row_fields() | fields | {"skipped_steps": state.skipped_steps})

    def write(self, row: dict[str, Any]) -> None:
        """Write a row of metrics and pass it to ``on_row``."""
        self.metrics.write(row)
        self.on_row(row)

    def validate(self) -> None:
        """Validate, keep the student if it is among the best, and write a checkpoint."""
        self.read_steps()
        began = time.monotonic()
        state, settings = self.state, self.settings
        student = self.student if self.parts.average is None else cast(Student, self.parts.average.module)
        row: dict[str, Any] = {"kind": "validation", "step": state.step} | validate(
            self.distiller.with_student(student), self.validation_reader, settings, self.rank, constant=self.is_fresh()
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
        if self.distiller.gates is None:  # A student with gates is not one to keep.
            self.checkpoints.save_best(student, state, loss, settings.keep_best)
        self.window.exclude(time.monotonic() - began)
        self.checkpoint()
        self.checkpoints.remove_old(state)
        self.on_validation(row)

    def checkpoint(self) -> None:
        """Save the state after this step as ``last``."""
        self.read_steps()
        began = time.monotonic()
        self.state.loss_sum += self.window.take_loss()
        self.state.seconds = began - self.started
        self.checkpoints.save(self.state)
        self.window.exclude(time.monotonic() - began)
