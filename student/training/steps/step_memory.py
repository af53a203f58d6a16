"""The GPU memory of a training step, and from it ``train.batch_seconds`` if that is ``auto``."""

import gc
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from ray_distill.student.model.attention import WHOLE_MAP_FRAMES
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.training.prefetch import PREFETCH
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.steps.trained_parts import TrainedParts
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.teacher_cache.frames import FRAME_SAMPLES, SAMPLE_RATE
from ray_distill.teacher_cache.targets.crop import crop_batch
from ray_distill.teacher_cache.targets.fitting_batch import (
    FittingBatch,
    find_fitting,
    largest_batches,
    plain,
    usable_bytes,
)
from ray_distill.teacher_cache.targets.target_batch import Batch, TargetReader

_WARM_UP = 32
"""Largest number of steps until fp16 has a loss scale with which the optimiser takes one."""


def find_fitting_batch(
    config: StudentConfig,
    settings: TrainSettings,
    train_reader: TargetReader,
    validation_reader: TargetReader,
    rank: Rank,
) -> FittingBatch:
    """Measure how many seconds of audio per batch fit on the GPU of each rank, and return the fewest. Every rank must call this.

    The steps are those of a student of its own, without the exchange of gradients, so that ranks need not run out of memory together.
    Random states are as before afterwards.

    Args:
        config, settings, train_reader, validation_reader, rank: As for `training_loop.train`.

    Raises:
        ValueError: The rank is on a CPU, or the longest utterance alone does not fit.
    """
    rank.gather(None)  # What the exchange between ranks needs on the GPU is allocated now.
    with _random_states_kept(rank.device):
        memory = StepMemory(config, settings, train_reader, validation_reader, rank)
        shortest, most = memory.range()
        found, lowest = agree(find_fitting(memory, memory.limit, shortest, most), memory.limit, rank)
        memory.forget()
    if found is None:
        crop = "" if settings.crop_seconds is None else " and train.crop_seconds"
        raise ValueError(
            f"train.batch_seconds auto: the longest utterance ({shortest:.1f} s) alone needs more memory in training than a GPU has "
            f"left ({lowest / 1e9:.1f} GB); "
            + ("" if settings.checkpoint_activations else "set train.checkpoint_activations=true, or ")
            + f"lower corpus.max_seconds{crop}"
        )
    return found


def agree(found: FittingBatch | None, limit: int, rank: Rank) -> tuple[FittingBatch | None, int]:
    """Return the smallest size of all ranks, rounded down to a plain one, or None if a rank has none, and the lowest limit of all.

    Every rank must call this.

    Args:
        found: What this rank has found.
        limit: Bytes that a step may need on this rank.
        rank: This process.
    """
    everyone: list[tuple[FittingBatch | None, int]] = rank.gather((found, limit))
    lowest = min(of_rank for _, of_rank in everyone)
    sizes = [one for one, _ in everyone if one is not None]
    if len(sizes) < len(everyone):
        return None, lowest
    least = min(sizes, key=lambda one: one.seconds)
    return replace(least, seconds=plain(least.seconds)), lowest


@contextmanager
def _random_states_kept(device: torch.device) -> Iterator[None]:
    """Restore the random states of Python, NumPy and PyTorch after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class StepMemory:
    """The peak GPU memory of training steps by the seconds of audio per batch, which a call returns in bytes.

    A step reads and decodes targets and runs forward, backward and the optimiser's update, all in the training's precision and with
    the optimiser's state allocated. The buffers in which ranks exchange gradients are counted too, and the weights only once, since
    the training has its own.

    Args:
        config, settings, train_reader, validation_reader, rank: As for `training_loop.train`.

    Attributes:
        limit: Bytes that a step may need: what is allocated now, and nine tenths of the free memory.
    """

    def __init__(
        self,
        config: StudentConfig,
        settings: TrainSettings,
        train_reader: TargetReader,
        validation_reader: TargetReader,
        rank: Rank,
    ) -> None:
        self._arguments = (config, settings, train_reader, validation_reader, rank)
        self._settings, self._reader, self._rank = settings, train_reader, rank
        longest = settings.crop_samples
        lengths = train_reader.num_samples
        self._lengths: np.ndarray = lengths if longest is None else np.minimum(lengths, longest)
        factors = (1, config.time_reduction_factor) if config.time_reduction is not None else (1,)
        self._switches = [(factor * WHOLE_MAP_FRAMES + 1) * FRAME_SAMPLES for factor in factors]
        self._parts: TrainedParts | None = None
        self._own = 0
        self.limit = self._free_bytes()

    def range(self) -> tuple[float, float]:
        """Return the smallest and the largest size that make sense, in seconds: the longest utterance, and all of a step's share."""
        shortest = float(self._lengths.max()) / SAMPLE_RATE
        per_step = self._rank.world_size * self._settings.accumulate
        return shortest, max(shortest, float(self._lengths.sum()) / SAMPLE_RATE / per_step)

    def _free_bytes(self) -> int:
        device = self._rank.device
        if device.type != "cuda":
            raise ValueError(
                "train.batch_seconds auto measures the memory of a GPU, but this training runs on the CPU; give the seconds"
            )
        return usable_bytes(device)

    def __call__(self, seconds: float) -> int:
        try:
            return max(self._peak(indices) for indices in largest_batches(self._lengths, seconds, self._switches))
        except Exception:
            self._parts = None  # A step that failed may have left anything, such as gradients.
            raise

    def _peak(self, indices: Sequence[int]) -> int:
        """Return the peak of a step on one batch, in bytes."""
        device = self._rank.device
        gc.collect()  # An error about memory holds what its step has allocated.
        torch.cuda.empty_cache()
        parts = self._warm_parts()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        batch = self._read(indices)
        reading = torch.cuda.max_memory_allocated(device) - before  # 0 unless a teacher computes the targets here.
        waiting = torch.cuda.memory_allocated(device) - before
        torch.cuda.reset_peak_memory_stats(device)
        self._step(parts, batch)
        # While a training takes a step, it reads further batches.
        ahead = reading + PREFETCH * waiting
        return torch.cuda.max_memory_allocated(device) + ahead + self._exchanged(parts) - self._own

    def _warm_parts(self) -> TrainedParts:
        """Return a student with its optimiser, whose state is allocated."""
        if self._parts is None:
            on_gpu = self._rank.device.type == "cuda"
            before = torch.cuda.memory_allocated(self._rank.device) if on_gpu else 0
            parts = TrainedParts(*self._arguments)
            self._own = torch.cuda.memory_allocated(self._rank.device) - before if on_gpu else 0
            for group in parts.optimizer.param_groups:
                group["lr"] = 0.0
            shortest = self._read([int(self._lengths.argmin())])
            for _ in range(_WARM_UP):
                if not parts.optimizer.state:
                    self._step(parts, shortest)
            self._parts = parts
        return self._parts

    def _exchanged(self, parts: TrainedParts) -> int:
        """Return the bytes of the buffers in which ranks exchange gradients."""
        if self._rank.world_size == 1:
            return 0
        return sum(p.numel() * p.element_size() for p in parts.distiller.parameters() if p.requires_grad)

    def _read(self, indices: Sequence[int]) -> Batch:
        batch = self._reader.read(indices, None if self._reader.draws == 0 else 0)
        if (longest := self._settings.crop_samples) is not None:
            batch = crop_batch(batch, longest, self._settings.seed, 0)
        return batch

    def _step(self, parts: TrainedParts, batch: Batch) -> None:
        """Take a step as the training does where it needs most: with cosine similarities, and with gradients of an earlier batch."""
        lengths, frames = batch.lengths.tolist(), int(batch.num_frames.sum())
        for _ in range(min(2, self._settings.accumulate)):
            moved = batch.moved(self._rank.device)
            parts.backward(parts.distiller, moved, frames, epoch=0, step=0, lengths=lengths, cosines=True)
            del moved
        parts.update(parts.gradient_norm())
        parts.end_step()

    def forget(self) -> None:
        """Give back the memory of the steps."""
        self._parts = None
        if self._settings.compile:
            torch.compiler.reset()  # The training compiles for itself, as if nothing had been compiled before.
        gc.collect()
        if self._rank.device.type == "cuda":
            torch.cuda.empty_cache()
