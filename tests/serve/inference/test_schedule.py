"""Admission by deadline, with a fake model and a virtual clock: overload costs no throughput."""

import heapq
from collections import Counter

import numpy as np
import pytest

from ray_distill.serve.api.errors import ServiceError
from ray_distill.serve.inference.cost_estimate import CostEstimate
from ray_distill.serve.inference.schedule import Job, Schedule, overloaded
from ray_distill.serve.settings import BatchLimits

LAYERS = 12
MIXES = {"short": (1.0, 4.0), "long": (40.0, 60.0), "mixed": (1.0, 60.0)}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Silence:
    """A waveform of which only the length is known, since the fake model needs no samples."""

    def __init__(self, seconds: float) -> None:
        self.count = int(seconds * 16_000)

    def __len__(self) -> int:
        return self.count


def model_seconds(rows: list[float]) -> float:
    """Time of a batch in which attention doubles the cost of a second at 60 s."""
    longest = max(rows)
    return len(rows) * longest * (1 + longest / 60) / 15


def job(seconds: float, layer: int | None = None) -> Job:
    return Job(Silence(seconds), layer, "student")  # type: ignore[arg-type]


def simulate(load: float, deadline: float, mix: str, horizon: float) -> tuple[Counter[str], float]:
    """Offer ``load`` times the capacity; return the outcomes, and the share of the time that went into answers in time."""
    rng = np.random.default_rng(0)
    clock = Clock()
    schedule = Schedule(BatchLimits(queue_seconds=1000), 8.0, LAYERS, clock)
    low, high = MIXES[mix]
    mean_cost = float(np.mean([model_seconds([x]) for x in np.exp(rng.uniform(np.log(low), np.log(high), 2000))]))
    outcomes: Counter[str] = Counter()
    useful, busy, arrival, number = 0.0, False, 0.0, 0
    batch: list[Job] = []
    events: list[tuple[float, int, str, float]] = [(0.0, 0, "arrive", 0.0)]
    while events:
        clock.now, _, kind, started = heapq.heappop(events)
        number += 1
        if kind == "arrive":
            arrival += rng.exponential(mean_cost / load)
            if arrival < horizon:
                heapq.heappush(events, (arrival, number, "arrive", 0.0))
            clip = job(float(np.exp(rng.uniform(np.log(low), np.log(high)))))
            try:
                reservation = schedule.admit([len(clip.waveform)], None, clock.now + deadline)
                schedule.add(clip, reservation)
                schedule.release(reservation)
            except ServiceError as error:
                outcomes[error.error_type] += 1
        else:
            busy = False
            schedule.finish(batch, clock.now - started)
            for one in batch:
                in_time = clock.now <= one.deadline
                outcomes["answered" if in_time else "wasted"] += 1
                if in_time and clock.now <= horizon:
                    useful += model_seconds([len(one.waveform) / 16_000])
        if not busy:
            outcomes["dropped"] += len(schedule.take_late())
            if schedule.waiting:
                batch, busy = schedule.take_batch(), True
                took = model_seconds([len(one.waveform) / 16_000 for one in batch])
                heapq.heappush(events, (clock.now + took, number, "done", clock.now))
    return outcomes, useful / horizon


@pytest.mark.parametrize(
    ("mix", "deadline", "horizon"),
    [
        ("short", 5.0, 60.0),
        ("short", 30.0, 60.0),
        ("mixed", 30.0, 600.0),
        ("long", 30.0, 600.0),
        ("long", 120.0, 600.0),
    ],
)
def test_goodput_stays_at_the_capacity_under_any_overload(mix: str, deadline: float, horizon: float) -> None:
    for load in (1.5, 3, 10):
        outcomes, goodput = simulate(load, deadline, mix, horizon)
        assert goodput > 0.95, (load, outcomes, goodput)
        late = outcomes["wasted"] + outcomes["dropped"]
        assert late <= 0.02 * outcomes["answered"], (load, outcomes)


def fixed_schedule(clock: Clock, **limits: float) -> Schedule:
    """A schedule whose model needs 0.1 s for each second of audio, at every length and depth."""
    return Schedule(BatchLimits(**limits), 8.0, LAYERS, clock)


def add(schedule: Schedule, seconds: float, deadline: float = 1e9, layer: int | None = None) -> Job:
    one = job(seconds, layer)
    reservation = schedule.admit([len(one.waveform)], layer, deadline)
    schedule.add(one, reservation)
    schedule.release(reservation)
    return one


def test_a_request_that_would_wait_too_long_is_refused_with_the_time_of_the_wait() -> None:
    schedule = fixed_schedule(Clock())
    for _ in range(4):
        add(schedule, 50, 1000)
    assert schedule.expected_wait() == pytest.approx(20)
    with pytest.raises(ServiceError) as refused:
        schedule.admit([16_000], None, 24.0)  # At most 0.8 of 24 s may pass before it runs.
    assert (refused.value.error_type, refused.value.headers) == ("overloaded", {"retry-after": "20"})
    with pytest.raises(ServiceError):
        schedule.check_room(24.0)
    schedule.check_room(26.0)
    assert schedule.admit([16_000], None, 26.0)
    with pytest.raises(ServiceError) as hopeless:
        schedule.admit([60 * 16_000], None, 5.0)
    assert hopeless.value.error_type == "deadline"


def test_a_tenth_of_the_time_is_left_for_errors_unless_the_model_is_idle() -> None:
    busy = fixed_schedule(Clock())
    add(busy, 20)  # 2 s of work.
    with pytest.raises(ServiceError) as refused:
        busy.admit([70 * 16_000], None, 9.9)  # 2 s and 7 s are more than 90 % of it.
    assert refused.value.error_type == "overloaded"
    assert busy.admit([70 * 16_000], None, 10.1)
    assert fixed_schedule(Clock()).admit([95 * 16_000], None, 10.0), "an idle model takes what may be in time"


def test_the_time_of_decoding_counts_as_waiting() -> None:
    schedule = fixed_schedule(Clock())
    assert schedule.admit([16_000], None, 10.0, delay=7.9)
    with pytest.raises(ServiceError) as refused:
        schedule.admit([16_000], None, 10.0, delay=8.1)
    assert refused.value.headers == {"retry-after": "9"}


def test_an_old_measurement_alone_refuses_and_drops_nothing() -> None:
    clock = Clock()
    schedule = fixed_schedule(clock)
    schedule.finish([job(10)], 10.0)
    assert schedule.expected_wait() == 0
    with pytest.raises(ServiceError):
        schedule.admit([160_000], None, 5.0)
    clock.now = 3000.0
    waiting = add(schedule, 10, clock.now + 5.0)
    assert schedule.take_late() == [] and schedule.waiting == [waiting]
    clock.now += 2.6  # A quarter of the ten seconds that were measured is more than what is left.
    assert schedule.take_late() == [waiting]


def test_a_batch_that_takes_longer_than_expected_may_take_as_much_longer_again() -> None:
    clock = Clock()
    schedule = fixed_schedule(clock)
    add(schedule, 10)
    batch = schedule.take_batch()
    for now, wait in ((0.25, 0.75), (1.0, 0.0), (3.0, 2.0)):
        clock.now = now
        assert schedule.expected_wait() == pytest.approx(wait)
    schedule.finish(batch, None)
    assert schedule.expected_wait() == 0


def test_the_oldest_utterance_waits_for_others_only_so_long() -> None:
    clock = Clock()
    schedule = fixed_schedule(clock, wait_seconds=0.5)
    add(schedule, 2)
    clock.now = 0.25
    add(schedule, 2)
    assert schedule.fill_seconds() == pytest.approx(0.25)
    clock.now = 1.0
    assert schedule.fill_seconds() == 0
    clock.now = 0.25
    add(schedule, 4)
    assert schedule.fill_seconds() == 0, "8 s are a full batch"


def test_each_that_joins_a_batch_takes_time_from_those_that_wait_longer() -> None:
    schedule = fixed_schedule(Clock())
    # The second has 0.3 s to spare, so one more of 0.2 s may run before it, but not two.
    oldest, tight, young, youngest = add(schedule, 2), add(schedule, 20, 2.5 / 0.9), add(schedule, 2), add(schedule, 2)
    assert schedule.take_batch() == [oldest, young]
    assert schedule.take_batch() == [tight] and schedule.take_batch() == [youngest]


def test_the_queue_has_room_for_so_much_audio_but_an_empty_one_takes_any() -> None:
    schedule = fixed_schedule(Clock(), queue_seconds=10.0)
    for seconds in (10, 30):
        alone = schedule.admit([seconds * 16_000], None)
        with pytest.raises(ServiceError):
            schedule.check_room()
        schedule.release(alone)
    add(schedule, 6)
    assert schedule.admit([4 * 16_000, 60 * 16_000], None), "room is needed for the first alone"
    for refused in (lambda: schedule.check_room(), lambda: schedule.admit([16_000], None)):
        with pytest.raises(ServiceError) as error:
            refused()
        assert error.value.error_type == "overloaded"


def test_clients_are_told_to_come_back_within_a_minute() -> None:
    for wait, told in ((0.0, "1"), (1.2, "2"), (59.5, "60"), (1000.0, "60")):
        assert overloaded("full", wait).headers == {"retry-after": told}


def test_reserved_work_counts_until_it_is_released() -> None:
    schedule = fixed_schedule(Clock())
    reservation = schedule.admit([160_000, 160_000], None)
    assert schedule.expected_wait() == pytest.approx(2)
    schedule.add(job(10), reservation)
    assert schedule.expected_wait() == pytest.approx(2) and reservation.seconds == pytest.approx(1)
    schedule.release(reservation)
    assert schedule.expected_wait() == pytest.approx(1)


def test_the_order_is_that_of_admission_and_late_work_never_runs() -> None:
    clock = Clock()
    schedule = fixed_schedule(clock)
    early = schedule.admit([10 * 16_000], None, 5.0)
    clock.now = 1.0
    second = add(schedule, 30)
    first = job(10)
    schedule.add(first, early)  # It was decoded later.
    assert schedule.waiting == [first, second]
    clock.now = 4.5
    assert schedule.take_late() == [first] and schedule.waiting == [second]


def test_a_batch_makes_nobody_late_and_mixes_no_shallow_work_with_deep() -> None:
    clock = Clock()
    schedule = fixed_schedule(clock)
    oldest, tight, young = add(schedule, 2), add(schedule, 20, 2.5), add(schedule, 2)
    assert schedule.take_batch() == [oldest]  # With the third, the second could miss 90 % of its time.
    assert schedule.take_batch() == [tight] and schedule.take_batch() == [young]
    deep, shallow, near = add(schedule, 2), add(schedule, 2, layer=3), add(schedule, 2, layer=11)
    assert schedule.take_batch() == [deep, near]
    assert schedule.take_batch() == [shallow]


def test_costs_are_learned_by_size_and_kind_and_a_hiccup_counts_little() -> None:
    clock = Clock()
    cost = CostEstimate(0.1, clock)
    assert cost.seconds(10, 12) == pytest.approx(1)
    cost.record(2, 0.4, 12)
    cost.record(60, 30, 12)
    assert cost.seconds(2, 12) == pytest.approx(0.4) and cost.seconds(50, 12) == pytest.approx(25)
    assert cost.seconds(2, 3) == pytest.approx(0.4)  # Not measured: as the deeper one.
    cost.record(2, 0.1, 3)
    assert cost.seconds(2, 3) == pytest.approx(0.1) and cost.seconds(2, 1) == pytest.approx(0.1)
    clock.now = 300
    assert cost.seconds(2, 12, hopeful=True) == pytest.approx(0.2)
    clock.now = 1e6
    assert cost.seconds(2, 12, hopeful=True) == pytest.approx(0.1)
    cost.record(2, 1000, 12)
    assert cost.seconds(2, 12) == pytest.approx(0.4 * 4**0.3)


def test_a_slower_machine_raises_the_costs_of_all_sizes() -> None:
    cost = CostEstimate(0.1, Clock())
    cost.record(2, 0.2)
    cost.record(60, 12)
    for _ in range(12):
        cost.record(2, 1.0)
    assert cost.seconds(2) == pytest.approx(1.0, rel=0.05)
    assert cost.seconds(60) > 2 * 12
    for _ in range(12):
        cost.record(60, 60)
    assert cost.seconds(60) == pytest.approx(60, rel=0.05)
