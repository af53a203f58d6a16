"""The training loop of one rank: plain PyTorch, without Ray. `student.ray_training` runs it on Ray Train workers."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.utils.tensorboard import SummaryWriter

from student.checkpoints import save_student
from student.config import StudentConfig
from student.loss import distillation_loss
from student.model import Student
from student.settings import TrainSettings
from student.train_state import load_train_state, save_train_state
from teacher_cache.batches import cut_by_seconds, plan_epoch
from teacher_cache.frames import SAMPLE_RATE, num_frames
from teacher_cache.reader import Batch, TargetReader

PREFETCH = 4
"""Batches read ahead by a background thread."""


@dataclass(frozen=True)
class Rank:
    """This process among the others. ``device`` is where the student lives."""

    index: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")


@dataclass(frozen=True)
class TrainResult:
    """What a finished training says of itself: losses are per frame, weighted as in training; hours are of audio."""

    steps: int
    first_loss: float
    last_loss: float
    first_validation_loss: float
    last_validation_loss: float
    best_validation_loss: float
    best_step: int
    seconds: float


def schedule_factor(step: int, total_steps: int, warmup_fraction: float) -> float:
    """Learning-rate factor of optimiser step ``step`` (0-based): linear warm-up from 0, then linear decay to 0.

    As in the published recipe's ``get_linear_schedule_with_warmup``: step 0 has factor 0.
    """
    warmup = int(total_steps * warmup_fraction)
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup))


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW with weight decay on everything but biases, as the published parameter groups have it."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for n, p in named if not n.endswith("bias")], "weight_decay": settings.weight_decay},
            {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=next(model.parameters()).is_cuda,
    )


class TrainingPlan:
    """Which batch every rank reads at every step: a pure function of lengths, settings and world size."""

    def __init__(self, num_samples: np.ndarray, settings: TrainSettings, world_size: int) -> None:
        self._num_samples = num_samples
        self._settings = settings
        self._world_size = world_size
        self._epoch = -1
        self._steps: list[list[list[list[int]]]] = []
        starts = [0]
        # Under a budget of seconds the number of batches depends on the epoch's shuffle, so each is planned once here.
        epochs = settings.epochs
        while len(starts) <= epochs and (settings.max_steps is None or starts[-1] < settings.max_steps):
            starts.append(starts[-1] + len(self._plan(len(starts) - 1)))
        self._starts = starts
        self.total_steps = starts[-1] if settings.max_steps is None else min(starts[-1], settings.max_steps)

    def _plan(self, epoch: int) -> list[list[list[list[int]]]]:
        return plan_epoch(
            self._num_samples,
            batch_size=self._settings.batch_size,
            batch_seconds=self._settings.batch_seconds,
            world_size=self._world_size,
            accumulate=self._settings.accumulate,
            seed=self._settings.seed,
            epoch=epoch,
        )

    def step(self, step: int) -> tuple[int, list[list[list[int]]]]:
        """(epoch, batches[micro][rank]) of a 0-based optimiser step."""
        epoch = int(np.searchsorted(self._starts, step, side="right")) - 1
        if epoch != self._epoch:
            self._epoch, self._steps = epoch, self._plan(epoch)
        return epoch, self._steps[step - self._starts[epoch]]


@dataclass
class _Micro:
    """One batch of one optimiser step, as the prefetching thread hands it over."""

    step: int
    epoch: int
    last_of_step: bool
    step_frames: int
    batch: Batch


def _micro_batches(
    plan: TrainingPlan, reader: TargetReader, rank: Rank, first_step: int, accumulate: int
) -> Iterator[_Micro]:
    frames = num_frames(torch.tensor(reader.num_samples))

    def jobs() -> Iterator[tuple[int, int, int, int, list[int], int | None]]:
        for step in range(first_step, plan.total_steps):
            epoch, micros = plan.step(step)
            total = sum(int(frames[indices].sum()) for micro in micros for indices in micro)
            # Draws rotate over epochs; the teacher in the loop never repeats one.
            draw = None if reader.draws == 0 else epoch if reader.draws is None else epoch % reader.draws
            for number, micro in enumerate(micros):
                yield step, epoch, number, total, micro[rank.index], draw

    with ThreadPoolExecutor(1) as pool:
        waiting: list[tuple[tuple[int, int, int, int], Any]] = []
        source = jobs()
        while True:
            while len(waiting) < PREFETCH and (job := next(source, None)) is not None:
                waiting.append((job[:4], pool.submit(reader.read, job[4], job[5])))
            if not waiting:
                return
            (step, epoch, number, total), future = waiting.pop(0)
            yield _Micro(step, epoch, number == accumulate - 1, total, future.result())


def _sum_over_ranks(values: Tensor, rank: Rank) -> Tensor:
    if rank.world_size > 1:
        dist.all_reduce(values)
    return values


@torch.no_grad()
def validate(student: Student, reader: TargetReader, settings: TrainSettings, rank: Rank) -> tuple[float, list[float]]:
    """Unmasked loss over the whole validation split, per real frame.

    Returns:
        (weighted loss, unweighted loss of each layer), the same on every rank.
    """
    student.eval()
    order = np.argsort(-reader.num_samples, kind="stable").tolist()
    if settings.batch_size is not None:
        batches = [order[i : i + settings.batch_size] for i in range(0, len(order), settings.batch_size)]
    else:
        assert settings.batch_seconds is not None
        batches = cut_by_seconds(order, reader.num_samples, settings.batch_seconds)
    sums = torch.zeros(len(reader.layers) + 2, dtype=torch.float64, device=rank.device)
    for indices in batches[rank.index :: rank.world_size]:
        batch = reader.read(indices, None).to(rank.device)
        with _autocast(settings, rank):
            out = student(batch.waveforms, batch.lengths)
        loss = distillation_loss(
            out.projections,
            batch.targets,
            out.num_frames,
            kind=settings.loss,
            hint_weight=settings.hint_weight,
            final_weight=settings.final_weight,
        )
        frames = float(batch.num_frames.sum())
        sums += torch.cat([loss.total[None], loss.per_layer, loss.total.new_ones(1)]).double() * frames
    sums = _sum_over_ranks(sums, rank)
    means = (sums[:-1] / sums[-1]).tolist()
    student.train()
    return means[0], means[1:]


def _autocast(settings: TrainSettings, rank: Rank) -> Any:
    if settings.precision == "fp32":
        return nullcontext()
    return torch.autocast(rank.device.type, torch.bfloat16 if settings.precision == "bf16" else torch.float16)


class _Metrics:
    """Rank 0's record: JSON lines and TensorBoard. After a resume, rows beyond the checkpoint are dropped, not repeated."""

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        rows = self._path.read_text().splitlines() if self._path.is_file() else []
        kept = [row for row in rows if json.loads(row)["step"] <= first_step]
        self._path.write_text("".join(row + "\n" for row in kept))
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, row: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if isinstance(value, float):
                self._board.add_scalar(f"{row['kind']}/{name}", value, row["step"])
        self._board.flush()


def train(
    config: StudentConfig,
    settings: TrainSettings,
    train_reader: TargetReader,
    validation_reader: TargetReader,
    folder: Path,
    *,
    rank: Rank = Rank(),
    wrap: Callable[[Student], nn.Module] = lambda student: student,
    on_validation: Callable[[dict[str, Any]], None] = lambda row: None,
) -> TrainResult:
    """Trains a student, or goes on from ``folder/checkpoints/last``.

    The loss of an optimiser step is the sum over all its frames (all ranks, all accumulated batches) divided by their
    number, so that the result does not depend on how a batch is spread over ranks.

    Args:
        config: of the student; its layers and target_dim must be the readers'.
        settings: of the training.
        train_reader: targets of the training split.
        validation_reader: targets of the validation split.
        folder: run folder; gets ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/last``, ``checkpoints/best`` and
            ``train.json`` (the result, written when training is finished).
        rank: this process.
        wrap: puts the student in DDP.
        on_validation: called on every rank, equally often, after each validation.

    Raises:
        ValueError: the student doesn't fit the targets.
        FloatingPointError: the loss is not finite.
    """
    if config.encoder_layers != len(train_reader.layers) or config.target_dim != train_reader.dim:
        raise ValueError(
            f"the student has {config.encoder_layers} layers with heads of width {config.target_dim}, the targets "
            f"{len(train_reader.layers)} layers of width {train_reader.dim}; set student.encoder_layers and "
            "student.target_dim to match, or choose teacher.layers"
        )
    torch.manual_seed(settings.seed)
    student = Student(config).to(rank.device)
    # Ranks start from equal weights but drop different units.
    torch.manual_seed(settings.seed * 1_000_003 + 1 + rank.index)
    optimizer = make_optimizer(student, settings)
    scaler = GradScaler(enabled=settings.precision == "fp16")
    plan = TrainingPlan(train_reader.num_samples, settings, rank.world_size)
    last, best = folder / "checkpoints" / "last", folder / "checkpoints" / "best"
    state = load_train_state(last, student, optimizer, scaler, rank)
    model = wrap(student)
    metrics = _Metrics(folder, state.step) if rank.index == 0 else None
    started = time.monotonic() - state.seconds

    def validation() -> None:
        loss, layers = validate(student, validation_reader, settings, rank)
        row = {"kind": "validation", "step": state.step, "loss": loss} | {
            f"layer_{layer:02d}": value for layer, value in zip(validation_reader.layers, layers, strict=True)
        }
        if state.first_validation_loss is None:
            state.first_validation_loss = loss
        state.last_validation_loss = loss
        improved = state.best_validation_loss is None or loss < state.best_validation_loss
        if improved:
            state.best_validation_loss, state.best_step = loss, state.step
        if metrics is not None:
            metrics.write(row)
            if improved:
                save_student(student, best, {"step": state.step, "validation_loss": loss})
        state.seconds = time.monotonic() - started
        save_train_state(last, student, optimizer, scaler, state, rank)
        on_validation(row)

    if state.step == 0 and state.first_validation_loss is None:
        validation()
    student.train()
    loss_sum = torch.zeros((), dtype=torch.float64, device=rank.device)
    audio = waited = 0.0
    window_started = mark = time.monotonic()
    for micro in _micro_batches(plan, train_reader, rank, state.step, settings.accumulate):
        waited += time.monotonic() - mark
        batch = micro.batch.to(rank.device)
        syncs = nullcontext() if micro.last_of_step or rank.world_size == 1 else model.no_sync()  # type: ignore[operator]
        with syncs:
            with _autocast(settings, rank):
                out = model(batch.waveforms, batch.lengths, batch.frame_mask)
            loss = distillation_loss(
                out.projections,
                batch.targets,
                out.num_frames,
                batch.frame_mask,
                kind=settings.loss,
                hint_weight=settings.hint_weight,
                final_weight=settings.final_weight,
                normalizer=micro.step_frames,
            ).total
            # DDP averages gradients over ranks; the sum is wanted.
            scaler.scale(loss * rank.world_size).backward()  # type: ignore[no-untyped-call]
        loss_sum += loss.detach()
        audio += float(batch.lengths.sum()) / SAMPLE_RATE
        if micro.last_of_step:
            factor = schedule_factor(micro.step, plan.total_steps, settings.warmup_fraction)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * factor
            if settings.max_grad_norm is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(student.parameters(), settings.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            if state.step % settings.log_every == 0 or state.step in (1, plan.total_steps):
                total, audio_all = _sum_over_ranks(torch.stack([loss_sum, loss_sum.new_tensor(audio)]), rank).tolist()
                steps = state.step - state.logged_step
                mean = total / steps
                if not np.isfinite(mean):
                    raise FloatingPointError(
                        f"the training loss is {mean} at step {state.step}; lower train.learning_rate or check the targets"
                    )
                if state.first_loss is None:
                    state.first_loss = mean
                state.last_loss, state.logged_step = mean, state.step
                elapsed = time.monotonic() - window_started
                if metrics is not None:
                    metrics.write(
                        {
                            "kind": "train",
                            "step": state.step,
                            "steps": plan.total_steps,
                            "epoch": micro.epoch,
                            "loss": mean,
                            "learning_rate": settings.learning_rate * factor,
                            "audio_hours_per_minute": audio_all / 60 / elapsed,
                            "data_wait": waited / elapsed,
                        }
                    )
                loss_sum.zero_()
                audio = waited = 0.0
                window_started = time.monotonic()
            if state.step % settings.validate_every == 0 or state.step == plan.total_steps:
                validation()
                window_started = time.monotonic()
        mark = time.monotonic()
    assert state.first_loss is not None and state.last_loss is not None and state.best_validation_loss is not None
    assert state.first_validation_loss is not None and state.last_validation_loss is not None
    result = TrainResult(
        state.step,
        state.first_loss,
        state.last_loss,
        state.first_validation_loss,
        state.last_validation_loss,
        state.best_validation_loss,
        state.best_step,
        time.monotonic() - started,
    )
    if rank.index == 0:
        temporary = folder / ".train.json.tmp"
        temporary.write_text(json.dumps(asdict(result), indent=2) + "\n")
        temporary.replace(folder / "train.json")
    return result
