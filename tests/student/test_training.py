"""The training loop without Ray: cached equals online, resume equals undisturbed, ranks and accumulation don't matter."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from student.config import StudentConfig
from student.model import Student
from student.settings import TrainSettings
from student.training import Rank, TrainingPlan, make_optimizer, schedule_factor, train
from teacher_cache.build import ShardWriter
from teacher_cache.layout import CacheSpec, MaskDraws, SourceUtterance, open_or_create, plan_shards
from teacher_cache.masks import MaskPolicy
from teacher_cache.reader import CacheReader, OnlineReader
from teacher_cache.teachers import load_teacher

TEACHER = "random:2x32"
MASKS = MaskDraws(policy=MaskPolicy(mask_prob=0.5, mask_length=4), draws=1)
TINY = StudentConfig(
    conv_layers=((8, 10, 5), (8, 3, 2), (8, 3, 2), (8, 3, 2), (8, 3, 2), (8, 2, 2), (8, 2, 2)),
    encoder_layers=2,
    encoder_embed_dim=16,
    encoder_ffn_embed_dim=24,
    encoder_attention_heads=2,
    conv_pos=8,
    conv_pos_groups=2,
    target_dim=32,
)
STILL = TINY.model_copy(
    update={"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "dropout_input": 0.0}
)


@pytest.fixture
def cache(tmp_path: Path, source_utterances: list[SourceUtterance]) -> Path:
    teacher = load_teacher(TEACHER)
    spec = CacheSpec(
        teacher=teacher.fingerprint,
        num_layers=2,
        dim=32,
        layers=(1, 2),
        masks=MASKS,
        codec="fp32",
        corpus="test",
        shard_seconds=5,
        batch_seconds=6,
    )
    plan = plan_shards(source_utterances, spec.shard_seconds)
    open_or_create(tmp_path / "cache", spec, plan, teacher.name)
    writer = ShardWriter(str(tmp_path / "cache"), TEACHER, "cpu")
    for shard in sorted(set(plan["shard"].to_pylist())):
        writer.write(shard)
    return tmp_path / "cache"


def settings(**changes: object) -> TrainSettings:
    values = {
        "batch_size": 3,
        "epochs": 1000,
        "max_steps": 12,
        "log_every": 1,
        "validate_every": 6,
        "learning_rate": 5e-3,
    }
    return TrainSettings.model_validate(values | changes)


def losses(folder: Path, kind: str = "train") -> list[float]:
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == kind]


def test_it_learns(tmp_path: Path, cache: Path) -> None:
    result = train(
        TINY, settings(max_steps=60), CacheReader(cache, "train"), CacheReader(cache, "validation"), tmp_path / "run"
    )
    assert result.last_validation_loss < 0.9 * result.first_validation_loss
    assert result.steps == 60
    assert len(losses(tmp_path / "run")) == 60
    assert json.loads((tmp_path / "run" / "train.json").read_text())["steps"] == 60
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_cached_equals_online(tmp_path: Path, cache: Path, source_utterances: list[SourceUtterance]) -> None:
    cached = {split: CacheReader(cache, split) for split in ("train", "validation")}
    by_id = {u.id: u for u in source_utterances}
    teacher = load_teacher(TEACHER)

    class SameDraws(OnlineReader):
        draws = 1  # a cache of one draw repeats it each epoch

    online = {s: SameDraws([by_id[i] for i in reader.ids], teacher, MASKS) for s, reader in cached.items()}
    train(TINY, settings(max_steps=50), cached["train"], cached["validation"], tmp_path / "cached")
    train(TINY, settings(max_steps=50), online["train"], online["validation"], tmp_path / "online")
    for kind in ("train", "validation"):
        ours, theirs = np.array(losses(tmp_path / "cached", kind)), np.array(losses(tmp_path / "online", kind))
        assert len(ours) == (50 if kind == "train" else 10)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


class Stop(Exception):
    pass


def test_resume_ends_as_if_undisturbed(tmp_path: Path, cache: Path) -> None:
    readers = CacheReader(cache, "train"), CacheReader(cache, "validation")
    train(TINY, settings(), *readers, tmp_path / "whole")

    def stop(row: dict) -> None:
        if row["step"] == 6:
            raise Stop

    with pytest.raises(Stop):
        train(TINY, settings(), *readers, tmp_path / "stopped", on_validation=stop)
    # Killed between the two renames of a save: only the set-aside checkpoint is there.
    checkpoints = tmp_path / "stopped" / "checkpoints"
    (checkpoints / "last").rename(checkpoints / ".last.old")
    train(TINY, settings(), *readers, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert losses(tmp_path / "stopped", "validation") == losses(tmp_path / "whole", "validation")
    ours, theirs = (
        torch.load(tmp_path / name / "checkpoints" / "last" / "state.pt", weights_only=True)["student"]
        for name in ("stopped", "whole")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_accumulation_changes_nothing(tmp_path: Path, cache: Path) -> None:
    readers = CacheReader(cache, "train"), CacheReader(cache, "validation")
    train(STILL, settings(batch_size=2, accumulate=2, max_steps=6), *readers, tmp_path / "two")
    loss_two = losses(tmp_path / "two")
    mp.spawn(_rank, args=(str(cache), str(tmp_path)), nprocs=2)
    np.testing.assert_allclose(losses(tmp_path / "ranks"), loss_two, rtol=1e-5)


def _rank(index: int, cache: str, folder: str) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=index, world_size=2)
    train(
        STILL,
        settings(batch_size=2, max_steps=6),
        CacheReader(Path(cache), "train"),
        CacheReader(Path(cache), "validation"),
        Path(folder) / "ranks",
        rank=Rank(index, 2),
        wrap=lambda student: torch.nn.parallel.DistributedDataParallel(student),
    )
    torch.distributed.destroy_process_group()


def test_a_student_that_does_not_fit_is_refused(tmp_path: Path, cache: Path) -> None:
    reader = CacheReader(cache, "train")
    wide = TINY.model_copy(update={"target_dim": 48})
    with pytest.raises(ValueError, match=r"heads of width 48, the targets 2 layers of width 32"):
        train(wide, settings(), reader, reader, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, cache: Path) -> None:
    reader = CacheReader(cache, "train")
    with pytest.raises(FloatingPointError, match="at step"):
        train(TINY, settings(learning_rate=1e30, warmup_fraction=0.0, max_steps=30), reader, reader, tmp_path / "run")


def test_schedule() -> None:
    factors = [schedule_factor(step, 100, 0.05) for step in range(101)]
    assert factors[0] == 0
    assert factors[5] == 1 == max(factors)
    assert factors[1] == pytest.approx(0.2)
    assert factors[52] == pytest.approx(48 / 95)
    assert factors[100] == 0


def test_weight_decay_spares_biases_only() -> None:
    student = Student(TINY)
    decayed, spared = make_optimizer(student, settings()).param_groups
    biases = [p for name, p in student.named_parameters() if name.endswith("bias")]
    assert {id(p) for p in spared["params"]} == {id(p) for p in biases}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)


def test_plan_counts_steps() -> None:
    lengths = np.full(20, 16_000)
    assert TrainingPlan(lengths, settings(epochs=3, max_steps=None, batch_size=2), 2).total_steps == 15
    plan = TrainingPlan(lengths, settings(epochs=3, max_steps=7, batch_size=2), 2)
    assert plan.total_steps == 7
    assert [plan.step(s)[0] for s in (0, 4, 5, 6)] == [0, 0, 1, 1]
