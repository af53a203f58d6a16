"""Trainings that find their own batches leave no trace of it. A function stands for the memory of a GPU."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.pruning.phases import train_in_phases
from ray_distill.student.training.prefetch import PREFETCH
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.steps import trained_parts
from ray_distill.student.training.steps.step_memory import StepMemory, agree
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.train_state import saved_batch_seconds
from ray_distill.student.training.training_loop import train
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.targets.fitting_batch import FittingBatch
from ray_distill.teacher_cache.targets.target_batch import Batch

Readers = tuple[CacheReader, CacheReader]
Rows = Callable[..., list[dict[str, Any]]]
Settings = Callable[..., TrainSettings]
SECOND, WEIGHTS = 1_000_000, 2_000_000
"""Bytes of a second of padded audio, and of the rest."""


def measured_peak(memory: StepMemory, indices: Sequence[int]) -> int:
    """Take the steps of `StepMemory._peak`, which only a GPU can measure, and return what they would need."""
    memory._step(memory._warm_parts(), memory._read(indices))
    lengths = memory._lengths[indices]
    needed = WEIGHTS + SECOND * int(lengths.max()) * len(lengths) // 16_000
    if needed > 7_000_000:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return needed


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Gives a CPU the memory for batches of about 5 s, and returns the numbers of utterances in the batches that were measured."""
    sizes: list[int] = []

    def peak(memory: StepMemory, indices: Sequence[int]) -> int:
        sizes.append(len(indices))
        return measured_peak(memory, indices)

    monkeypatch.setattr(StepMemory, "_peak", peak)
    monkeypatch.setattr(StepMemory, "_free_bytes", lambda memory: 9_000_000)
    return sizes


@pytest.fixture
def auto(settings: Settings) -> Settings:
    """Makes settings with ``batch_seconds`` auto on a GPU."""
    return lambda **changes: settings(**{"batch_size": None, "batch_seconds": "auto", "use_gpu": True} | changes)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"ema_decay": 0.9, "spec_augment": {}, "accumulate": 2, "hint_layers": 1, "crop_seconds": 1.5},
    {"optimizer": "published", "max_grad_norm": 0.1, "shuffle": "window"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_run_that_chose_equals_one_that_was_told(
    options: dict[str, Any],
    tmp_path: Path,
    tiny: StudentConfig,
    auto: Settings,
    readers: Readers,
    rows: Rows,
    memory: list[int],
    assert_same_end: Callable[[Path, Path], None],
) -> None:
    random.seed(1)
    np.random.seed(1)
    train(tiny, auto(**options), *readers, tmp_path / "auto")
    drawn = random.random(), np.random.random()
    assert len(memory) >= 4 and max(memory) > 1
    (row,) = rows(tmp_path / "auto", "batch")
    found = row["batch_seconds"]
    assert row["step"] == 0 and row["peak_bytes"] <= row["limit_bytes"] == 9_000_000
    # Whole utterances seldom fill a batch. With accumulation, half of the corpus is all that it may have.
    assert (4 if "accumulate" in options else 4.25) <= found < 6
    assert saved_batch_seconds(tmp_path / "auto") == found

    random.seed(1)
    np.random.seed(1)
    count = len(memory)
    train(tiny, auto(**options, batch_seconds=found), *readers, tmp_path / "told")
    assert (random.random(), np.random.random()) == drawn
    assert len(memory) == count and rows(tmp_path / "told", "batch") == []
    assert_same_end(tmp_path / "auto", tmp_path / "told")


class Stopped(Exception):
    """The process was killed."""


def test_a_resumed_run_keeps_what_was_found(
    tmp_path: Path,
    tiny: StudentConfig,
    auto: Settings,
    readers: Readers,
    rows: Rows,
    memory: list[int],
    monkeypatch: pytest.MonkeyPatch,
    assert_same_end: Callable[[Path, Path], None],
) -> None:
    train(tiny, auto(), *readers, tmp_path / "one")

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 8:
            raise Stopped

    with pytest.raises(Stopped):
        train(tiny, auto(), *readers, tmp_path / "two", on_row=stop)
    monkeypatch.setattr(StepMemory, "_free_bytes", lambda memory: pytest.fail("it measures again"))
    train(tiny, auto(), *readers, tmp_path / "two")
    assert_same_end(tmp_path / "one", tmp_path / "two")
    assert len(rows(tmp_path / "two", "batch")) == 1
    # Also a longer one, as one that was told from the start.
    found = saved_batch_seconds(tmp_path / "two")
    for name, seconds in (("two", "auto"), ("one", found)):
        train(tiny, auto(max_steps=16, batch_seconds=seconds), *readers, tmp_path / name)
    assert_same_end(tmp_path / "one", tmp_path / "two")


def test_a_run_that_has_begun_otherwise_is_refused(
    tmp_path: Path, tiny: StudentConfig, auto: Settings, readers: Readers, memory: list[int]
) -> None:
    train(tiny, auto(batch_size=3, batch_seconds=None, max_steps=2), *readers, tmp_path / "run")
    assert saved_batch_seconds(tmp_path / "run") is None
    with pytest.raises(ValueError, match=r"auto measures before the first step, but this training has begun with an"):
        train(tiny, auto(max_steps=4), *readers, tmp_path / "run")


def test_a_cpu_has_no_memory_to_measure(tmp_path: Path, tiny: StudentConfig, auto: Settings, readers: Readers) -> None:
    with pytest.raises(ValueError, match=r"use_gpu") as caught:
        auto(use_gpu=False)
    assert "this training runs on the CPU; give the seconds, as in train.batch_seconds=30" in str(caught.value)
    with pytest.raises(ValueError, match=r"auto measures the memory of a GPU, but this training runs on the CPU"):
        train(tiny, auto(), *readers, tmp_path / "run")
    with pytest.raises(ValueError, match=r"batch_size is 4 and train.batch_seconds is auto, but a batch has one size"):
        auto(batch_size=4)


def test_an_utterance_that_is_too_long_is_named(
    tmp_path: Path,
    tiny: StudentConfig,
    auto: Settings,
    readers: Readers,
    memory: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(StepMemory, "_free_bytes", lambda memory: 3_000_000)
    longest = max(readers[0].num_samples) / 16_000
    message = (
        rf"the longest utterance \({longest:.1f} s\) alone needs more memory in training than a GPU has left \(0\.0 GB\); "
        r"set train.checkpoint_activations=true, or lower corpus.max_seconds$"
    )
    with pytest.raises(ValueError, match=message):
        train(tiny, auto(), *readers, tmp_path / "run")
    with pytest.raises(ValueError, match=r"\(1\.8 s\).*; lower corpus.max_seconds and train.crop_seconds$"):
        train(tiny, auto(checkpoint_activations=True, crop_seconds=1.8), *readers, tmp_path / "run")


def test_both_phases_of_a_pruning_have_what_the_first_found(
    tmp_path: Path, still: StudentConfig, auto: Settings, readers: Readers, rows: Rows, memory: list[int]
) -> None:
    whole = still.model_copy(update={"attention_reuse": "none", "encoder_ffn_embed_dim": 40})
    prune = {"sparsity": 0.3, "steps": 4, "rise_steps": 2, "warmup_steps": 1, "gate_learning_rate": 0.1}
    options = auto(max_steps=3, validate_every=3, init_encoder_layers=2, prune=prune)
    train_in_phases(whole, options, *readers, tmp_path / "run")
    (row,) = rows(tmp_path / "run" / "pruning", "batch")
    assert rows(tmp_path / "run", "batch") == []
    folders = tmp_path / "run", tmp_path / "run" / "pruning"
    assert [saved_batch_seconds(folder) for folder in folders] == [row["batch_seconds"]] * 2


@pytest.mark.slow
def test_ranks_with_different_memories_agree(
    tmp_path: Path, tiny: StudentConfig, auto: Settings, cache: Path, rows: Rows
) -> None:
    mp.spawn(_rank, args=(tiny, auto(workers=2, max_steps=3), cache, tmp_path), nprocs=2)
    (row,) = rows(tmp_path / "run", "batch")
    assert 2.2 <= row["batch_seconds"] < 4 and row["limit_bytes"] == 9_000_000
    assert len(rows(tmp_path / "run")) == 3


def _rank(index: int, config: StudentConfig, options: TrainSettings, cache: Path, folder: Path) -> None:
    """Train on one of two ranks, of which the second runs out of memory at 3 s."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=index, world_size=2)

    def peak(memory: StepMemory, indices: Sequence[int]) -> int:
        needed = measured_peak(memory, indices)
        if index == 1 and needed > WEIGHTS + 3 * SECOND:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return needed

    readers = CacheReader(cache, "train"), CacheReader(cache, "validation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepMemory, "_peak", peak)
        patch.setattr(StepMemory, "_free_bytes", lambda memory: 9_000_000)
        train(config, options, *readers, folder / "run", rank=Rank(index, 2), wrap=DistributedDataParallel)
    torch.distributed.destroy_process_group()


class Ranks(Rank):
    """This rank, and others that have found something else."""

    def gather(self, value: Any) -> list[Any]:
        return [value, (FittingBatch(97.3, 5, 6), 6), (FittingBatch(250.0, 7, 8), 8)]


def test_ranks_take_the_smallest_size() -> None:
    assert agree(FittingBatch(123.4, 1, 2), 2, Rank()) == (FittingBatch(120, 1, 2), 2)
    assert agree(FittingBatch(123.4, 1, 2), 9, Ranks()) == (FittingBatch(97, 5, 6), 6)
    assert agree(FittingBatch(90.0, 1, 2), 9, Ranks())[0] == FittingBatch(90, 1, 2)
    assert agree(None, 2, Ranks()) == (None, 2), "no rank goes on if the longest utterance does not fit on one"


class Allocator:
    """The memory of a GPU by PyTorch's functions."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = self.peak = 0
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        patch.setattr(torch.cuda, "memory_allocated", lambda device: self.now)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(self, "peak", self.now))

    def add(self, kept: int, passing: int) -> None:
        """Allocate some bytes, and others for a while."""
        self.now += kept
        self.peak = max(self.peak, self.now + passing)


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_peak_counts_what_goes_on_beside_a_step(
    online: bool,
    world_size: int,
    tiny: StudentConfig,
    auto: Settings,
    readers: Readers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = Allocator(monkeypatch)
    monkeypatch.setattr(StepMemory, "_free_bytes", lambda memory: 0)
    memory = StepMemory(tiny, auto(), *readers, Rank(0, world_size))
    parts = memory._warm_parts()
    assert parts.optimizer.state, "the optimiser's state is allocated before anything is measured"
    gpu.now, memory._own = 1000, 300
    read = memory._read

    def reading(indices: Sequence[int]) -> Batch:
        if online:  # The teacher's activations and its features.
            gpu.add(10, 70)
        return read(indices)

    monkeypatch.setattr(memory, "_read", reading)
    monkeypatch.setattr(memory, "_step", lambda parts, batch: gpu.add(0, 5000))
    beside = 10 + 80 + PREFETCH * 10 if online else 0
    weights = sum(p.numel() for p in parts.distiller.parameters())
    buckets = 4 * weights if world_size == 2 else 0
    assert memory(0.5) == 1000 + 5000 - 300 + beside + buckets


def test_a_tenth_of_the_free_memory_is_left(
    tiny: StudentConfig, auto: Settings, readers: Readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Allocator(monkeypatch)
    gpu.now = 1000
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1500)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000, 80_000))
    memory = StepMemory(tiny, auto(), *readers, Rank(device=torch.device("cuda", 0)))
    assert memory.limit == 1000 + 0.9 * (10_000 + 500)


def test_after_a_failure_the_parts_are_made_anew(
    tiny: StudentConfig, auto: Settings, readers: Readers, memory: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = StepMemory(tiny, auto(accumulate=2), *readers, Rank())
    first = steps._warm_parts()
    weights = [p.detach().clone() for p in first.student.parameters()]

    def fails(self: Any, norm: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(trained_parts.TrainedParts, "update", fails)
        with pytest.raises(torch.OutOfMemoryError):
            steps(2.0)
    assert any(p.grad is not None for p in first.student.parameters())
    second = steps._warm_parts()
    assert second is not first and all(p.grad is None for p in second.student.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, second.student.parameters(), strict=True))
