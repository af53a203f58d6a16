"""The batching engine: it runs a model in one thread, and batches the utterances that wait together."""

import asyncio
import logging
import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ray_distill.memory import ran_out_of_memory
from ray_distill.serve.api.errors import ServiceError
from ray_distill.serve.inference.backends import Array, Backend, LayerRequest, Space
from ray_distill.serve.inference.schedule import Job, Reservation, Schedule
from ray_distill.serve.settings import BatchLimits
from ray_distill.teacher_cache.frames import RECEPTIVE_FIELD, SAMPLE_RATE

_NOISE = np.random.default_rng(0).normal(0, 0.1, 2 * SAMPLE_RATE).astype(np.float32)
_WARM_UP = [LayerRequest(_NOISE[:count], None, "student") for count in (RECEPTIVE_FIELD, len(_NOISE))]

_LOG = logging.getLogger(__name__)
NICENESS = 10
"""Priority of inference on Linux, lower than that of the event loop and higher than that of the decoders."""
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
        completed: Time at which inference was complete, by `time.monotonic`. Default 0.
    """

    array: Array
    queue_seconds: float
    inference_seconds: float
    windows: int = 1
    completed: float = 0.0


class FeatureEngine:
    """A model and the thread that runs it.

    Example:
        >>> engine = FeatureEngine(TorchBackend(load_student("runs/demo/export")))
        >>> features = await engine.features(waveform)  # .array is (L, T, d)

    Args:
        backend: Model to run; it is warmed up here.
        limits: Bounds of batches and of the queue. Default: ``BatchLimits()``.
        on_batch: Called in the inference thread after each batch. Default: nothing is called.

    Raises:
        ValueError: the model's features are not finite.
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
        self._schedule = Schedule(self.limits, self.batch_seconds, backend.num_layers, stops_early=backend.stops_early)
        self._warm_up()
        self._on_batch = on_batch
        self._closed = False
        self._failed_batches = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._thread.start()

    def _warm_up(self) -> None:
        if not all(np.isfinite(array).all() for array in self.backend.run(_WARM_UP)):
            raise ValueError("The model's features of noise are not finite numbers, so its weights are damaged.")
        (long,) = _WARM_UP[1:]
        started = time.monotonic()
        self.backend.run([long])
        self._schedule.finish([Job(long.waveform, long.layer, long.space)], time.monotonic() - started)

    @property
    def queued_seconds(self) -> float:
        """Audio in the queue, in seconds."""
        return self._schedule.queued_samples / SAMPLE_RATE

    @property
    def queued_utterances(self) -> int:
        """Number of utterances in the queue."""
        return len(self._schedule.waiting)

    @property
    def expected_wait(self) -> float:
        """Expected time of the admitted work, in seconds."""
        with self._changed:
            return self._schedule.expected_wait()

    @property
    def alive(self) -> bool:
        """Whether the engine accepts and completes work; False after three failed batches in a row."""
        return self._thread.is_alive() and not self._closed and self._failed_batches < _MAX_FAILED_BATCHES

    def check_room(self, deadline: float = math.inf) -> None:
        """Refuse a request before its body is read; see `Schedule.check_room`.

        Raises:
            ServiceError: ``overloaded``, with Retry-After.
        """
        with self._changed:
            self._schedule.check_room(deadline)

    def admit(
        self, lengths: Sequence[int], layer: int | None, deadline: float = math.inf, delay: float = 0.0
    ) -> Reservation:
        """Reserve a place in the queue for utterances that are not decoded yet, until `release`; see `Schedule.admit`.

        Raises:
            ServiceError: ``overloaded`` or ``deadline``.
        """
        with self._changed:
            return self._schedule.admit(lengths, layer, deadline, delay)

    def release(self, reservation: Reservation) -> None:
        """Give up what is left of a reservation."""
        with self._changed:
            self._schedule.release(reservation)

    async def features(
        self,
        waveform: Array,
        layer: int | None = None,
        space: Space = "student",
        reservation: Reservation | None = None,
    ) -> Features:
        """Return the features of one utterance; they do not depend on the rest of its batch.

        If the caller is cancelled while the utterance is in the queue, the utterance is removed and never runs. Neither does one
        that can't be complete by the deadline of its reservation.

        Args:
            waveform: (S,) float32, 16 kHz, in [-1, 1], at least 400 samples.
            layer: Transformer layer counted from 1, or None for all layers. Default None.
            space: ``student`` for hidden states, ``teacher`` for predictions of the teacher's layers. Default ``student``.
            reservation: Place of an admitted request. Default: the utterance is admitted here, without a deadline.

        Raises:
            ServiceError: ``overloaded`` or ``deadline``.
            EngineClosedError: ``close`` was called.
        """
        assert layer is None or 1 <= layer <= self.backend.num_layers
        job = Job(waveform, layer, space)
        with self._changed:
            if self._closed:
                raise EngineClosedError
            if reservation is None:
                own = self._schedule.admit([len(waveform)], layer)
                self._schedule.add(job, own)
                self._schedule.release(own)
            else:
                self._schedule.add(job, reservation)
            self._changed.notify()
        try:
            return await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:
            with self._changed:
                self._schedule.remove(job)  # Frees the room in the queue at once.
            raise

    def close(self) -> None:
        """Complete the queued work and stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        # On Linux each thread has its own priority. A lower one lets the event loop respond to other requests during inference.
        # PyTorch's threads are started by this thread and inherit its priority.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
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

    def _run(self, batch: list[Job]) -> Exception | None:
        """Complete all jobs, or complete none and return the error of the backend."""
        started = time.monotonic()
        try:
            arrays = self.backend.run(batch)
        except Exception as error:
            # Its frames hold the tensors of the batch, whose memory the utterances may need one by one.
            traceback.clear_frames(error.__traceback__)
            with self._changed:
                self._schedule.finish(batch, None)
            return error
        elapsed = time.monotonic() - started
        self._failed_batches = 0
        # Before the answers, so that whoever has one also finds the room in the queue.
        with self._changed:
            self._schedule.finish(batch, elapsed)
        for job, array in zip(batch, arrays, strict=True):
            job.future.set_result(Features(array, started - job.queued, elapsed, completed=started + elapsed))
        real = sum(len(job.waveform) for job in batch) / SAMPLE_RATE
        padded = len(batch) * max(len(job.waveform) for job in batch) / SAMPLE_RATE
        if self._on_batch:
            self._on_batch(BatchRecord(len(batch), real, padded, elapsed))
        return None

    def _next_batch(self) -> list[Job]:
        """Wait for the next batch; return an empty list when the engine is closed and its queue is empty."""
        schedule = self._schedule
        with self._changed:
            while True:
                while not schedule.waiting and not self._closed:
                    self._changed.wait()
                if not schedule.waiting:
                    return []
                for job in schedule.take_late():
                    if job.future.set_running_or_notify_cancel():
                        message = "The request can't be complete by its deadline any more, so it did not run."
                        job.future.set_exception(ServiceError("deadline", message))
                if not schedule.waiting:
                    continue
                if (remaining := schedule.fill_seconds()) > 0 and not self._closed:
                    self._changed.wait(remaining)
                    continue
                batch = schedule.take_batch()
                if running := [job for job in batch if job.future.set_running_or_notify_cancel()]:
                    return running
                schedule.finish(batch, None)
