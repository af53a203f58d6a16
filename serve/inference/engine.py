"""Run a model for the service: requests that wait together are batched, in one thread, off the event loop."""

import asyncio
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from ray_distill.serve.api.errors import ServiceError
from ray_distill.serve.inference.backends import Array, Backend, Space, Wanted
from ray_distill.serve.inference.batch_selection import choose_batch
from ray_distill.teacher_cache.frames import RECEPTIVE_FIELD, SAMPLE_RATE

_SILENCE = [Wanted(np.zeros(count, np.float32), None, "student") for count in (RECEPTIVE_FIELD, 2 * SAMPLE_RATE)]

_NICENESS = 10
_RETRY_SECONDS = 0.05  # between attempts of what waits for room in the queue
_FAILED_BATCHES = 3  # one after another: inference is broken, not a request


class EngineClosedError(Exception):
    """The engine takes no more work, because another has taken its place or the service stops."""


@dataclass(frozen=True)
class BatchLimits:
    """Bounds of batches and of the queue.

    Attributes:
        batch_seconds: audio of a batch, padding included. Default None: 8 on a CPU, where long clips gain nothing from company
            and wait for each other, else 30.
        wait_seconds: how long the oldest request may wait for others to fill its batch, when inference is idle. Default 2 ms.
        queue_seconds: audio that may wait; more is refused. One utterance is always taken by an empty queue. Default 300.
    """

    batch_seconds: float | None = None
    wait_seconds: float = 0.002
    queue_seconds: float = 300.0

    def __post_init__(self) -> None:
        for name in ("batch_seconds", "queue_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number greater than 0, not {value}.")
        if not 0 <= self.wait_seconds < math.inf:
            raise ValueError(f"wait_seconds must be a number, 0 or greater, not {self.wait_seconds}.")


@dataclass(frozen=True)
class BatchRecord:
    """What one batch was: utterances, seconds of real and of padded audio, seconds of inference."""

    size: int
    real_seconds: float
    padded_seconds: float
    inference_seconds: float


@dataclass(frozen=True)
class Features:
    """One utterance's features, (T, d) or (L, T, d) float32, the seconds it queued and its batch ran, in how many windows."""

    array: Array
    queue_seconds: float
    inference_seconds: float
    windows: int = 1


@dataclass(eq=False)
class _Job(Wanted):
    future: "Future[Features]" = field(default_factory=Future)
    queued: float = field(default_factory=time.monotonic)


class FeatureEngine:
    """A model and the one thread that runs it.

    Example:
        >>> engine = FeatureEngine(TorchBackend(load_student("runs/demo/export")))
        >>> features = await engine.features(waveform)  # .array is (L, T, d)

    Args:
        backend: the model; warmed up here.
        limits: of batches and queue.
        on_batch: called in the inference thread after each batch.
    """

    def __init__(
        self,
        backend: Backend,
        limits: BatchLimits | None = None,
        on_batch: Callable[[BatchRecord], None] | None = None,
    ) -> None:
        self.backend = backend
        self.limits = limits or BatchLimits()
        self.batch_seconds = self.limits.batch_seconds or (8.0 if backend.device == "cpu" else 30.0)
        backend.run(_SILENCE)
        self._on_batch = on_batch
        self._waiting: list[_Job] = []
        self._queued_samples = 0
        self._closed = False
        self._failed_batches = 0
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
        """Whether it takes and answers work; not once its last three batches failed."""
        return self._thread.is_alive() and not self._closed and self._failed_batches < _FAILED_BATCHES

    def check_room(self) -> None:
        """Refuses early, before a body is read.

        Raises:
            ServiceError: ``overloaded``, with Retry-After, where the queue is full already.
        """
        if self.queued_seconds >= self.limits.queue_seconds:
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
        assert layer is None or 1 <= layer <= self.backend.num_layers
        job = _Job(waveform, layer, space)
        with self._changed:
            if self._closed:
                raise EngineClosedError
            room = self.limits.queue_seconds * SAMPLE_RATE - self._queued_samples
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

    async def patient_features(self, waveform: Array, layer: int | None = None, space: Space = "student") -> Features:
        """As `features`, but waits where the queue is full: for what belongs to a request that was let in already."""
        while True:
            try:
                return await self.features(waveform, layer, space)
            except ServiceError:
                await asyncio.sleep(_RETRY_SECONDS)

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
        # Linux gives threads priorities of their own: inference leaves the core to the event loop, which answers and refuses others
        # in the meantime. PyTorch's threads are started by this one, and inherit it.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while batch := self._next_batch():
            error = self._run(batch)
            if error is None:
                continue
            self._failed_batches += 1
            # One whose fault it was must not cost the others of its batch their answers.
            for job in batch:
                own = error if len(batch) == 1 else self._run([job])
                if own is not None:
                    job.future.set_exception(own)

    def _run(self, batch: list[_Job]) -> Exception | None:
        """Answers the jobs; or answers none, and gives back why the backend failed."""
        started = time.monotonic()
        try:
            arrays = self.backend.run(batch)
        except Exception as error:
            return error
        elapsed = time.monotonic() - started
        self._failed_batches = 0
        for job, array in zip(batch, arrays, strict=True):
            job.future.set_result(Features(array, started - job.queued, elapsed))
        real = sum(len(job.waveform) for job in batch) / SAMPLE_RATE
        padded = len(batch) * max(len(job.waveform) for job in batch) / SAMPLE_RATE
        self._speed += 0.1 * (real / max(elapsed, 1e-6) - self._speed)
        if self._on_batch:
            self._on_batch(BatchRecord(len(batch), real, padded, elapsed))
        return None

    def _next_batch(self) -> list[_Job]:
        """Waits for work; empty once closed and done."""
        budget = int(self.batch_seconds * SAMPLE_RATE)
        with self._changed:
            while True:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return []
                patience = self._waiting[0].queued + self.limits.wait_seconds - time.monotonic()
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
