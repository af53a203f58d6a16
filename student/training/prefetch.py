"""What a rank reads at each step of a training, and the thread that reads it ahead."""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from ray_distill.student.training.rank import Rank
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.teacher_cache.targets.batch_sampler import plan_epoch
from ray_distill.teacher_cache.targets.target_batch import Batch, TargetReader

PREFETCH = 4
"""Batches read ahead by a background thread."""


class TrainingPlan:
    """Which batch every rank reads at every step: a pure function of lengths, settings and world size.

    Batches are dealt to micro steps and ranks in one order, so the utterances of an optimiser step depend on
    ``workers * accumulate`` only, not on how that product is made up.

    Attributes:
        epochs: passes that are begun.
        total_steps: optimiser steps.
        passes: passes, the last one by the share of its steps that are taken.
    """

    def __init__(self, num_samples: np.ndarray, settings: TrainSettings, world_size: int) -> None:
        self._num_samples = num_samples
        self._settings = settings
        self._world_size = world_size
        self._epoch = -1
        self._steps: list[list[list[list[int]]]] = []
        # Under a budget of seconds the number of batches depends on the epoch's shuffle, so each is planned once here.
        starts = [0]
        limit = settings.max_steps
        while len(starts) <= settings.epochs and (limit is None or starts[-1] < limit):
            fixed = settings.batch_size is not None and len(starts) > 1
            starts.append(starts[-1] + (starts[1] if fixed else len(self._plan(len(starts) - 1))))
        self._starts = starts
        self.epochs = len(starts) - 1
        self.total_steps = starts[-1] if limit is None else min(starts[-1], limit)
        self.passes = self.epochs - (starts[-1] - self.total_steps) / (starts[-1] - starts[-2])

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

    def draw(self, epoch: int, draws: int | None) -> int | None:
        """The mask draw of an epoch, of ``draws`` that there are (see TargetReader); None is the clean pass."""
        if draws == 0:
            return None
        if draws is None:
            return epoch  # The teacher in the loop never repeats one.
        if self._settings.draw_order == "in_order":
            return epoch * draws // self.epochs
        return epoch % draws


@dataclass(frozen=True)
class Micro:
    """One rank's share of one of the batches of an optimiser step.

    Attributes:
        step, epoch: 0-based.
        last_of_step: whether the optimiser steps after it.
        step_frames: frames that the loss is divided by: the real ones of the whole step (all ranks, all accumulated batches),
            or with the padded ones.
        num_samples: (B,) lengths of its utterances, on the host.
        batch: as read.
    """

    step: int
    epoch: int
    last_of_step: bool
    step_frames: int
    num_samples: np.ndarray
    batch: Batch


def micro_batches(
    plan: TrainingPlan,
    reader: TargetReader,
    rank: Rank,
    first_step: int,
    accumulate: int,
    *,
    count_padding: bool = False,
) -> Iterator[Micro]:
    """A rank's batches from optimiser step ``first_step`` on. What comes before is skipped without being read.

    One background thread plans epochs and reads, at most PREFETCH batches ahead, so neither the end of an epoch nor the disk is
    waited for while it keeps up; for a GPU it puts batches into page-locked memory. What it raises is raised here. Of a reader
    that says so (``batches_at_once``: one that waits for a network), several batches are read at a time.
    """
    frames = reader.num_frames
    ahead: queue.Queue[Micro | BaseException | None] = queue.Queue(PREFETCH)
    stopped = threading.Event()

    def put(item: Micro | BaseException | None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ahead.put(item, timeout=0.1)
                return

    def planned() -> Iterator[tuple[Callable[[Batch], Micro], list[int], int | None]]:
        """Each batch's place in the training, its utterances and its mask draw."""
        for step in range(first_step, plan.total_steps):
            epoch, micros = plan.step(step)
            counted = [frames[indices] for micro in micros for indices in micro]
            step_frames = sum(int(n.max()) * len(n) if count_padding else int(n.sum()) for n in counted)
            draw = plan.draw(epoch, reader.draws)
            for number, micro in enumerate(micros):
                indices = micro[rank.index]
                last = number == accumulate - 1
                yield partial(Micro, step, epoch, last, step_frames, reader.num_samples[indices]), indices, draw

    def read() -> None:
        try:
            at_once = getattr(reader, "batches_at_once", 1)
            with ThreadPoolExecutor(at_once, "feed-read") as pool:
                under_way: deque[tuple[Callable[[Batch], Micro], Future[Batch]]] = deque()
                for place, indices, draw in planned():
                    under_way.append((place, pool.submit(reader.read, indices, draw)))
                    if len(under_way) == at_once:
                        put(finished(*under_way.popleft()))
                    if stopped.is_set():
                        pool.shutdown(cancel_futures=True)
                        return
                while under_way:
                    put(finished(*under_way.popleft()))
            put(None)
        except BaseException as error:  # Whatever it is, the training must hear of it.
            put(error)

    def finished(place: Callable[[Batch], Micro], reading: "Future[Batch]") -> Micro:
        batch = reading.result()
        return place(batch.pinned() if rank.device.type == "cuda" else batch)

    thread = threading.Thread(target=read, name="feed", daemon=True)
    thread.start()
    try:
        while (item := ahead.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
