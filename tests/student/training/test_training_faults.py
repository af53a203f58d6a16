"""Faults during training: losses that are not finite, kills, full disks, damaged checkpoints."""

import errno
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from ray_distill.student.model.student import Student
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.objectives.layer_prediction import LayerDistiller
from ray_distill.student.training.optimizer import make_optimizer
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.steps import trained_parts
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.train_state import CheckpointError
from ray_distill.student.training.training_loop import MIN_LOSS_SCALE, _Loop, train
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.targets.target_batch import Batch, TargetReader

Readers = tuple[CacheReader, CacheReader]
Rows = Callable[..., list[dict[str, Any]]]
Settings = Callable[..., TrainSettings]


class Faulty:
    """A reader that passes its n-th training batch, from 0, through ``fault``."""

    def __init__(self, reader: TargetReader, fault: Callable[[int, Batch], Batch]) -> None:
        self.num_samples, self.num_frames, self.layers, self.dim, self.draws = (
            reader.num_samples,
            reader.num_frames,
            reader.layers,
            reader.dim,
            reader.draws,
        )
        self.reads = 0
        self._reader, self._fault = reader, fault

    def read(self, indices: Sequence[int], draw: int | None) -> Batch:
        batch = self._reader.read(indices, draw).to("cpu")
        number, self.reads = self.reads, self.reads + 1
        return self._fault(number, batch)


def poisoned(batch: Batch) -> Batch:
    return replace(batch, coded=torch.full_like(batch.targets, torch.inf))


class Stop(Exception):
    pass


def stop_at(read: int) -> Callable[[int, Batch], Batch]:
    def fault(number: int, batch: Batch) -> Batch:
        if number == read:
            raise Stop
        return batch

    return fault


# Losses that are not finite


@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_a_bad_batch_is_left_out(
    tmp_path: Path, tiny: StudentConfig, settings: Settings, readers: Readers, rows: Rows, kind: str
) -> None:
    seen: list[Batch] = []

    def fault(number: int, batch: Batch) -> Batch:
        seen.append(batch)
        return poisoned(batch) if number == 7 else batch

    result = train(tiny, settings(loss=kind), Faulty(readers[0], fault), readers[1], tmp_path / "run")
    assert (result.steps, result.skipped_steps) == (12, 1)
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12]
    assert [row["skipped_steps"] for row in rows(tmp_path / "run")] == [0] * 7 + [1] * 4
    (skipped,) = rows(tmp_path / "run", "skipped")
    longest = int(seen[7].lengths.argmax())
    assert skipped["step"] == 8
    assert skipped["cause"] == "loss"
    assert skipped["utterances"] == seen[7].ids
    assert skipped["longest"] == seen[7].ids[longest]
    assert skipped["longest_seconds"] == float(seen[7].lengths[longest]) / 16_000


def test_a_skipped_step_leaves_the_weights_alone(
    tmp_path: Path, still: StudentConfig, settings: Settings, readers: Readers
) -> None:
    weights: list[Tensor] = []

    def watched(distiller: LayerDistiller) -> LayerDistiller:
        head = distiller.student.heads[1]
        distiller.register_forward_pre_hook(lambda *_: weights.append(head.weight.detach().clone()))
        return distiller

    reader = Faulty(readers[0], lambda number, batch: poisoned(batch) if number in (7, 8) else batch)
    train(still, settings(validate_every=100), reader, readers[1], tmp_path / "run", wrap=watched)
    assert torch.equal(weights[7], weights[8]) and torch.equal(weights[8], weights[9])
    assert not torch.equal(weights[9], weights[10])
    assert not torch.equal(weights[6], weights[7])


def test_reading_the_outcomes_of_steps_later_changes_nothing(
    tmp_path: Path,
    tiny: StudentConfig,
    settings: Settings,
    readers: Readers,
    last: Callable[[Path], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU: the optimiser is fused, and the host reads nothing in a step."""

    def fused(student: Student, options: TrainSettings) -> torch.optim.AdamW:
        optimizer = make_optimizer(student, options)
        for group in optimizer.param_groups:
            group["fused"] = True
        return optimizer

    reads: list[int] = []
    step, real_float, real_item = _Loop.step, Tensor.__float__, Tensor.item

    def counted(loop: _Loop, micro: Any) -> None:
        before = len(reads)
        step(loop, micro)
        assert len(reads) == before or not loop.parts.defers

    monkeypatch.setattr(trained_parts, "make_optimizer", fused)
    monkeypatch.setattr(_Loop, "step", counted)
    monkeypatch.setattr(Tensor, "__float__", lambda x: (reads.append(1), real_float(x))[1])
    monkeypatch.setattr(Tensor, "item", lambda x: (reads.append(1), real_item(x))[1])
    options = settings(log_every=5, max_grad_norm=0.5, checkpoint_every=4)
    found = {}
    for name, defers in (("at once", False), ("later", True)):
        monkeypatch.setattr(trained_parts, "_can_defer", lambda device, defers=defers: defers)
        reader = Faulty(readers[0], lambda number, batch: poisoned(batch) if number in (1, 6, 7) else batch)
        result = train(tiny, options, reader, readers[1], tmp_path / name)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        timing = ("audio_hours_per_minute", "data_wait")
        kept = [{key: value for key, value in row.items() if key not in timing} for row in lines]
        found[name] = replace(result, seconds=0), kept, last(tmp_path / name)
    assert found["at once"][:2] == found["later"][:2]
    assert found["later"][0].skipped_steps == 3
    parts, other = (found[name][2]["parts"] for name in found)
    for key, weight in parts["student"].items():
        assert torch.equal(weight, other["student"][key])
    for number, moments in parts["optimizer"]["state"].items():
        assert all(torch.equal(value, other["optimizer"]["state"][number][key]) for key, value in moments.items())


def test_a_run_that_only_skips_stops_and_says_why(
    tmp_path: Path, tiny: StudentConfig, settings: Settings, readers: Readers, last: Callable[[Path], dict[str, Any]]
) -> None:
    reader = Faulty(readers[0], lambda number, batch: poisoned(batch) if number >= 6 else batch)
    options = settings(max_skipped_steps=4, max_steps=100)
    with pytest.raises(FloatingPointError) as caught:
        train(tiny, options, reader, readers[1], tmp_path / "run")
    message = str(caught.value)
    assert "the loss was not finite in 4 steps in a row, up to step 10 (learning rate 0.00479)" in message
    assert "0-0-0000" in message or "-0-0000" in message
    assert "the longest is" in message and "lower train.learning_rate" in message
    state = last(tmp_path / "run")
    assert state["state"]["step"] == 6
    assert all(weight.isfinite().all() for weight in state["parts"]["student"].values())


def test_a_diverged_run_stops(tmp_path: Path, tiny: StudentConfig, settings: Settings, readers: Readers) -> None:
    options = settings(learning_rate=1e30, warmup_fraction=0.0, max_steps=30, validate_every=100)
    with pytest.raises(FloatingPointError, match="10 steps in a row, up to step 1[12] .learning rate"):
        train(tiny, options, *readers, tmp_path / "run")


def test_a_gradient_that_is_not_finite_is_told_from_a_loss(
    tmp_path: Path, tiny: StudentConfig, settings: Settings, readers: Readers, rows: Rows
) -> None:
    calls = 0

    def overflow(gradient: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return gradient * (torch.inf if calls in (3, 4) else 1.0)

    def wrap(distiller: LayerDistiller) -> LayerDistiller:
        distiller.student.heads[0].weight.register_hook(overflow)
        return distiller

    result = train(tiny, settings(), *readers, tmp_path / "run", wrap=wrap)
    assert [row["cause"] for row in rows(tmp_path / "run", "skipped")] == ["gradient", "gradient"]
    assert result.skipped_steps == 2
    # The loss was finite, so the step is part of a row.
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 13))


@pytest.mark.slow
def test_all_ranks_skip_together(
    tmp_path: Path,
    still: StudentConfig,
    settings: Settings,
    cache: Path,
    readers: Readers,
    rows: Rows,
) -> None:
    mp.spawn(_rank, args=(still, settings(batch_size=2), cache, tmp_path), nprocs=2)
    one, two = (torch.load(tmp_path / f"rank{n}.pt", weights_only=True) for n in range(2))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    # The same in one process: the poisoned batches are those that were the fifth and sixth of rank 1.
    reader = Faulty(readers[0], lambda number, batch: poisoned(batch) if number in (9, 11) else batch)
    train(still, settings(batch_size=2, accumulate=2), reader, readers[1], tmp_path / "alone")
    assert len(rows(tmp_path / "ranks", "skipped")) == 2
    for ours, theirs in zip(rows(tmp_path / "ranks", "skipped"), rows(tmp_path / "alone", "skipped"), strict=True):
        assert ours == theirs
    for ours, theirs in zip(rows(tmp_path / "ranks"), rows(tmp_path / "alone"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def _rank(index: int, config: StudentConfig, options: TrainSettings, cache: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=index, world_size=2)
    students: list[Student] = []

    def wrap(distiller: LayerDistiller) -> DistributedDataParallel:
        students.append(distiller.student)
        return DistributedDataParallel(distiller)

    reader = Faulty(
        CacheReader(cache, "train"),
        lambda number, batch: poisoned(batch) if index == 1 and number in (4, 5) else batch,
    )
    train(config, options, reader, CacheReader(cache, "validation"), folder / "ranks", rank=Rank(index, 2), wrap=wrap)
    torch.save(students[0].state_dict(), folder / f"rank{index}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_looking_for_the_loss_scale_does_not_stop_a_run(
    tmp_path: Path,
    tiny: StudentConfig,
    settings: Settings,
    readers: Readers,
    rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "ray_distill.student.training.steps.trained_parts.GradScaler",
        lambda *a, **k: GradScaler(*a, **k, init_scale=2.0**60),
    )
    # The arithmetic of fp16 is the same on a CPU, only slow.
    options = settings(precision="fp16", use_gpu=True, max_steps=60, max_skipped_steps=3)
    result = train(tiny, options, *readers, tmp_path / "run")
    skipped = rows(tmp_path / "run", "skipped")
    assert 10 < result.skipped_steps == len(skipped)
    assert {row["cause"] for row in skipped} == {"loss scale"}
    assert [row["step"] for row in skipped] == list(range(1, len(skipped) + 1))
    assert rows(tmp_path / "run")[-1]["loss_scale"] == 2.0 ** (60 - len(skipped))
    assert result.last_validation_loss < result.first_validation_loss


def test_a_loss_scale_that_cannot_fall_stops_the_run(
    tmp_path: Path, tiny: StudentConfig, settings: Settings, readers: Readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = 4.5 * MIN_LOSS_SCALE
    monkeypatch.setattr(
        "ray_distill.student.training.steps.trained_parts.GradScaler",
        lambda *a, **k: GradScaler(*a, **k, init_scale=scale),
    )

    def wrap(distiller: LayerDistiller) -> LayerDistiller:
        distiller.student.heads[0].weight.register_hook(lambda gradient: gradient * torch.inf)
        return distiller

    options = settings(precision="fp16", use_gpu=True, max_skipped_steps=2)
    # Three steps halve the scale (4.5, 2.25, 1.125 times the minimum), and two more are skipped.
    with pytest.raises(FloatingPointError, match="the gradient was not finite in 2 steps in a row, up to step 5"):
        train(tiny, options, *readers, tmp_path / "run", wrap=wrap)


def test_a_validation_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, tiny: StudentConfig, settings: Settings, readers: Readers
) -> None:
    validation = Faulty(readers[1], lambda number, batch: poisoned(batch))
    with pytest.raises(FloatingPointError, match="the validation loss is inf at step 0; check the validation targets"):
        train(tiny, settings(), readers[0], validation, tmp_path / "run")


# Continuing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "reads"),
    [
        ({}, 8),
        # In the middle of an epoch, of the steps of a row and of the batches of a step, with averaged weights.
        ({"checkpoint_every": 2, "log_every": 3, "ema_decay": 0.9, "batch_size": 1, "accumulate": 2}, 11),
        ({"batch_size": None, "batch_seconds": 4.0, "checkpoint_every": 5, "max_grad_norm": 0.1}, 10),
    ],
)
def test_a_stopped_run_ends_as_an_undisturbed_one(
    tmp_path: Path,
    tiny: StudentConfig,
    settings: Settings,
    readers: Readers,
    assert_same_end: Callable[[Path, Path], None],
    last: Callable[[Path], dict[str, Any]],
    options: dict[str, Any],
    reads: int,
) -> None:
    chosen = settings(**options)
    train(tiny, chosen, *readers, tmp_path / "whole")
    with pytest.raises(Stop):
        train(tiny, chosen, Faulty(readers[0], stop_at(reads)), readers[1], tmp_path / "stopped")
    step = last(tmp_path / "stopped")["state"]["step"]
    assert 0 < step < 12
    # The process was killed while writing a row.
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    reader = Faulty(readers[0], lambda number, batch: batch)
    train(tiny, chosen, reader, readers[1], tmp_path / "stopped")
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")
    # Batches of finished steps are not read again.
    assert reader.reads == (12 - step) * chosen.accumulate


@pytest.mark.slow
def test_the_best_students_are_kept(
    tmp_path: Path, tiny: StudentConfig, settings: Settings, readers: Readers, rows: Rows
) -> None:
    train(tiny, settings(validate_every=2, keep_best=3), *readers, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    ranked = sorted((row["loss"], row["step"]) for row in rows(tmp_path / "run", "validation"))
    names = {f"step-{step:06d}" for _, step in ranked[:3]}
    assert {path.name for path in folder.iterdir()} == {"last", "best"} | names
    assert (folder / "best").readlink() == Path(f"step-{ranked[0][1]:06d}")
    record = json.loads((folder / "best" / "config.json").read_text())
    assert record["metadata"] == {"step": ranked[0][1], "validation_loss": ranked[0][0]}


@pytest.mark.slow
def test_a_kill_at_any_moment_of_a_checkpoint_loses_nothing(
    tmp_path: Path,
    tiny: StudentConfig,
    settings: Settings,
    readers: Readers,
    assert_same_end: Callable[[Path, Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = settings(validate_every=4, keep_best=2)
    train(tiny, options, *readers, tmp_path / "whole")
    replaced = Path.replace, Path.rename
    moments = 0
    # Each process is killed after another of the renames.
    for fatal in range(100):
        run = tmp_path / f"killed{fatal}"
        moments = 0

        def count(path: Path, target: Path, fatal: int = fatal, real: Any = replaced[0]) -> Path:
            nonlocal moments
            moments += 1
            result: Path = real(path, target)
            if moments == fatal + 1:
                raise Stop
            return result

        monkeypatch.setattr(Path, "replace", count)
        monkeypatch.setattr(Path, "rename", lambda path, target, count=count: count(path, target, real=replaced[1]))
        try:
            train(tiny, options, *readers, run)
            break
        except Stop:
            monkeypatch.undo()
            train(tiny, options, *readers, run)
            assert_same_end(run, tmp_path / "whole")
    assert fatal > 15


# Disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small file system ({mounted.stderr.strip()})")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
    ("left", "what"),
    [(60_000, "the checkpoint of step 8 can't be written to {run}/checkpoints"), (0, "the metrics of step")],
)
def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path,
    tiny: StudentConfig,
    settings: Settings,
    readers: Readers,
    small_disk: Path,
    assert_same_end: Callable[[Path, Path], None],
    last: Callable[[Path], dict[str, Any]],
    left: int,
    what: str,
) -> None:
    options = settings(checkpoint_every=4)
    train(tiny, options, *readers, tmp_path / "whole")
    run = small_disk / "run"
    filler = small_disk / "filler"

    def fill(row: dict[str, Any]) -> None:
        if row["step"] == 6:
            disk = os.statvfs(small_disk)
            filler.write_bytes(bytes(disk.f_bavail * disk.f_frsize - left))

    with pytest.raises(
        OSError, match=re.escape(what.format(run=run)) + ".*No space left on device.*once this is put right"
    ):
        train(tiny, options, *readers, run, on_validation=fill)
    assert last(run)["state"]["step"] == 6
    filler.unlink()
    train(tiny, options, *readers, run)
    assert_same_end(run, tmp_path / "whole")


@pytest.mark.slow
def test_a_disk_that_fails_leaves_the_checkpoint_before(
    tmp_path: Path,
    tiny: StudentConfig,
    settings: Settings,
    readers: Readers,
    assert_same_end: Callable[[Path, Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = settings(validate_every=4)
    train(tiny, options, *readers, tmp_path / "whole")
    run = tmp_path / "failed"
    sync, syncs = os.fsync, 0
    # The metrics sync one file, and steps 0, 4 and 8 sync six files each: let each of the last six fail in turn.
    for fatal in range(14, 20):
        syncs = 0

        def fail(handle: int, fatal: int = fatal) -> None:
            nonlocal syncs
            syncs += 1
            if syncs == fatal:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(handle)

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(CheckpointError, match="the checkpoint of step 8 can't be written.*No space left on device"):
            train(tiny, options, *readers, run / str(fatal))
        monkeypatch.undo()
        train(tiny, options, *readers, run / str(fatal))
        assert_same_end(run / str(fatal), tmp_path / "whole")
