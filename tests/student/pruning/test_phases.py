"""The two phases of a training that prunes: what they leave, how they continue, and that ranks and batches do not matter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from ray_distill.student.checkpoints import load_student
from ray_distill.student.model.student import Student
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.pruning.phases import train_in_phases
from ray_distill.student.training.optimizer import make_optimizer
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.validation import make_distiller
from ray_distill.teacher_cache.reader import CacheReader

Readers = tuple[CacheReader, CacheReader]
Rows = Callable[..., list[dict[str, Any]]]
PRUNE = {
    "sparsity": 0.3,
    "steps": 8,
    "rise_steps": 4,
    "weight_learning_rate": 1e-3,
    "warmup_steps": 2,
    "gate_learning_rate": 0.1,
}


@pytest.fixture
def whole(still: StudentConfig) -> StudentConfig:
    return still.model_copy(update={"attention_reuse": "none", "encoder_ffn_embed_dim": 40})


@pytest.fixture
def pruning(settings: Callable[..., TrainSettings]) -> Callable[..., TrainSettings]:
    """Makes settings of a training that prunes in 8 steps and goes on for 6."""

    def make(prune: dict[str, Any] | None = None, **changes: Any) -> TrainSettings:
        return settings(
            **{"max_steps": 6, "validate_every": 3, "init_encoder_layers": 2, "prune": PRUNE | (prune or {})} | changes
        )

    return make


def test_two_phases_leave_a_smaller_student(
    tmp_path: Path, whole: StudentConfig, pruning: Callable[..., TrainSettings], readers: Readers, rows: Rows
) -> None:
    run = tmp_path / "run"
    seen: list[dict[str, Any]] = []
    result = train_in_phases(whole, pruning(), *readers, run, on_row=seen.append)
    assert result.steps == 6
    first = json.loads((run / "pruning" / "train.json").read_text())
    assert first["steps"] == 8 and first["best_step"] == 8
    found = rows(run / "pruning")
    assert [row["step"] for row in found] == list(range(1, 9))
    assert [row["target_sparsity"] for row in found] == pytest.approx([0, 0.075, 0.15, 0.225, *[0.3] * 4])
    assert all(0 < row["sparsity"] < 1 for row in found)
    assert "sparsity" not in rows(run)[0]
    assert len([row for row in seen if row["kind"] == "train"]) == 14
    assert not list((run / "pruning" / "checkpoints").glob("step-*")), "students with gates are not kept"
    pruned, last = load_student(run / "pruning" / "student"), load_student(run / "checkpoints" / "best")
    assert pruned.config == last.config
    assert last.config.layer_ffn_dims is not None and max(last.config.layer_ffn_dims) < 40
    record = json.loads((run / "pruning" / "student" / "config.json").read_text())["metadata"]
    total = sum(p.numel() for p in Student(whole).without_heads().parameters())
    left = sum(p.numel() for p in last.without_heads().parameters())
    assert (record["parameters_before"], record["parameters"]) == (total, left)
    assert record["sparsity"] == pytest.approx(1 - left / total) == pytest.approx(0.3, abs=0.02)
    # The second phase starts where the first has ended: with the pruned student.
    ended, begun = rows(run / "pruning", "validation")[-1], rows(run, "validation")[0]
    assert begun["loss"] == pytest.approx(ended["loss"], rel=1e-5)


class Stopped(Exception):
    """The process was killed."""


@pytest.mark.parametrize("dies", [("pruning", 5), ("pruning", 8), ("main", 4)])
def test_a_stopped_run_ends_as_an_undisturbed_one(
    dies: tuple[str, int],
    tmp_path: Path,
    whole: StudentConfig,
    pruning: Callable[..., TrainSettings],
    readers: Readers,
    assert_same_end: Callable[[Path, Path], None],
    last: Callable[[Path], dict[str, Any]],
) -> None:
    options = pruning(checkpoint_every=2)
    train_in_phases(whole, options, *readers, tmp_path / "one")
    rows_seen = {"train": 0}

    def stop(row: dict[str, Any]) -> None:
        rows_seen["train"] += row["kind"] == "train"
        if rows_seen["train"] == (dies[1] if dies[0] == "pruning" else 8 + dies[1]):
            raise Stopped

    with pytest.raises(Stopped):
        train_in_phases(whole, options, *readers, tmp_path / "two", on_row=stop)
    train_in_phases(whole, options, *readers, tmp_path / "two")
    assert_same_end(tmp_path / "two", tmp_path / "one")
    one, two = (last(tmp_path / run / "pruning") for run in ("one", "two"))
    torch.testing.assert_close(two["parts"], one["parts"], rtol=0, atol=0)
    assert one["parts"]["gates"]["multipliers"].abs().min() > 0
    for name in ("student/model.safetensors", "student/config.json"):
        one, two = (tmp_path / run / "pruning" / name for run in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_a_finished_run_can_be_made_longer_without_pruning_again(
    tmp_path: Path, whole: StudentConfig, pruning: Callable[..., TrainSettings], readers: Readers
) -> None:
    train_in_phases(whole, pruning(), *readers, tmp_path / "run")
    before = (tmp_path / "run" / "pruning" / "train.json").stat().st_mtime_ns
    assert train_in_phases(whole, pruning(max_steps=8), *readers, tmp_path / "run").steps == 8
    assert (tmp_path / "run" / "pruning" / "train.json").stat().st_mtime_ns == before


def test_shares_of_the_penalty_add_up(
    whole: StudentConfig, pruning: Callable[..., TrainSettings], readers: Readers
) -> None:
    options = pruning()
    distiller = make_distiller(Student(whole), options, readers[0])
    assert distiller.gates is not None
    with torch.no_grad():
        distiller.gates.multipliers += 1
    distiller.gates.step = 4
    frames, shares = int(readers[0].num_frames[:5].sum()), []
    for indices in ([0, 1], [2, 3, 4]):
        batch = readers[0].read(indices, 0)
        loss = distiller(batch.waveforms, batch.lengths, batch.frame_mask, batch.targets, frames)
        shares.append(float(loss.penalty.detach()))
    assert sum(shares) == pytest.approx(float(distiller.gates.penalty().detach()), rel=1e-5)
    assert shares[0] != 0
    assert distiller.eval()(batch.waveforms, batch.lengths, None, batch.targets, frames).penalty is None


def test_gates_have_a_learning_rate_of_their_own(whole: StudentConfig, pruning: Callable[..., TrainSettings]) -> None:
    options = pruning().pruning_phase()
    distiller = make_distiller(Student(whole), options)
    weights, biases, gates = make_optimizer(distiller, options).param_groups
    assert gates["lr_scale"] == pytest.approx(0.1 / 1e-3) and gates["weight_decay"] == 0
    assert distiller.gates is not None
    assert {id(p) for p in gates["params"]} == {id(p) for p in distiller.gates.parameters()}
    assert not {id(p) for p in gates["params"]} & {id(p) for p in [*weights["params"], *biases["params"]]}


@pytest.mark.slow
def test_ranks_and_accumulation_do_not_matter(
    tmp_path: Path, whole: StudentConfig, pruning: Callable[..., TrainSettings], cache: Path, rows: Rows
) -> None:
    for workers in (1, 2):
        options = pruning(workers=workers, accumulate=2 // workers, batch_size=2)
        mp.spawn(_rank, args=(workers, whole, options, cache, tmp_path), nprocs=workers)
    one, two = ([*rows(tmp_path / f"run{n}" / "pruning"), *rows(tmp_path / f"run{n}")] for n in (1, 2))
    assert len(one) == len(two) == 14
    for name in ("loss", "gradient_norm", "sparsity"):
        ours, theirs = ([row[name] for row in some if name in row] for some in (one, two))
        np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    configs = [load_student(tmp_path / f"run{n}" / "pruning" / "student").config for n in (1, 2)]
    assert configs[0] == configs[1]


def _rank(index: int, workers: int, config: StudentConfig, options: TrainSettings, cache: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / f"store{workers}"), workers)
    torch.distributed.init_process_group("gloo", store=store, rank=index, world_size=workers)
    readers = CacheReader(cache, "train"), CacheReader(cache, "validation")
    wrap = DistributedDataParallel if workers > 1 else lambda distiller: distiller
    train_in_phases(config, options, *readers, folder / f"run{workers}", rank=Rank(index, workers), wrap=wrap)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"init_encoder_layers": 0},
            "train.prune needs a student that has learned something; set train.init_front_end",
        ),
        ({"objective": "units"}, "train.prune does not go with train.objective units, whose predictors would be lost"),
        ({"count_padding": True}, "does not go with train.count_padding"),
    ],
)
def test_settings_that_rule_each_other_out(
    changes: dict[str, Any], message: str, pruning: Callable[..., TrainSettings]
) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        pruning(**changes)
