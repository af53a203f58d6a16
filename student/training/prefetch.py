"""The batches of each rank and optimiser step, and the thread that prefetches them."""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from ray_distill.student.training.rank import Rank
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.train_state import TrainState
from ray_distill.teacher_cache.frames import num_frames
from ray_distill.teacher_cache.reading.read_ahead import ReadAhead, SeveralReadAhead
from ray_distill.teacher_cache.targets.batch_sampler import plan_epoch
from ray_distill.teacher_cache.targets.crop import crop_batch
from ray_distill.teacher_cache.targets.target_batch import Batch, TargetReader
from ray_distill.teacher_cache.targets.window_sampler import plan_window_epoch

PREFETCH = 4
"""Number of batches that the background thread reads ahead."""
FILES_AHEAD = 50
"""Number of batches before which the files of a batch are fetched, if the reader has local copies."""


class TrainingPlan:
    """The batch that each rank reads at each step: a pure function of lengths, settings and world size.

    Batches are assigned to accumulation steps and ranks in one order, so the utterances of an optimiser step depend only on
    the product ``workers * accumulate``, not on its factors.

    Args:
        num_samples: (N,) integer, lengths of the utterances; training crops them to ``settings.crop_samples``.
        settings: Settings of the training.
        world_size: Number of ranks.
        shards: (N,) integers, the shard of each utterance, for the order of `plan_window_epoch`. Default None: that of `plan_epoch`.

    Attributes:
        crop: (longest crop in samples, seed), or None if whole utterances are used.
        epochs: Number of epochs that are at least begun.
        total_steps: Number of optimiser steps.
        passes: Number of epochs, where an incomplete last one counts by the share of its steps.
    """

    def __init__(
        self, num_samples: np.ndarray, settings: TrainSettings, world_size: int, shards: np.ndarray | None = None
    ) -> None:
        longest = settings.crop_samples
        self.crop = None if longest is None else (longest, settings.seed)
        self._num_samples = num_samples if longest is None else np.minimum(num_samples, longest)
        self._settings = settings
        self._world_size = world_size
        self._order = plan_epoch if shards is None else partial(plan_window_epoch, shards=shards)
        self._epoch = -1
        self._steps: list[list[list[list[int]]]] = []
        # With batch_seconds the number of batches depends on the epoch's shuffle, so each epoch is planned once here.
        starts = [0]
        limit = settings.max_steps
        while len(starts) <= settings.epochs and (limit is None or starts[-1] < limit):
            fixed = settings.batch_size is not None and len(starts) > 1
            starts.append(starts[-1] + (starts[1] if fixed else len(self._plan(len(starts) - 1))))
        self._starts = starts
        self.epochs = len(starts) - 1
        self.total_steps = starts[-1] if limit is None else min(starts[-1], limit)
        self.passes = self.epochs - (starts[-1] - self.total_steps) / (starts[-1] - starts[-2])

    @classmethod
    def of(cls, reader: TargetReader, settings: TrainSettings, world_size: int, state: TrainState) -> "TrainingPlan":
        """Return the plan of a training from a reader, in the order of `chosen_shuffle`, which is recorded in the state."""
        state.shuffle = chosen_shuffle(settings, reader, state.shuffle)
        shards = getattr(reader, "shards", None) if state.shuffle == "window" else None
        return cls(reader.num_samples, settings, world_size, shards)

    def _plan(self, epoch: int) -> list[list[list[list[int]]]]:
        return self._order(
            self._num_samples,
            batch_size=self._settings.batch_size,
            batch_seconds=self._settings.seconds_of_batch,
            world_size=self._world_size,
            accumulate=self._settings.accumulate,
            seed=self._settings.seed,
            epoch=epoch,
        )

    def step(self, step: int) -> tuple[int, list[list[list[int]]]]:
        """Return the epoch of a 0-based optimiser step, and its utterances' indices by accumulated batch and rank."""
        epoch = int(np.searchsorted(self._starts, step, side="right")) - 1
        if epoch != self._epoch:
            self._epoch, self._steps = epoch, self._plan(epoch)
        return epoch, self._steps[step - self._starts[epoch]]

    def validates_after(self, done: int) -> bool:
        """Return whether a validation follows ``done`` optimiser steps, apart from the one before the first step."""
        every = self._settings.validate_every
        return done == self.total_steps or (done in self._starts if every == "epoch" else done % every == 0)

    def draw(self, epoch: int, draws: int | None) -> int | None:
        """Return the mask draw of an epoch, or None for the clean pass.

        Args:
            epoch: 0-based epoch.
            draws: Number of mask draws, as `TargetReader.draws`: 0 without masks, None if unlimited.
        """
        if draws == 0:
            return None
        if draws is None:
            return epoch  # Online targets never repeat a draw.
        if self._settings.draw_order == "in_order":
            return epoch * draws // self.epochs
        return epoch % draws


def chosen_shuffle(settings: TrainSettings, reader: TargetReader, earlier: str | None = None) -> str:
    """Return the order of a training, ``full`` or ``window``; see `TrainSettings.shuffle`.

    Args:
        settings: Settings of the training.
        reader: Reader of the training split.
        earlier: Order of the training up to now. Default None: it begins.

    Raises:
        ValueError: If the reader can't be read in the order of the settings.
    """
    default = "window" if getattr(reader, "prefers_window", False) else "full"
    chosen = settings.shuffle or earlier or default
    if chosen == "window" and getattr(reader, "shards", None) is None:
        raise ValueError("train.shuffle window needs a cache, because online targets have no shards; remove it")
    if chosen == "full" and getattr(reader, "needs_window", False):
        raise ValueError(
            "cache.local_gb has room for a part of the cache only, which train.shuffle full would fetch again and again; raise it, or "
            "set train.shuffle=window"
        )
    return chosen


@dataclass(frozen=True)
class MicroBatch:
    """A rank's batch of one accumulation step.

    Attributes:
        step, epoch: Optimiser step and epoch, 0-based.
        last_of_step: Whether the optimiser steps after this batch.
        step_frames: Number of frames that the loss is divided by: the real frames of the whole step (all ranks, all
            accumulated batches), or all frames with ``count_padding``.
        num_samples: (B,) integer, lengths of the utterances, on the host.
        batch: The batch, as read.
    """

    step: int
    epoch: int
    last_of_step: bool
    step_frames: int
    num_samples: np.ndarray
    batch: Batch


Planned = tuple[Callable[[Batch], MicroBatch], list[int], int | None, int]
"""The constructor of a batch's `MicroBatch`, its utterances, its mask draw and its epoch."""


def micro_batches(
    plan: TrainingPlan,
    reader: TargetReader,
    rank: Rank,
    first_step: int,
    accumulate: int,
    *,
    count_padding: bool = False,
) -> Generator[MicroBatch]:
    """Yield a rank's batches from optimiser step ``first_step`` on; earlier batches are skipped without being read.

    A background thread plans epochs and reads at most PREFETCH batches ahead, so that training waits neither for the disk nor
    at the end of an epoch while the thread keeps up. For a GPU it copies batches into page-locked memory. Its exceptions are
    raised here. A reader with ``batches_at_once`` (for storage behind a network) reads several batches in parallel, and one with a
    `ReadAhead` is told FILES_AHEAD batches before.

    Args:
        plan: Batches of the training.
        reader: Reader of the training split.
        rank: This process.
        first_step: First optimiser step, 0-based.
        accumulate: Number of batches per optimiser step.
        count_padding: Whether ``step_frames`` counts padded frames. Default False.
    """
    lengths, frames = reader.num_samples, reader.num_frames
    if plan.crop is not None:
        longest = plan.crop[0]
        lengths, frames = np.minimum(lengths, longest), np.minimum(frames, num_frames(longest))
    ahead: queue.Queue[MicroBatch | BaseException | None] = queue.Queue(PREFETCH)
    stopped = threading.Event()

    def put(item: MicroBatch | BaseException | None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ahead.put(item, timeout=0.1)
                return

    ahead_of_reads: ReadAhead | SeveralReadAhead | None = getattr(reader, "read_ahead", None)

    def announced() -> Iterator[Planned]:
        """Yield the batches, each after the files of the FILES_AHEAD next ones were named."""
        waiting: deque[Planned] = deque()
        for item in planned():
            if ahead_of_reads is not None:
                ahead_of_reads.expect(item[1], None if reader.draws is None else item[2])
            waiting.append(item)
            if len(waiting) > (FILES_AHEAD if ahead_of_reads is not None else 0):
                yield waiting.popleft()
        yield from waiting

    def planned() -> Iterator[Planned]:
        for step in range(first_step, plan.total_steps):
            epoch, micros = plan.step(step)
            counted = [frames[indices] for micro in micros for indices in micro]
            step_frames = sum(int(n.max()) * len(n) if count_padding else int(n.sum()) for n in counted)
            draw = plan.draw(epoch, reader.draws)
            for number, micro in enumerate(micros):
                indices = micro[rank.index]
                last = number == accumulate - 1
                yield partial(MicroBatch, step, epoch, last, step_frames, lengths[indices]), indices, draw, epoch

    def read_batch(indices: list[int], draw: int | None, epoch: int) -> Batch:
        batch = reader.read(indices, draw)
        return batch if plan.crop is None else crop_batch(batch, *plan.crop, epoch)

    def read() -> None:
        try:
            at_once = getattr(reader, "batches_at_once", 1)
            with ThreadPoolExecutor(at_once, "prefetch-read") as pool:
                pending: deque[tuple[Callable[[Batch], MicroBatch], Future[Batch]]] = deque()
                for make, indices, draw, epoch in announced():
                    pending.append((make, pool.submit(read_batch, indices, draw, epoch)))
                    if len(pending) == at_once:
                        put(finished(*pending.popleft()))
                    if stopped.is_set():
                        pool.shutdown(cancel_futures=True)
                        return
                while pending:
                    put(finished(*pending.popleft()))
            put(None)
        except BaseException as error:  # Raised again in the training's thread.
            put(error)

    def finished(make: Callable[[Batch], MicroBatch], reading: "Future[Batch]") -> MicroBatch:
        batch = reading.result()
        return make(batch.pinned() if rank.device.type == "cuda" else batch)

    thread = threading.Thread(target=read, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ahead.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
        if ahead_of_reads is not None:
            ahead_of_reads.clear()
