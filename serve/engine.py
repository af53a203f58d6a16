"""Run a student for the service: requests that wait together are batched, in one thread, off the event loop."""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from serve.batching import choose_batch
from serve.errors import ServiceError
from student import Student
from teacher_cache.frames import RECEPTIVE_FIELD, SAMPLE_RATE

Array = npt.NDArray[np.float32]
Space = Literal["student", "teacher"]


class EngineClosedError(Exception):
    """The engine takes no more work, because another has taken its place or the service stops."""


@dataclass(frozen=True)
class BatchLimits:
    """Bounds of batches and of the queue.

    Attributes:
        batch_seconds: audio of a batch, padding included. Default 30.
        wait_seconds: how long the oldest request may wait for others to fill its batch, when inference is idle. Default 2 ms.
        queue_seconds: audio that may wait; more is refused. One utterance is always taken by an empty queue. Default 300.
    """

    batch_seconds: float = 30.0
    wait_seconds: float = 0.002
    queue_seconds: float = 300.0


@dataclass(frozen=True)
class BatchRecord:
    """What one batch was: utterances, seconds of real and of padded audio, seconds of inference."""

    size: int
    real_seconds: float
    padded_seconds: float
    inference_seconds: float


@dataclass(frozen=True)
class Features:
    """One utterance's features, (T, d) or (L, T, d) float32, and the seconds it queued and its batch ran."""

    array: Array
    queue_seconds: float
    inference_seconds: float


@dataclass(eq=False)
class _Job:
    waveform: Array
    layer: int | None
    space: Space
    future: "Future[Features]" = field(default_factory=Future)
    queued: float = field(default_factory=time.monotonic)


class FeatureEngine:
    """A student in evaluation mode and the one thread that runs it.

    Example:
        >>> engine = FeatureEngine(load_student("runs/demo/export"))
        >>> features = await engine.features(waveform)  # .array is (L, T, d)

    Args:
        student: the model; moved to the device and put into evaluation mode.
        device: where it runs, such as ``cpu`` or ``cuda:0``.
        limits: of batches and queue.
        on_batch: called in the inference thread after each batch.

    Raises:
        ValueError: there is no such device.
    """

    def __init__(
        self,
        student: Student,
        device: str | torch.device = "cpu",
        limits: BatchLimits | None = None,
        on_batch: Callable[[BatchRecord], None] | None = None,
    ) -> None:
        try:
            self.device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            # PyTorch's own messages run over many lines; builds without CUDA raise AssertionError.
            raise ValueError(f"Can't use device '{device}': PyTorch finds no such device on this machine.") from error
        self._student = student.to(self.device).eval()
        self.num_parameters = sum(parameter.numel() for parameter in self._student.parameters())
        # One frame of silence: warms the model up and shows its shape.
        silence = np.zeros(RECEPTIVE_FIELD, np.float32)
        (hidden,), (projected,) = (
            self._run([_Job(silence, None, "student")]),
            self._run([_Job(silence, None, "teacher")]),
        )
        self.num_layers: int = hidden.shape[0]
        self.dim: int = hidden.shape[2]
        self.teacher_dim: int = projected.shape[2]
        self._limits = limits or BatchLimits()
        self._on_batch = on_batch
        self._waiting: list[_Job] = []
        self._queued_samples = 0
        self._closed = False
        self._speed = 10.0  # audio seconds per second, measured as it goes; only Retry-After needs it
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._thread.start()

    @property
    def queued_seconds(self) -> float:
        """Audio that waits, in seconds."""
        return self._queued_samples / SAMPLE_RATE

    @property
    def alive(self) -> bool:
        """Whether it takes and answers work."""
        return self._thread.is_alive() and not self._closed

    def check_room(self) -> None:
        """Refuses early, before a body is read.

        Raises:
            ServiceError: ``overloaded``, with Retry-After, where the queue is full already.
        """
        if self.queued_seconds >= self._limits.queue_seconds:
            raise self._overloaded()

    async def features(self, waveform: Array, layer: int | None = None, space: Space = "student") -> Features:
        """The student's features for one utterance; they depend on nothing else, neighbours in the batch included.

        A caller that is cancelled while it waits for its turn is dropped without inference.

        Args:
            waveform: (S,) float32, 16 kHz, in [-1, 1], at least 400 samples.
            layer: 1-based Transformer layer, or None for all.
            space: ``student`` for hidden states, ``teacher`` for the heads' projections.

        Returns:
            Features of (T, d) float32, or (L, T, d) for all layers; T counts real frames only.

        Raises:
            ServiceError: ``overloaded``.
            EngineClosedError: after ``close``.
        """
        assert layer is None or 1 <= layer <= self.num_layers
        job = _Job(waveform, layer, space)
        with self._changed:
            if self._closed:
                raise EngineClosedError
            room = self._limits.queue_seconds * SAMPLE_RATE - self._queued_samples
            if self._waiting and len(waveform) > room:
                raise self._overloaded()
            self._waiting.append(job)
            self._queued_samples += len(waveform)
            self._changed.notify()
        try:
            return await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:
            with self._changed:
                if job in self._waiting:  # Frees its room now, not when its turn comes.
                    self._waiting.remove(job)
                    self._queued_samples -= len(job.waveform)
            raise

    def close(self) -> None:
        """Finish what is queued and stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _overloaded(self) -> ServiceError:
        seconds = max(1, math.ceil(self.queued_seconds / self._speed))
        message = f"The service is overloaded: {self.queued_seconds:.0f} seconds of audio wait; ask again later."
        return ServiceError("overloaded", message, {"retry-after": str(min(seconds, 60))})

    def _work(self) -> None:
        while batch := self._next_batch():
            started = time.monotonic()
            try:
                arrays = self._run(batch)
            except Exception as error:
                for job in batch:
                    job.future.set_exception(error)
                continue
            elapsed = time.monotonic() - started
            for job, array in zip(batch, arrays, strict=True):
                job.future.set_result(Features(array, started - job.queued, elapsed))
            real = sum(len(job.waveform) for job in batch) / SAMPLE_RATE
            padded = len(batch) * max(len(job.waveform) for job in batch) / SAMPLE_RATE
            self._speed += 0.1 * (real / max(elapsed, 1e-6) - self._speed)
            if self._on_batch:
                self._on_batch(BatchRecord(len(batch), real, padded, elapsed))

    def _next_batch(self) -> list[_Job]:
        """Waits for work; empty once closed and done."""
        budget = int(self._limits.batch_seconds * SAMPLE_RATE)
        with self._changed:
            while True:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return []
                patience = self._waiting[0].queued + self._limits.wait_seconds - time.monotonic()
                if patience > 0 and self._queued_samples < budget and not self._closed:
                    self._changed.wait(patience)
                    continue
                chosen = choose_batch([len(job.waveform) for job in self._waiting], budget)
                batch = [self._waiting[index] for index in chosen]
                taken = set(chosen)
                self._waiting = [job for index, job in enumerate(self._waiting) if index not in taken]
                self._queued_samples -= sum(len(job.waveform) for job in batch)
                if running := [job for job in batch if job.future.set_running_or_notify_cancel()]:
                    return running

    @torch.inference_mode()
    def _run(self, jobs: Sequence[_Job]) -> list[Array]:
        lengths = torch.tensor([len(job.waveform) for job in jobs])
        waveforms = torch.zeros(len(jobs), int(lengths.max()))
        for row, job in zip(waveforms, jobs, strict=True):
            row[: len(job.waveform)] = torch.from_numpy(job.waveform)
        layers, _, num_frames = self._student.layer_outputs(waveforms.to(self.device), lengths.to(self.device))
        arrays = []
        for row_number, (job, frames) in enumerate(zip(jobs, num_frames.tolist(), strict=True)):
            numbers = range(len(layers)) if job.layer is None else [job.layer - 1]
            rows = [layers[number][row_number, :frames] for number in numbers]
            if job.space == "teacher":
                rows = [self._student.heads[number](row) for number, row in zip(numbers, rows, strict=True)]
            chosen = torch.stack(rows) if job.layer is None else rows[0]
            # A copy, so that an answer being sent doesn't keep the batch alive.
            arrays.append(chosen.float().cpu().numpy().copy())
        return arrays
