"""The batching engine: it runs a model in one thread, and batches the utterances that wait together."""

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from ray_distill.memory import ran_out_of_memory
from ray_distill.serve.api.errors import ServiceError
from ray_distill.serve.inference.backends import Array, Backend, LayerRequest, Space
from ray_distill.serve.inference.batch_selection import choose_batch
from ray_distill.serve.settings import BatchLimits
from ray_distill.teacher_cache.frames import RECEPTIVE_FIELD, SAMPLE_RATE

_SILENCE = [LayerRequest(np.zeros(count, np.float32), None, "student") for count in (RECEPTIVE_FIELD, 2 * SAMPLE_RATE)]

_LOG = logging.getLogger(__name__)
_NICENESS = 10
_RETRY_SECONDS = 0.05  # Time between attempts of an utterance that waits for room in the queue.
_MAX_FAILED_BATCHES = 3  # After so many failures in a row, inference is considered broken rather than a request.


class EngineClosedError(Exception):
    """The engine accepts no more work, because it has been replaced or the service is stopping."""


@dataclass(frozen=True)
class BatchRecord:
    """Measurements of one batch.

    Attributes:
        size: Number of utterances.
        real_seconds: Audio without padding.
        padded_seconds: Audio with padding.
        inference_seconds: Duration of inference.
    """

    size: int
    real_seconds: float
    padded_seconds: float
    inference_seconds: float


@dataclass(frozen=True)
class Features:
    """Features of one utterance.

    Attributes:
        array: (T, d) float32, or (L, T, d) for all layers.
        queue_seconds: Time in the queue.
        inference_seconds: Inference time of the batch.
        windows: Number of windows in which the utterance ran. Default 1.
    """

    array: Array
    queue_seconds: float
    inference_seconds: float
    windows: int = 1


@dataclass(eq=False)
class _Job(LayerRequest):
    future: "Future[Features]" = field(default_factory=Future)
    queued: float = field(default_factory=time.monotonic)


class FeatureEngine:
    """A model and the thread that runs it.

    Example:
        >>> engine = FeatureEngine(TorchBackend(load_student("runs/demo/export")))
        >>> features = await engine.features(waveform)  # .array is (L, T, d)

    Args:
        backend: Model to run; it is warmed up here.
        limits: Bounds of batches and of the queue. Default: ``BatchLimits()``.
        on_batch: Called in the inference thread after each batch. Default: nothing is called.
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
        self._speed = 10.0  # Seconds of audio per second, a moving average for Retry-After.
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._thread.start()

    @property
    def queued_seconds(self) -> float:
        """Audio in the queue, in seconds."""
        return self._queued_samples / SAMPLE_RATE

    @property
    def alive(self) -> bool:
        """Whether the engine accepts and completes work; False after three failed batches in a row."""
        return self._thread.is_alive() and not self._closed and self._failed_batches < _MAX_FAILED_BATCHES

    def check_room(self) -> None:
        """Refuse a request before its body is read if the queue is full.

        Raises:
            ServiceError: ``overloaded``, with Retry-After.
        """
        if self.queued_seconds >= self.limits.queue_seconds:
            raise self._overloaded()

    async def features(
        self,
        waveform: Array,
        layer: int | None = None,
        space: Space = "student",
        *,
        wait_for_room: bool = False,
    ) -> Features:
        """Return the features of one utterance; they do not depend on the rest of its batch.

        If the caller is cancelled while the utterance is in the queue, the utterance is removed and never runs.

        Args:
            waveform: (S,) float32, 16 kHz, in [-1, 1], at least 400 samples.
            layer: Transformer layer counted from 1, or None for all layers. Default None.
            space: ``student`` for hidden states, ``teacher`` for predictions of the teacher's layers. Default ``student``.
            wait_for_room: Whether to wait while the queue is full, for the further utterances of an admitted request. Default
                False: refuse.

        Raises:
            ServiceError: ``overloaded``.
            EngineClosedError: ``close`` was called.
        """
        while True:
            try:
                return await self._queue(_Job(waveform, layer, space))
            except ServiceError:
                if not wait_for_room:
                    raise
                await asyncio.sleep(_RETRY_SECONDS)

    async def _queue(self, job: _Job) -> Features:
        assert job.layer is None or 1 <= job.layer <= self.backend.num_layers
        with self._changed:
            if self._closed:
                raise EngineClosedError
            room = self.limits.queue_seconds * SAMPLE_RATE - self._queued_samples
            if self._waiting and len(job.waveform) > room:
                raise self._overloaded()
            self._waiting.append(job)
            self._queued_samples += len(job.waveform)
            self._changed.notify()
        try:
            return await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:
            with self._changed:
                if job in self._waiting:  # Frees the room in the queue at once.
                    self._waiting.remove(job)
                    self._queued_samples -= len(job.waveform)
            raise

    def close(self) -> None:
        """Complete the queued work and stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _overloaded(self) -> ServiceError:
        seconds = max(1, math.ceil(self.queued_seconds / self._speed))
        message = (
            f"The service is overloaded: {self.queued_seconds:.0f} seconds of audio are in the queue; try again later."
        )
        return ServiceError("overloaded", message, {"retry-after": str(min(seconds, 60))})

    def _work(self) -> None:
        # On Linux each thread has its own priority. A lower one lets the event loop respond to other requests during inference.
        # PyTorch's threads are started by this thread and inherit its priority.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while batch := self._next_batch():
            error = self._run(batch)
            if error is None:
                continue
            self._failed_batches += 1
            # Run the utterances one by one, so that one faulty utterance does not fail the others of its batch.
            for job in batch:
                own = error if len(batch) == 1 else self._run([job])
                if own is not None and ran_out_of_memory(own):
                    seconds = len(job.waveform) / SAMPLE_RATE
                    _LOG.error("Memory ran out with %.1f s of audio; lower batch_seconds or max_seconds", seconds)
                    own = ServiceError(
                        "too_long",
                        f"The service has too little memory for {seconds:.1f} s of audio at once; send shorter audio.",
                    )
                if own is not None:
                    job.future.set_exception(own)

    def _run(self, batch: list[_Job]) -> Exception | None:
        """Complete all jobs, or complete none and return the error of the backend."""
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
        """Wait for the next batch; return an empty list when the engine is closed and its queue is empty."""
        budget = int(self.batch_seconds * SAMPLE_RATE)
        with self._changed:
            while True:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return []
                remaining = self._waiting[0].queued + self.limits.wait_seconds - time.monotonic()
                if remaining > 0 and self._queued_samples < budget and not self._closed:
                    self._changed.wait(remaining)
                    continue
                chosen = choose_batch([len(job.waveform) for job in self._waiting], budget)
                batch = [self._waiting[index] for index in chosen]
                taken = set(chosen)
                self._waiting = [job for index, job in enumerate(self._waiting) if index not in taken]
                self._queued_samples -= sum(len(job.waveform) for job in batch)
                if running := [job for job in batch if job.future.set_running_or_notify_cancel()]:
                    return running
