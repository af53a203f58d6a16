"""Prefetch: batches arrive in order, in bounded number, without a stall between epochs, and errors are raised."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_distill.student import StudentConfig
from ray_distill.student.training.prefetch import FILES_AHEAD, PREFETCH, TrainingPlan, chosen_shuffle, micro_batches
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.train_state import TrainState
from ray_distill.teacher_cache.frames import num_frames
from ray_distill.teacher_cache.patch_geometry import PatchGeometry
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.reading.read_ahead import ReadAhead
from ray_distill.teacher_cache.targets.fresh_masks import FreshMasks
from ray_distill.teacher_cache.targets.target_batch import Batch

Settings = Callable[..., TrainSettings]


class Reader:
    """A reader of ten utterances of one to two seconds that calls ``at_read`` at its n-th read."""

    layers, dim = (1,), 2
    draws: int | None = 3

    def __init__(self, at_read: Callable[[int], None] = lambda number: None) -> None:
        self.num_samples = np.arange(16_000, 26_000, 1000)
        self.num_frames = np.array([num_frames(n) for n in self.num_samples.tolist()])
        self.reads: list[tuple[list[int], int | None]] = []
        self._at_read = at_read

    def read(self, indices: Sequence[int], draw: int | None) -> Batch:
        self.reads.append((list(indices), draw))
        self._at_read(len(self.reads))
        empty = torch.zeros(len(indices), 1)
        return Batch([str(i) for i in indices], empty, empty[:, 0].long(), empty[:, 0].long(), empty, None)


def feed(reader: Reader, options: TrainSettings, *, first: int = 0, rank: Rank = Rank()) -> Any:
    plan = TrainingPlan(reader.num_samples, options, rank.world_size)
    return micro_batches(plan, reader, rank, first, options.accumulate)


def feeds() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_every_epoch_has_all_utterances_and_a_draw_of_its_own(settings: Settings) -> None:
    options = settings(batch_size=2, max_steps=20)
    seen = [(micro.epoch, micro.batch.ids) for micro in feed(Reader(), options)]
    for epoch in range(4):
        ids = [i for number, batch in seen if number == epoch for i in batch]
        assert sorted(ids, key=int) == [str(n) for n in range(10)]
    assert len({str([b for n, b in seen if n == epoch]) for epoch in range(4)}) == 4, (
        "every epoch has an order of its own"
    )
    reader = Reader()
    list(feed(reader, options))
    assert [draw for _, draw in reader.reads] == [epoch % 3 for epoch in range(4) for _ in range(5)]


@pytest.mark.parametrize("budget", [{"batch_size": 2}, {"batch_size": None, "batch_seconds": 4.0}])
def test_going_on_reads_only_what_is_left(settings: Settings, budget: dict[str, Any]) -> None:
    options = settings(**budget, accumulate=2, max_steps=9)
    whole, rest = Reader(), Reader()
    list(feed(whole, options))
    micros = list(feed(rest, options, first=4))
    assert rest.reads == whole.reads[8:]
    assert [micro.step for micro in micros] == [4, 4, 5, 5, 6, 6, 7, 7, 8, 8]
    assert [micro.last_of_step for micro in micros] == [False, True] * 5


def test_ranks_read_different_utterances_of_the_same_step(settings: Settings) -> None:
    options = settings(batch_size=2, max_steps=4, workers=2)
    ours, theirs = (list(feed(Reader(), options, rank=Rank(index, 2))) for index in (0, 1))
    for one, other in zip(ours, theirs, strict=True):
        assert not set(one.batch.ids) & set(other.batch.ids)
        assert one.step_frames == other.step_frames


def test_batches_that_are_read_side_by_side_keep_their_order(settings: Settings) -> None:
    reader = Reader()
    reader.batches_at_once = 3  # type: ignore[attr-defined]
    options = settings(batch_size=2, max_steps=20)
    alone = [(micro.step, micro.batch.ids) for micro in feed(Reader(), options)]
    assert [(micro.step, micro.batch.ids) for micro in feed(reader, options)] == alone and len(alone) == 20


def test_no_more_is_read_ahead_than_said(settings: Settings) -> None:
    reader = Reader()
    running = feed(reader, settings(batch_size=2, max_steps=100))
    next(running)
    deadline = time.monotonic() + 10
    while len(reader.reads) < PREFETCH + 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert len(reader.reads) == PREFETCH + 2  # One was taken, PREFETCH are queued, and one is being queued.
    running.close()
    assert feeds() == []


def test_batches_that_are_on_the_gpu_already_are_not_pinned(settings: Settings) -> None:
    """PyTorch refuses to pin them. The meta device stands for the GPU of a teacher that computes the targets."""

    class Online(Reader):
        def read(self, indices: Sequence[int], draw: int | None) -> Batch:
            return super().read(indices, draw).moved("meta")

    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned"):
        torch.zeros(1, device="meta").pin_memory()
    gpu = Rank(device=torch.device("cuda", 0))
    micros = list(feed(Online(), settings(batch_size=2, max_steps=3), rank=gpu))
    assert [micro.batch.waveforms.device.type for micro in micros] == ["meta"] * 3


def test_epochs_are_planned_ahead_in_the_background(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    planners: list[tuple[int, str]] = []
    original = TrainingPlan._plan

    def watched(plan: TrainingPlan, epoch: int) -> Any:
        planners.append((epoch, threading.current_thread().name))
        return original(plan, epoch)

    options = settings(batch_size=2, max_steps=20)
    reader = Reader()
    plan = TrainingPlan(reader.num_samples, options, 1)
    monkeypatch.setattr(TrainingPlan, "_plan", watched)
    list(micro_batches(plan, reader, Rank(), 0, 1))
    assert planners == [(epoch, "prefetch") for epoch in range(4)]


def test_what_the_reader_raises_is_raised_by_the_training(settings: Settings) -> None:
    def damaged(number: int) -> None:
        if number == 4:
            raise ValueError("part-00003.parquet is damaged")

    seen = []
    with pytest.raises(ValueError, match=r"part-00003.parquet is damaged"):
        for micro in feed(Reader(damaged), settings(batch_size=2, max_steps=20)):
            seen.append(micro.step)
    assert seen == [0, 1, 2]
    assert feeds() == []


def test_a_training_that_fails_leaves_no_thread(settings: Settings) -> None:
    running = feed(Reader(), settings(batch_size=2, max_steps=1000))
    for micro in running:
        if micro.step == 3:
            break
    running.close()
    assert feeds() == []


def test_crops(readers: tuple[CacheReader, CacheReader], settings: Settings) -> None:
    reader = readers[0]
    whole = settings(batch_size=9, max_steps=2)
    crops = settings(batch_size=9, max_steps=2, crop_seconds=1.0)
    assert max(reader.num_samples) > 16_000
    seen = [list(feed(reader, options)) for options in (whole, crops, crops)]  # type: ignore[arg-type]
    for uncut, first, again in zip(*seen, strict=True):
        assert sorted(first.batch.ids) == sorted(uncut.batch.ids)
        assert first.num_samples.max() == 16_000 and first.num_samples.tolist() == first.batch.lengths.tolist()
        assert first.step_frames == int(first.batch.num_frames.sum()) < uncut.step_frames
        assert first.batch.targets.shape[2] == 49 and first.batch.frame_mask.shape == (9, 49)
        assert torch.equal(first.batch.waveforms, again.batch.waveforms)
    assert not torch.equal(seen[1][0].batch.waveforms.sum(1).sort()[0], seen[1][1].batch.waveforms.sum(1).sort()[0])
    with pytest.raises(ValueError, match=r"the student has patches; remove train\.crop_seconds"):
        crops.check_student(StudentConfig(patches=PatchGeometry()))


def test_the_order_follows_the_reader_unless_it_is_set_or_was_chosen_before(settings: Settings) -> None:
    disk, bucket = Reader(), Reader()
    for reader in (disk, bucket):
        reader.shards = np.arange(10) // 3  # type: ignore[attr-defined]
    bucket.prefers_window = True  # type: ignore[attr-defined]
    auto, full, window = (settings(shuffle=name) for name in (None, "full", "window"))
    assert [chosen_shuffle(auto, reader) for reader in (Reader(), disk, bucket)] == ["full", "full", "window"]
    assert [chosen_shuffle(auto, bucket, "full"), chosen_shuffle(auto, disk, "window")] == ["full", "window"]
    assert [chosen_shuffle(full, bucket, "window"), chosen_shuffle(window, disk)] == ["full", "window"]
    with pytest.raises(ValueError, match=r"train.shuffle window needs a cache"):
        chosen_shuffle(window, Reader())
    bucket.needs_window = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"cache.local_gb has room for a part of the cache only"):
        chosen_shuffle(full, bucket)
    states = [TrainState(shuffle=name) for name in ("full", "window", None)]
    plans = [TrainingPlan.of(disk, settings(batch_size=2, max_steps=5), 1, state) for state in states]
    assert [state.shuffle for state in states] == ["full", "window", "full"]
    assert [plans[0].step(n) for n in range(5)] != [plans[1].step(n) for n in range(5)]


def test_files_are_named_before_their_batches_are_read(settings: Settings) -> None:
    events: list[str] = []

    class Ahead:
        def expect(self, indices: Sequence[int], draw: int | None) -> None:
            events.append("expect")

        def clear(self) -> None:
            events.append("clear")

    reader = Reader(lambda number: events.append("read"))
    reader.read_ahead = Ahead()  # type: ignore[attr-defined]
    steps = FILES_AHEAD + 10
    assert len(list(feed(reader, settings(batch_size=2, max_steps=steps)))) == steps
    assert events.index("read") >= FILES_AHEAD and events[-1] == "clear"
    assert events.count("expect") == events.count("read") == steps


def test_batches_that_were_read_are_forgotten_and_their_files_let_go(
    readers: tuple[CacheReader, CacheReader], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = settings(batch_size=2, max_steps=12)
    place = readers[0].cache.store.location
    for fresh in (False, True):
        reader = CacheReader(place, "train", local=tmp_path / "copies")
        used = FreshMasks(reader, reader.cache.spec.masks) if fresh else reader
        ahead, copies = reader.read_ahead, reader._rows.copies
        assert ahead is not None and copies is not None
        monkeypatch.setattr(ahead, "clear", lambda: None)  # What is left at the end was never let go.
        list(micro_batches(TrainingPlan(reader.num_samples, options, 1), used, Rank(), 0, 1))
        assert not ahead._expected and not copies._wanted
        monitored = ReadAhead(ahead._files)
        for indices in ([0, 1], [2, 0], [0, 1]):
            monitored.expect(indices, 0)
        for indices in ([0, 1], [2, 0], [0, 1], [5]):
            monitored.met(indices, 0)
        assert not monitored._expected and not copies._wanted, "a training has millions of batches"
