"""The training loop without Ray: cached equals online targets, ranks and accumulation do not matter, rows and files."""

import json
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ray_distill.student.checkpoints import load_student
from ray_distill.student.model import student as student_module
from ray_distill.student.model.student import Student
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.objectives.layer_prediction import LayerDistiller
from ray_distill.student.training.optimizer import make_optimizer, schedule_factor
from ray_distill.student.training.prefetch import TrainingPlan
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.ray_training import train_on_ray
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.training_loop import train
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterance
from ray_distill.teacher_cache.targets.online_targets import OnlineReader
from ray_distill.teacher_cache.targets.target_batch import TargetReader
from ray_distill.teacher_cache.teachers import load_teacher

Readers = tuple[CacheReader, CacheReader]
Rows = Callable[..., list[dict[str, Any]]]
Settings = Callable[..., TrainSettings]


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows]


@pytest.mark.slow
def test_it_learns_and_records(
    tmp_path: Path, tiny: StudentConfig, settings: Settings, readers: Readers, rows: Rows
) -> None:
    result = train(tiny, settings(max_steps=60), *readers, tmp_path / "run")
    assert result.last_validation_loss < 0.9 * result.first_validation_loss
    assert (result.steps, result.skipped_steps) == (60, 0)
    assert json.loads((tmp_path / "run" / "train.json").read_text())["steps"] == 60
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == list(range(1, 61))
    row = found[30]
    assert row["learning_rate"] == pytest.approx(5e-3 * (60 - 30) / 57)
    assert row["gradient_norm"] > 0
    assert row["audio_hours_per_minute"] > 0
    assert 0 <= row["data_wait"] <= 1
    assert 0 < row["padding_waste"] < 0.5
    assert row["bytes_per_second"] > 0
    for name in ("masked", "unmasked"):
        for layer in (1, 2):
            cosines = [row[f"cosine_{name}_layer_{layer:02d}"] for row in found]
            assert np.mean(cosines[-6:]) > np.mean(cosines[:6])
            assert -1 <= min(cosines) <= max(cosines) <= 1
    checked = rows(tmp_path / "run", "validation")
    assert checked[-1]["cosine_unmasked_layer_02"] > checked[0]["cosine_unmasked_layer_02"]
    assert checked[-1]["loss"] == pytest.approx(0.1 * checked[-1]["layer_01"] + checked[-1]["layer_02"])


def test_the_same_seed_gives_the_same_losses(
    tmp_path: Path, tiny: StudentConfig, settings: Settings, readers: Readers, rows: Rows
) -> None:
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        train(tiny, settings(seed=seed), *readers, tmp_path / name)
    one, two, three = (losses(rows(tmp_path / name)) for name in ("one", "two", "three"))
    assert one == two
    assert all(a != b for a, b in zip(one, three, strict=True))


def test_a_failed_training_reads_nothing_more(
    tmp_path: Path, tiny: StudentConfig, settings: Settings, readers: Readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr("ray_distill.student.training.steps.trained_parts.batch_loss", fail)
    with pytest.raises(RuntimeError, match="the device is lost") as caught:
        train(tiny, settings(max_steps=100), *readers, tmp_path / "run")
    assert caught.tb is not None, "the frames of the training are kept"
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.slow
def test_cached_equals_online(
    tmp_path: Path,
    tiny: StudentConfig,
    settings: Settings,
    readers: Readers,
    source_utterances: list[Utterance],
    rows: Rows,
) -> None:
    by_id = {u.id: u for u in source_utterances}
    teacher = load_teacher("random:2x32")

    class SameDraws(OnlineReader):
        draws = 1  # a cache of one draw repeats it each epoch

    masks = readers[0].cache.spec.masks
    online = [SameDraws([by_id[i] for i in reader.ids], teacher, masks) for reader in readers]
    train(tiny, settings(max_steps=50), *readers, tmp_path / "cached")
    train(tiny, settings(max_steps=50), *online, tmp_path / "online")
    for kind, count in (("train", 50), ("validation", 10)):
        ours, theirs = (losses(rows(tmp_path / name, kind)) for name in ("cached", "online"))
        assert len(ours) == count
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert "bytes_per_second" not in rows(tmp_path / "online")[0]


@pytest.mark.parametrize(("masks", "masked"), [(MaskDraws(draws=0), False), (MaskDraws(draws=1), True)])
def test_online_targets_heed_draws_and_clean_only(
    tmp_path: Path,
    tiny: StudentConfig,
    settings: Settings,
    source_utterances: list[Utterance],
    rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
    masks: MaskDraws,
    masked: bool,
) -> None:
    teacher = load_teacher("random:2x32")
    teacher._mask_embedding = None  # As for Whisper, which refuses a masked pass.
    monkeypatch.setattr("ray_distill.teacher_cache.teachers.load_teacher", lambda spec, device: teacher)
    train_on_ray(
        tiny,
        settings(targets="online", max_steps=2),
        tmp_path,
        layers=(1, 2),
        cache=None,
        cache_targets="clean_only" if masked else None,
        teacher="random:2x32",
        masks=masks,
        utterances=source_utterances,
        in_process=True,
    )
    found = rows(tmp_path)
    assert len(found) == 2
    assert all(("cosine_masked_layer_01" in row) == masked for row in found)


def test_the_result_names_the_cache_that_was_trained_from(
    tmp_path: Path, tiny: StudentConfig, settings: Settings, cache: Path
) -> None:
    train_on_ray(
        tiny,
        settings(max_steps=1),
        tmp_path / "run",
        layers=(1, 2),
        cache=str(cache),
        teacher="random:2x32",
        masks=MaskDraws(draws=1),
        utterances=[],
        in_process=True,
    )
    result = json.loads((tmp_path / "run" / "train.json").read_text())
    assert result["cache_fingerprint"] == Cache.open(cache).fingerprint


@pytest.mark.slow
def test_ranks_and_accumulation_change_nothing(
    tmp_path: Path, still: StudentConfig, settings: Settings, cache: Path, readers: Readers, rows: Rows
) -> None:
    train(still, settings(batch_size=1, accumulate=4), *readers, tmp_path / "run1")
    for workers, accumulate in ((2, 2), (4, 1)):
        options = settings(batch_size=1, accumulate=accumulate, max_grad_norm=1e6)
        mp.spawn(_rank, args=(workers, still, options, cache, tmp_path), nprocs=workers)
        for kind in ("train", "validation"):
            ours = rows(tmp_path / f"run{workers}", kind)
            theirs = rows(tmp_path / "run1", kind)
            assert len(ours) == len(theirs)
            for name in ("loss", "gradient_norm", "padding_waste", "cosine_masked_layer_02", "layer_01"):
                if name in ours[0]:
                    np.testing.assert_allclose([r[name] for r in ours], [r[name] for r in theirs], rtol=1e-4)
        # Gradients are exchanged once per optimiser step, not once per batch.
        assert (tmp_path / f"run{workers}" / "exchanges").read_text() == "12"


def _rank(index: int, workers: int, config: StudentConfig, options: TrainSettings, cache: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / f"store{workers}"), workers)
    torch.distributed.init_process_group("gloo", store=store, rank=index, world_size=workers)
    exchanges = 0

    def count(group: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        nonlocal exchanges
        exchanges += bucket.is_last()
        return allreduce_hook(group, bucket)

    def wrap(distiller: LayerDistiller) -> DistributedDataParallel:
        model = DistributedDataParallel(distiller)
        model.register_comm_hook(None, count)
        return model

    run = folder / f"run{workers}"
    readers = CacheReader(cache, "train"), CacheReader(cache, "validation")
    train(config, options, *readers, run, rank=Rank(index, workers), wrap=wrap)
    torch.distributed.destroy_process_group()
    if index == 0:
        (run / "exchanges").write_text(str(exchanges))


@pytest.mark.slow
def test_two_ranks_learn_from_clean_targets(
    tmp_path: Path, still: StudentConfig, settings: Settings, make_cache: Callable[..., CacheSpec], rows: Rows
) -> None:
    # Then the mask embedding is unused, and DDP would wait for its gradient.
    make_cache(tmp_path / "cache", masks=MaskDraws(draws=0))
    options = settings(batch_size=1, accumulate=2)
    mp.spawn(_rank, args=(2, still, options, tmp_path / "cache", tmp_path), nprocs=2)
    losses = [row["loss"] for row in rows(tmp_path / "run2", "validation")]
    assert losses[-1] < losses[0]


def test_rows_are_means_whatever_comes_between(
    tmp_path: Path, tiny: StudentConfig, settings: Settings, readers: Readers, rows: Rows
) -> None:
    train(tiny, settings(), *readers, tmp_path / "each")
    # Checkpoints and validations interrupt the steps that a row sums up.
    train(tiny, settings(log_every=5, checkpoint_every=2, validate_every=3), *readers, tmp_path / "fifth")
    each = losses(rows(tmp_path / "each"))
    fifth = rows(tmp_path / "fifth")
    assert [row["step"] for row in fifth] == [1, 5, 10, 12]
    expected = [np.mean(part) for part in (each[:1], each[1:5], each[5:10], each[10:])]
    np.testing.assert_allclose(losses(fifth), expected, rtol=1e-9)


@pytest.mark.parametrize("budget", [{"batch_size": 4}, {"batch_size": None, "batch_seconds": 20.0}])
def test_a_step_has_the_same_utterances_however_it_is_spread(settings: Settings, budget: dict[str, Any]) -> None:
    lengths = np.random.default_rng(0).integers(8_000, 160_000, 333)
    options = [settings(accumulate=accumulate, max_steps=40, **budget) for accumulate in (4, 2, 1)]
    plans = [TrainingPlan(lengths, option, workers) for option, workers in zip(options, (1, 2, 4), strict=True)]
    assert len({plan.total_steps for plan in plans}) == 1
    for step in range(plans[0].total_steps):
        batches = [[tuple(batch) for micro in plan.step(step)[1] for batch in micro] for plan in plans]
        assert batches[0] == batches[1] == batches[2]
        assert len(batches[0]) == 4


@pytest.mark.slow
def test_bf16_on_a_cpu_learns(tmp_path: Path, tiny: StudentConfig, settings: Settings, readers: Readers) -> None:
    result = train(tiny, settings(max_steps=60, precision="bf16"), *readers, tmp_path / "bf16")
    exact = train(tiny, settings(max_steps=60), *readers, tmp_path / "fp32")
    assert result.last_validation_loss < 0.9 * result.first_validation_loss
    assert result.first_loss != exact.first_loss
    assert result.last_validation_loss == pytest.approx(exact.last_validation_loss, rel=0.02)


def test_checkpointed_activations_change_no_loss(
    tmp_path: Path, tiny: StudentConfig, settings: Settings, readers: Readers, rows: Rows
) -> None:
    for name, on in (("plain", False), ("checkpointed", True)):
        train(tiny, settings(checkpoint_activations=on), *readers, tmp_path / name)
    assert losses(rows(tmp_path / "plain")) == losses(rows(tmp_path / "checkpointed"))


@pytest.mark.slow
def test_a_run_with_compiled_layers_goes_on_without_them(
    tmp_path: Path,
    still: StudentConfig,
    settings: Settings,
    readers: Readers,
    rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced = cache(lambda: torch.compile(student_module._run_layer, dynamic=True, backend="eager"))
    monkeypatch.setattr(student_module, "compiled_layer", traced)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train(still, settings(max_steps=3), *readers, tmp_path / "plain")
    train(still, settings(max_steps=3, compile=True), *readers, tmp_path / "compiled")
    programs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert programs > 0
    assert losses(rows(tmp_path / "compiled")) == pytest.approx(losses(rows(tmp_path / "plain")), rel=1e-4)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        distributed = tmp_path / "distributed"
        train(still, settings(max_steps=3, compile=True), *readers, distributed, wrap=DistributedDataParallel)
    finally:
        torch.distributed.destroy_process_group()
    assert losses(rows(tmp_path / "distributed")) == losses(rows(tmp_path / "compiled"))
    programs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    train(still, settings(max_steps=5), *readers, tmp_path / "compiled")
    assert len(rows(tmp_path / "compiled")) == 5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == programs


def test_clipping_bounds_the_step(
    tmp_path: Path, still: StudentConfig, settings: Settings, readers: Readers, rows: Rows
) -> None:
    norms: list[float] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    handle = register_optimizer_step_pre_hook(look)
    train(still, settings(max_grad_norm=0.01), *readers, tmp_path / "run")
    handle.remove()
    assert min(row["gradient_norm"] for row in rows(tmp_path / "run")) > 0.01
    np.testing.assert_allclose(norms, 0.01, rtol=1e-3)


def test_the_average_of_the_weights_is_what_is_kept(
    tmp_path: Path,
    still: StudentConfig,
    settings: Settings,
    readers: Readers,
    rows: Rows,
    last: Callable[[Path], dict[str, Any]],
) -> None:
    options = settings(max_steps=4, validate_every=1, ema_decay=0.75, keep_best=5)
    train(still, options, *readers, tmp_path / "average")
    train(still, options.model_copy(update={"ema_decay": None}), *readers, tmp_path / "plain")
    name = "heads.1.weight"
    assert name in dict(Student(still).named_parameters())
    weights = [
        dict(load_student(tmp_path / "plain" / "checkpoints" / f"step-{step:06d}").named_parameters())[name]
        for step in range(1, 5)
    ]
    expected = weights[0]
    for weight in weights[1:]:
        expected = 0.75 * expected + 0.25 * weight
    kept = load_student(tmp_path / "average" / "checkpoints" / "step-000004")
    torch.testing.assert_close(dict(kept.named_parameters())[name], expected)
    torch.testing.assert_close(last(tmp_path / "average")["parts"]["average"][f"module.{name}"], expected)
    assert losses(rows(tmp_path / "average")) == losses(rows(tmp_path / "plain"))
    assert rows(tmp_path / "average", "validation")[4]["loss"] != rows(tmp_path / "plain", "validation")[4]["loss"]


def test_draws_in_order(
    tmp_path: Path, tiny: StudentConfig, settings: Settings, make_cache: Callable[..., CacheSpec], rows: Rows
) -> None:
    often, seldom = (MaskPolicy(mask_prob=share, mask_length=4) for share in (0.9, 0.1))
    make_cache(tmp_path / "cache", masks=MaskDraws(policies=(often, seldom), draws=2))
    masked: list[float] = []

    class Watched(CacheReader):
        def read(self, indices: Any, draw: int | None) -> Any:
            batch = super().read(indices, draw)
            if draw is not None:
                assert batch.frame_mask is not None
                masked.append(float(batch.frame_mask.sum() / batch.num_frames.sum()))
            return batch

    readers: tuple[TargetReader, TargetReader] = (
        Watched(tmp_path / "cache", "train"),
        CacheReader(tmp_path / "cache", "validation"),
    )
    train(tiny, settings(draw_order="in_order"), *readers, tmp_path / "in_order")
    assert min(masked[:6]) > max(masked[6:])
    masked.clear()
    train(tiny, settings(), *readers, tmp_path / "rotate")
    assert min(masked[:3] + masked[6:9]) > max(masked[3:6] + masked[9:])


def test_draw_order_is_a_schedule(settings: Settings) -> None:
    lengths = np.full(9, 16_000)
    in_order = TrainingPlan(lengths, settings(draw_order="in_order", epochs=10, max_steps=None), 1)
    assert [in_order.draw(epoch, 4) for epoch in range(10)] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    rotate = TrainingPlan(lengths, settings(epochs=10, max_steps=None), 1)
    assert [rotate.draw(epoch, 4) for epoch in range(10)] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert rotate.draw(7, 0) is None
    assert rotate.draw(7, None) == 7
    with pytest.raises(ValueError, match="in_order needs train.targets cached"):
        settings(draw_order="in_order", targets="online")


def test_validation_after_each_epoch(settings: Settings) -> None:
    lengths = np.full(9, 16_000)
    plan = TrainingPlan(lengths, settings(validate_every="epoch", epochs=3, max_steps=None), 1)
    assert [step for step in range(1, 10) if plan.validates_after(step)] == [3, 6, 9]
    cut = TrainingPlan(lengths, settings(validate_every="epoch", epochs=3, max_steps=7), 1)
    assert [step for step in range(1, 8) if cut.validates_after(step)] == [3, 6, 7]
    with pytest.raises(
        ValueError, match="train.validate_every is 0; give a positive number of optimiser steps, or epoch"
    ):
        settings(validate_every=0)
    fixed = TrainingPlan(lengths, settings(validate_every=4, epochs=3, max_steps=None), 1)
    assert [step for step in range(1, 10) if fixed.validates_after(step)] == [4, 8, 9]


def test_fp16_needs_a_gpu(settings: Settings) -> None:
    with pytest.raises(ValueError, match="fp16 needs train.use_gpu true; on a CPU use fp32 or bf16"):
        settings(precision="fp16")


def test_a_student_that_does_not_fit_is_refused(
    tmp_path: Path, tiny: StudentConfig, settings: Settings, readers: Readers
) -> None:
    wide = tiny.model_copy(update={"target_dim": 48})
    with pytest.raises(
        ValueError, match=r"the student predicts 2 layers of width 48, but the targets have 2 layers of width 32"
    ):
        train(wide, settings(), *readers, tmp_path / "run")


def test_schedule() -> None:
    factors = [schedule_factor(step, 100, 0.05) for step in range(101)]
    assert factors[0] == 0
    assert factors[5] == 1 == max(factors)
    assert factors[1] == pytest.approx(0.2)
    assert factors[52] == pytest.approx(48 / 95)
    assert factors[100] == 0
    assert [schedule_factor(step, 100, 0.05, published=True) for step in range(100)] == factors[1:]


def test_weight_decay_spares_biases_only(tiny: StudentConfig, settings: Settings) -> None:
    student = Student(tiny)
    decayed, spared = make_optimizer(student, settings()).param_groups
    biases = [p for name, p in student.named_parameters() if name.endswith("bias")]
    assert {id(p) for p in spared["params"]} == {id(p) for p in biases}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)


@pytest.mark.parametrize("budget", [{"batch_size": 2}, {"batch_size": None, "batch_seconds": 2.0}])
def test_plan_counts_steps(settings: Settings, budget: dict[str, Any]) -> None:
    lengths = np.full(20, 16_000)
    assert TrainingPlan(lengths, settings(epochs=3, max_steps=None, **budget), 2).total_steps == 15
    plan = TrainingPlan(lengths, settings(epochs=3, max_steps=7, **budget), 2)
    assert (plan.total_steps, plan.epochs) == (7, 2)
    assert [plan.step(s)[0] for s in (0, 4, 5, 6)] == [0, 0, 1, 1]
