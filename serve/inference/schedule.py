"""The order of a model's work: what is admitted, and which utterances run next. It runs nothing itself."""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ray_distill.serve.api.errors import ServiceError
from ray_distill.serve.inference.backends import LayerRequest
from ray_distill.serve.inference.batch_selection import MIN_FILL, choose_batch
from ray_distill.serve.inference.cost_estimate import CostEstimate
from ray_distill.serve.settings import BatchLimits
from ray_distill.teacher_cache.frames import SAMPLE_RATE

WAIT_SHARE = 0.8
"""Share of the time until its deadline that a request may have to wait. The rest is for its own work and wrong estimates."""
_MARGIN = 0.1  # Share of the time until the deadline that is left for errors of the estimate.
_MOST_RETRY_SECONDS = 60


@dataclass(eq=False)
class Reservation:
    """A place in the order for the utterances of an admitted request, which may not be decoded yet.

    Attributes:
        admitted: Time of the admission, which is the place in the order.
        deadline: Time at which the result is worthless.
        seconds: Expected inference time of the utterances that are not in the queue yet.
        samples: Samples of these utterances.
    """

    admitted: float
    deadline: float
    seconds: float
    samples: int


@dataclass(eq=False)
class Job(LayerRequest):
    """A request for one utterance in the queue.

    Attributes:
        admitted, deadline: As in `Reservation`.
        queued: Time at which it came into the queue.
        seconds: Expected inference time.
        future: Result of the utterance.
    """

    admitted: float = 0.0
    deadline: float = math.inf
    queued: float = 0.0
    seconds: float = 0.0
    future: "Future[Any]" = field(default_factory=Future)


class Schedule:
    """The queue of one model, in the order of admission. It is not safe for threads.

    A request is admitted if it can be expected to wait at most `WAIT_SHARE` of the time until its deadline, and to be complete by
    then. So requests beyond the capacity are refused at once, and all of the capacity goes into work that is in time.

    Args:
        limits: Bounds of the queue.
        batch_seconds: Audio in a batch, padding included, in seconds.
        num_layers: Number of layers of the model.
        stops_early: Whether lower layers need less time. Default True.
        clock: Function that returns the time in seconds. Default `time.monotonic`.
    """

    def __init__(
        self,
        limits: BatchLimits,
        batch_seconds: float,
        num_layers: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        stops_early: bool = True,
    ) -> None:
        self._limits, self._clock = limits, clock
        self._num_layers, self._stops_early = num_layers, stops_early
        self._budget = int(batch_seconds * SAMPLE_RATE)
        self._cost = CostEstimate(0.1, clock)  # Seconds of inference per second of audio.
        self._reservations: set[Reservation] = set()
        self._busy_until = 0.0
        self.waiting: list[Job] = []
        """Utterances in the queue, in the order in which they were admitted."""
        self.queued_samples = 0
        self._queued_seconds = 0.0  # Expected inference time of the queue.

    def expected_wait(self) -> float:
        """Return the seconds after which the work that is already admitted is expected to be complete; 0 if there is none."""
        # A batch that takes longer than expected may take as much longer again.
        running = abs(self._busy_until - self._clock()) if self._busy_until else 0.0
        return running + max(0.0, self._queued_seconds) + sum(item.seconds for item in self._reservations)

    def check_room(self, deadline: float = math.inf) -> None:
        """Refuse a request whose audio is not known yet, if no audio at all would be admitted.

        Raises:
            ServiceError: ``overloaded``, with Retry-After.
        """
        outstanding = self._outstanding_samples()
        wait = self.expected_wait()
        is_late = wait > max(0.0, WAIT_SHARE * (deadline - self._clock()))
        if outstanding >= self._limits.queue_seconds * SAMPLE_RATE or is_late:
            raise overloaded(f"{outstanding / SAMPLE_RATE:.0f} seconds of audio are in the queue", wait)

    def admit(
        self, lengths: Sequence[int], layer: int | None, deadline: float = math.inf, delay: float = 0.0
    ) -> Reservation:
        """Reserve a place for utterances, until `release`.

        Args:
            lengths: Samples of each utterance.
            layer: Layer that is wanted, or None for all.
            deadline: Time at which the result is worthless. Default: never.
            delay: Seconds until the utterances are decoded. Default 0.

        Raises:
            ServiceError: ``overloaded``, with Retry-After; or ``deadline`` if the deadline is too early even for an idle service.
        """
        now = self._clock()
        depth = self._depth(layer)
        remaining = deadline - now
        seconds = sum(self._cost.seconds(length / SAMPLE_RATE, depth) for length in lengths)
        hopeful = sum(self._cost.seconds(length / SAMPLE_RATE, depth, hopeful=True) for length in lengths)
        if hopeful > remaining:
            raise ServiceError(
                "deadline",
                f"{sum(lengths) / SAMPLE_RATE:.1f} seconds of audio take about {seconds:.1f} s here, and {max(remaining, 0):.1f} s "
                "are left until the request's deadline; send shorter audio or allow more time.",
            )
        wait = self.expected_wait()
        outstanding = self._outstanding_samples()
        is_full = outstanding > 0 and outstanding + lengths[0] > self._limits.queue_seconds * SAMPLE_RATE
        later = max(wait, delay)
        # An idle model takes what may be in time, also to measure it again.
        is_late = later > WAIT_SHARE * remaining or (wait > 0 and later + seconds > (1 - _MARGIN) * remaining)
        if is_full or is_late:
            raise overloaded(f"{outstanding / SAMPLE_RATE:.0f} seconds of audio are in the queue", later)
        reservation = Reservation(now, deadline, seconds, sum(lengths))
        self._reservations.add(reservation)
        return reservation

    def release(self, reservation: Reservation) -> None:
        """Give up what is left of a reservation."""
        self._reservations.discard(reservation)

    def add(self, job: Job, reservation: Reservation) -> None:
        """Put an utterance of an admitted request into the queue, at the place of its request."""
        job.admitted, job.deadline, job.queued = reservation.admitted, reservation.deadline, self._clock()
        job.seconds = self._seconds(job)
        reservation.seconds = max(0.0, reservation.seconds - job.seconds)
        reservation.samples = max(0, reservation.samples - len(job.waveform))
        place = len(self.waiting)
        while place and self.waiting[place - 1].admitted > job.admitted:
            place -= 1
        self.waiting.insert(place, job)
        self.queued_samples += len(job.waveform)
        self._queued_seconds += job.seconds

    def remove(self, job: Job) -> None:
        """Take an utterance out of the queue if it is still there."""
        if job in self.waiting:
            self.waiting.remove(job)
            self.queued_samples -= len(job.waveform)
            self._queued_seconds -= job.seconds

    def fill_seconds(self) -> float:
        """Return for how long the next batch should wait for more utterances."""
        if self.queued_samples >= self._budget:
            return 0.0
        return max(0.0, self.waiting[0].queued + self._limits.wait_seconds - self._clock())

    def take_late(self) -> list[Job]:
        """Take the utterances out of the queue that can't be complete by their deadline."""
        now = self._clock()
        late = [job for job in self.waiting if now + self._seconds(job, hopeful=True) > job.deadline]
        for job in late:
            self.remove(job)
        return late

    def take_batch(self) -> list[Job]:
        """Take the next batch out of the queue, which must not be empty.

        Younger utterances join the oldest only where that makes none that waits longer, nor the batch itself, miss its deadline.
        """
        now = self._clock()
        seconds = np.array([job.seconds for job in self.waiting])
        due = np.array([job.deadline - _MARGIN * (min(job.deadline, 1e12) - job.admitted) for job in self.waiting])
        spare = due - now - np.cumsum(seconds)
        depths = [self._depth(job.layer) for job in self.waiting]

        def may_join(index: int) -> bool:
            if min(depths[0], depths[index]) < MIN_FILL * max(depths[0], depths[index]):
                return False  # Lower layers need less time, so they are not mixed with higher ones.
            # An utterance that is expected to be late anyway does not count: the estimate may be wrong.
            if ((spare[:index] >= 0) & (spare[:index] < seconds[index])).any():
                return False
            spare[:index] -= seconds[index]
            return True

        chosen = choose_batch([len(job.waveform) for job in self.waiting], self._budget, may_join)
        batch = [self.waiting[index] for index in chosen]
        for job in batch:
            self.remove(job)
        self._busy_until = now + float(seconds[chosen].sum())
        return batch

    def finish(self, batch: Sequence[Job], seconds: float | None) -> None:
        """Record how long a batch took; None if it failed."""
        self._busy_until = 0.0
        if seconds is not None:
            # Padding counts as a part of the cost of real audio.
            mean = sum(len(job.waveform) for job in batch) / len(batch) / SAMPLE_RATE
            self._cost.record(mean, seconds / len(batch), max(self._depth(job.layer) for job in batch))
            for job in self.waiting:
                job.seconds = self._seconds(job)
            self._queued_seconds = sum(job.seconds for job in self.waiting)

    def _outstanding_samples(self) -> int:
        return self.queued_samples + sum(item.samples for item in self._reservations)

    def _depth(self, layer: int | None) -> int:
        """Return the number of layers that a request for a layer costs."""
        return layer if layer is not None and self._stops_early else self._num_layers

    def _seconds(self, job: Job, hopeful: bool = False) -> float:
        return self._cost.seconds(len(job.waveform) / SAMPLE_RATE, self._depth(job.layer), hopeful=hopeful)


def overloaded(reason: str, wait: float) -> ServiceError:
    """Return the refusal of a request that can be sent again when the work of ``wait`` seconds is done."""
    retry = min(max(1, math.ceil(wait)), _MOST_RETRY_SECONDS)
    return ServiceError(
        "overloaded", f"The service is overloaded: {reason}; try again later.", {"retry-after": str(retry)}
    )
