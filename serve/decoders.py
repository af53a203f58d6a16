"""The threads that decode audio, and the admission of their work by its cost."""

import asyncio
import math
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from ray_distill.serve.api.errors import ServiceError
from ray_distill.serve.decoding import decode
from ray_distill.serve.inference.backends import Array
from ray_distill.serve.inference.cost_estimate import CostEstimate
from ray_distill.serve.inference.schedule import overloaded
from ray_distill.serve.settings import Limits
from ray_distill.teacher_cache.audio import AudioHeader
from ray_distill.teacher_cache.frames import SAMPLE_RATE

NUM_DECODERS = max(2, min(4, len(os.sched_getaffinity(0))))
"""Number of audio files decoded at once. It bounds the memory of decoding and the cores that decoding takes from inference."""
_NICENESS = 15  # Lower priority than inference, so that decoding never starves it.
_SECONDS_PER_VALUE = 40e-9  # Before the first measurement.
_CHEAP_SECONDS = 0.25  # One thread takes no file that costs more, so that cheap ones always find a thread.
_PATIENCE = 10.0  # A file lets others pass that are cheaper and come at most this many times its cost later.


class _CancelledError(Exception):
    """The request of a file that is being decoded has ended."""


@dataclass(eq=False)
class _Task:
    """A file to decode, with its expected values, expected seconds, and place in the order."""

    audio: bytes
    header: AudioHeader
    values: float
    seconds: float
    place: float
    decoded: int = 0
    future: "Future[Array]" = field(default_factory=Future)
    cancelled: bool = False


class Decoders:
    """Threads that decode files in order of arrival and cost.

    The cost of a file is the number of values that its header promises (samples times channels, and once more the samples if they
    must be resampled) times the seconds per value of its encoding, which are measured. While more than ``limits.decode_seconds``
    wait, further files are refused; idle decoders accept any file. A file that turns out to hold more than its header promises is
    charged for it while it is decoded, and refused if the rest does not fit.

    Args:
        limits: Longest audio and the bound of the waiting work.
        on_decoded: Called in the threads with the seconds that a file took. Default: nothing is called.
    """

    def __init__(self, limits: Limits, on_decoded: Callable[[float], None] | None = None) -> None:
        self._limits, self._on_decoded = limits, on_decoded
        self._costs: defaultdict[str, CostEstimate] = defaultdict(lambda: CostEstimate(_SECONDS_PER_VALUE))
        self._waiting: list[_Task] = []
        self._running: list[_Task] = []
        self._closed = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, args=(number == 0,), name="decoder", daemon=True)
            for number in range(NUM_DECODERS)
        ]
        for thread in self._threads:
            thread.start()

    def admit(self, headers: Sequence[AudioHeader]) -> float:
        """Return the seconds after which the files of a request are expected to be decoded.

        Raises:
            ServiceError: ``overloaded``, with Retry-After, if too much work waits.
        """
        with self._changed:
            own = sum(self._seconds(header) for header in headers)
            waiting = sum(task.seconds for task in self._waiting)
            ahead = sum(task.seconds for task in self._waiting if task.seconds <= own)
            busy = len(self._running) == NUM_DECODERS or (
                own > _CHEAP_SECONDS and self._expensive() >= NUM_DECODERS - 1
            )
            running = max((task.seconds for task in self._running), default=0.0) if busy else 0.0
            if (self._waiting or busy) and waiting + own > self._limits.decode_seconds:
                raise self._refusal(waiting)
            return running + ahead / NUM_DECODERS + own

    async def decode(self, audio: bytes, header: AudioHeader) -> Array:
        """Decode a file; see `decode`. If the caller is cancelled, the work stops.

        Raises:
            ServiceError: as `decode`, or ``overloaded`` if the file holds more than its header promises and there is no room for it.
        """
        with self._changed:
            seconds = self._seconds(header)
            task = _Task(audio, header, self._values(header), seconds, time.monotonic() + _PATIENCE * seconds)
            self._waiting.append(task)
            self._changed.notify_all()
        try:
            return await asyncio.wrap_future(task.future)
        except asyncio.CancelledError:
            with self._changed:
                task.cancelled = True
                if task in self._waiting:
                    self._waiting.remove(task)
            raise

    @property
    def waiting_seconds(self) -> float:
        """Expected work of the files that wait, in seconds."""
        with self._changed:
            return sum(task.seconds for task in self._waiting)

    def close(self) -> None:
        """Stop the threads; files that wait are not decoded."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _values(self, header: AudioHeader) -> float:
        """Return the number of values to decode and resample; decoding stops at the longest audio that is accepted."""
        frames = max(1, min(header.claimed_frames, math.ceil(self._limits.longest_seconds * header.rate)))
        return frames * (header.channels + (header.rate != SAMPLE_RATE))

    def _seconds(self, header: AudioHeader) -> float:
        return self._costs[header.subtype].seconds(self._values(header))

    def _expensive(self) -> int:
        return sum(task.seconds > _CHEAP_SECONDS for task in self._running)

    def _refusal(self, waiting: float) -> ServiceError:
        return overloaded(f"{waiting:.1f} seconds of work wait to be decoded", waiting / NUM_DECODERS)

    def _next(self, cheap_only: bool) -> _Task | None:
        """Take the next file; return None when the decoders are closed."""
        with self._changed:
            while not self._closed:
                able = [task for task in self._waiting if not (cheap_only and task.seconds > _CHEAP_SECONDS)]
                if able:
                    task = min(able, key=lambda task: task.place)
                    self._waiting.remove(task)
                    self._running.append(task)
                    return task
                self._changed.wait()
        return None

    def _work(self, cheap_only: bool) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while task := self._next(cheap_only):
            started = time.monotonic()
            try:
                if not task.future.set_running_or_notify_cancel():
                    continue
                waveform = decode(task.audio, self._limits.longest_seconds, partial(self._charge, task))
            except Exception as error:
                task.future.set_exception(error)
            else:
                task.future.set_result(waveform)
                seconds = time.monotonic() - started
                with self._changed:
                    self._costs[task.header.subtype].record(task.values, seconds)
                if self._on_decoded:
                    self._on_decoded(seconds)
            finally:
                with self._changed:
                    self._running.remove(task)

    def _charge(self, task: _Task, count: int) -> None:
        """Count decoded values; called for each block of a file.

        Raises:
            ServiceError: ``overloaded`` if the file has more values than promised, and other work waits that leaves no room for them.
        """
        with self._changed:
            if task.cancelled:
                raise _CancelledError
            task.decoded += count
            if task.decoded <= task.values:
                return
            task.seconds *= task.decoded / task.values
            task.values = task.decoded
            waiting = sum(other.seconds for other in self._waiting)
            if self._waiting and waiting + task.seconds > self._limits.decode_seconds:
                raise self._refusal(waiting)
