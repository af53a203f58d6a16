"""Training from the caches of several teachers: losses, missing utterances, refusals and resuming."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from ray_distill.student import Student, StudentConfig
from ray_distill.student.objectives.several_teachers import LossBalance, SeveralDistiller, SeveralLoss, SeveralTeachers
from ray_distill.student.objectives.teacher_heads import TeacherHeads
from ray_distill.student.training.prefetch import TrainingPlan, chosen_shuffle, micro_batches
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.target_source import TeacherCache, several_readers
from ray_distill.student.training.train_settings import SeveralTeacherSettings, TrainSettings
from ray_distill.student.training.train_state import TrainState
from ray_distill.student.training.training_loop import train
from ray_distill.student.training.validation import batch_loss, loss_sizes, make_distiller, validate
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import plan_shards
from ray_distill.teacher_cache.targets.combined_caches import CombinedCaches
from ray_distill.teacher_cache.targets.crop import crop_batch
from ray_distill.teacher_cache.targets.fresh_masks import FreshMasks
from ray_distill.teacher_cache.targets.several_caches import SeveralCaches, TeacherTargets
from ray_distill.teacher_cache.targets.target_batch import CombinedTargets, SeveralTargets

from ...tiny import TEACHER
from ..conftest import MASKS

OTHER = "random:2x48"
"""A second teacher, of another width."""

Make = Callable[..., CacheSpec]
Readers = tuple[SeveralCaches, SeveralCaches]


def term(name: str, dim: int = 32, objective: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    return {"name": name, "settings": objective or {"objective": "prediction"}, "num_layers": 2, "dim": dim} | keys


@pytest.fixture
def several(settings: Callable[..., TrainSettings]) -> Callable[..., SeveralTeacherSettings]:
    """Makes settings for the teachers ``a`` (32 wide) and ``b`` (48 wide)."""

    def make(*terms: dict[str, Any], **changes: Any) -> SeveralTeacherSettings:
        chosen = terms or (term("a", weight=0.5), term("b", 48, weight=2.0))
        return SeveralTeacherSettings.model_validate(settings(**changes).model_dump() | {"terms": chosen})

    return make


@pytest.fixture
def caches(tmp_path: Path, make_cache: Make) -> tuple[Path, Path]:
    """Caches of the two teachers with the same masks and corpus."""
    make_cache(tmp_path / "a", masks=MASKS)
    make_cache(tmp_path / "b", OTHER, masks=MASKS, codec="fp16", shard_seconds=3)
    return tmp_path / "a", tmp_path / "b"


def open_both(*caches: Path, **options: Any) -> Readers:
    found = [TeacherCache(cache.name, str(cache), (1, 2), "clean_and_masked", **options) for cache in caches]
    train_reader, validation, _ = several_readers(found, MASKS, fresh=False)
    assert isinstance(train_reader, SeveralCaches) and isinstance(validation, SeveralCaches)
    return train_reader, validation


def test_a_batch_has_each_teachers_targets(caches: tuple[Path, Path]) -> None:
    both, _ = open_both(*caches)
    assert len(both) == 9 and both.layers == (1, 2, 1, 2)
    singles = [CacheReader(cache, "train") for cache in caches]
    batch = both.read([4, 0, 7], 0)
    assert isinstance(batch.coded, SeveralTargets) and batch.present is not None and bool(batch.present.all())
    for k, single in enumerate(singles):
        alone = single.read([single.ids.index(name) for name in batch.ids], 0)
        for one, other in ((alone.waveforms, batch.waveforms), (alone.frame_mask, batch.frame_mask)):
            assert one is not None and other is not None and torch.equal(one, other)
        assert torch.equal(batch.of_teacher(k).targets, alone.targets)
    assert both.bytes_read > 0


def test_local_copies_hold_the_files_of_all_caches(
    tmp_path: Path, caches: tuple[Path, Path], settings: Callable[..., TrainSettings]
) -> None:
    plain, _ = open_both(*caches)
    copied, _ = open_both(*caches, local=str(tmp_path / "local"), local_gb=1.0)
    windows = settings(shuffle="window", batch_size=2, max_steps=9)
    batches = [
        list(micro_batches(TrainingPlan.of(reader, windows, 1, TrainState()), reader, Rank(), 0, 1))
        for reader in (plain, copied)
    ]
    for one, other in zip(*batches, strict=True):
        assert one.batch.ids == other.batch.ids and torch.equal(one.batch.waveforms, other.batch.waveforms)
        for k in range(2):
            assert torch.equal(one.batch.of_teacher(k).targets, other.batch.of_teacher(k).targets)
    assert copied.read_ahead is not None and plain.read_ahead is None
    copies = {path.stem for path in (tmp_path / "local").glob("*.parquet")}
    files = [path for cache in caches for path in cache.rglob("*/*.parquet") if "commits" not in path.parts]
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert len(copies) > 2 and copies <= digests
    # Both caches together must fit, or files would be fetched again and again.
    room = sum(path.stat().st_size for path in files) / 1e9
    small, _ = open_both(*caches, local=str(tmp_path / "small"), local_gb=0.6 * room)
    with pytest.raises(ValueError, match=r"cache.local_gb has room for a part of the cache only"):
        chosen_shuffle(settings(shuffle="full"), small)


def test_the_loss_is_the_sum_of_the_teachers_losses(
    caches: tuple[Path, Path],
    still: StudentConfig,
    settings: Callable[..., TrainSettings],
    several: Callable[..., SeveralTeacherSettings],
) -> None:
    both, _ = open_both(*caches)
    singles = [CacheReader(cache, "train") for cache in caches]
    batch = both.read([0, 3, 5], 0)
    together = several(count_padding=False)
    distiller = make_distiller(Student(still), together, both)
    found = batch_loss(distiller, batch, together, 200.0, cosines=True)
    assert isinstance(distiller, SeveralDistiller) and isinstance(found, SeveralLoss)
    losses = []
    for k, single in enumerate(singles):
        student = Student(still.model_copy(update={"target_dim": single.dim}))
        weights = distiller.student.state_dict()
        if k == 1:
            heads = distiller.parts[1].predictors[0]
            assert isinstance(heads, TeacherHeads)
            weights |= heads.state_dict()
        student.load_state_dict(weights)
        alone = single.read([single.ids.index(name) for name in batch.ids], 0)
        losses.append(batch_loss(make_distiller(student, settings(), single), alone, settings(), 200.0, cosines=True))
    assert found.total.item() == (0.5 * losses[0].total + 2.0 * losses[1].total).item()
    assert found.hint.item() == (0.5 * losses[0].hint + 2.0 * losses[1].hint).item()
    assert found.final.item() == (0.5 * losses[0].final + 2.0 * losses[1].final).item()
    assert found.teachers().tolist() == [loss.total.item() for loss in losses]
    assert torch.equal(found.per_layer, torch.cat([loss.per_layer for loss in losses]))
    assert torch.equal(found.agreement(), torch.cat([loss.agreement() for loss in losses], -1))


def test_an_utterance_that_a_teacher_lacks_is_left_out_for_it_only(
    tmp_path: Path,
    make_cache: Make,
    source_utterances: list[Any],
    still: StudentConfig,
    several: Callable[..., SeveralTeacherSettings],
) -> None:
    make_cache(tmp_path / "a", masks=MASKS)
    make_cache(tmp_path / "whole" / "b", OTHER, masks=MASKS)
    lost = next(utterance for utterance in source_utterances if utterance.split == "train")
    Path(lost.path).write_bytes(b"this is not audio")
    make_cache(tmp_path / "b", OTHER, masks=MASKS)
    whole, _ = open_both(tmp_path / "a", tmp_path / "whole" / "b")
    lacking, validation = open_both(tmp_path / "a", tmp_path / "b")
    assert lacking.ids == whole.ids, "the order of the others does not change"
    assert validation.read([0], None).present is not None
    indices = [lacking.ids.index(lost.id), 1, 5]
    batch = lacking.read(indices, 0)
    assert batch.present is not None and batch.present.tolist() == [[True, False], [True, True], [True, True]]
    chosen = several()
    distiller = make_distiller(Student(still), chosen, lacking).train()
    # Whatever stands in the place of the missing targets must not count.
    assert isinstance(batch.coded, SeveralTargets)
    columns = batch.coded.parts[1].columns
    for _, codes in columns:
        codes[0] = 255  # NaN as float32
    found = batch_loss(distiller, batch, chosen, 200.0, cosines=True)
    found.total.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in distiller.parameters())
    expected = batch_loss(distiller, whole.read(indices, 0), chosen, 200.0, cosines=True)
    assert isinstance(found, SeveralLoss) and isinstance(expected, SeveralLoss)
    assert found.parts[0].total.item() == expected.parts[0].total.item()
    assert torch.equal(found.parts[0].agreement(), expected.parts[0].agreement())
    rest = batch_loss(distiller, whole.read(indices[1:], 0), chosen, 200.0)
    assert found.parts[1].total.item() == pytest.approx(rest.parts[1].total.item(), rel=1e-6)  # type: ignore[attr-defined]
    only = batch_loss(distiller, lacking.read(indices[:1], 0), chosen, 200.0)
    assert only.parts[1].total.item() == 0 and only.total.isfinite()  # type: ignore[attr-defined]
    distiller.zero_grad(set_to_none=True)
    only.total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in distiller.predictors.parameters()), "DDP waits for each"
    cropped = crop_batch(lacking.read(indices, 0), 6_000, 0, 0)
    assert isinstance(cropped.coded, SeveralTargets) and cropped.present is not None
    assert {part.shape[2] for part in cropped.coded.parts} == {int(cropped.num_frames.max())}
    assert cropped.present.equal(batch.present) and batch_loss(distiller, cropped, chosen).total.isfinite()


def test_a_validation_counts_the_frames_that_a_teacher_has(
    caches: tuple[Path, Path], still: StudentConfig, several: Callable[..., SeveralTeacherSettings]
) -> None:
    _, validation = open_both(*caches)
    chosen = several()
    distiller = make_distiller(Student(still), chosen, validation)
    whole = validate(distiller, validation, chosen, Rank(), constant=True)
    assert whole["loss"] == pytest.approx(0.5 * whole["teacher_loss_a"] + 2 * whole["teacher_loss_b"])
    assert whole["teacher_loss_b"] == pytest.approx(0.1 * whole["layer_b_01"] + whole["layer_b_02"])
    assert {"cosine_unmasked_layer_a_01", "constant_layer_b_02"} < whole.keys()
    last = int(validation.num_samples.argmin())
    validation._rows[last, 1] = -1
    part = validate(distiller, validation, chosen, Rank(), constant=True)
    assert (
        part["teacher_loss_a"] == whole["teacher_loss_a"]
        and part["constant_layer_a_01"] == whole["constant_layer_a_01"]
    )
    frames = validation.num_frames
    one = batch_loss(distiller.eval(), validation.read([last], None), chosen, 1.0)
    assert part["teacher_loss_b"] > 0 and one.parts[1].total.item() == 0  # type: ignore[attr-defined]
    ratio = part["teacher_loss_b"] / whole["teacher_loss_b"]
    assert ratio == pytest.approx(1, abs=0.2) and ratio != frames.sum() / (frames.sum() - frames[last])
    validation._rows[:, 1] = -1
    none = validate(distiller, validation, chosen, Rank())
    assert none["teacher_loss_b"] == none["layer_b_01"] == 0 and none["loss"] == 0.5 * none["teacher_loss_a"]


@pytest.mark.parametrize("balance", ["variance", "uncertainty"])
def test_balances(
    caches: tuple[Path, Path], still: StudentConfig, several: Callable[..., SeveralTeacherSettings], balance: str
) -> None:
    both, validation = open_both(*caches)
    chosen = several(balance=balance)
    distiller = make_distiller(Student(still), chosen, both, validation)
    assert isinstance(distiller, SeveralDistiller)
    batch = both.read([0, 3, 5], 0)
    frames = float(batch.num_frames.sum())
    loss = batch_loss(distiller, batch, chosen)
    a, b = loss.teachers().tolist()
    if balance == "variance":
        plain = validate(distiller, validation, chosen, Rank())
        constants = validate(
            make_distiller(Student(still), several(), both), validation, several(), Rank(), constant=True
        )
        sizes = [0.1 * constants[f"constant_layer_{name}_01"] + constants[f"constant_layer_{name}_02"] for name in "ab"]
        assert loss.total.item() == pytest.approx(0.5 * a / sizes[0] + 2 * b / sizes[1])
        assert plain["loss"] == pytest.approx(
            0.5 * plain["teacher_loss_a"] / sizes[0] + 2 * plain["teacher_loss_b"] / sizes[1]
        )
        return
    bias = distiller.balance.log_variance_bias
    assert bias is not None
    with torch.no_grad():
        bias.copy_(torch.tensor([0.3, -0.2]))
    expected = 0.5 * (np.exp(-0.3) * a + 0.3) + 2 * (np.exp(0.2) * b - 0.2)
    assert batch_loss(distiller, batch, chosen).total.item() == pytest.approx(expected, rel=1e-5)
    halves = [both.read(rows, 0) for rows in ([0, 3], [5])]
    parts = [batch_loss(distiller, half, chosen, frames).total.item() for half in halves]
    assert sum(parts) == pytest.approx(expected, rel=1e-5), "the log variances count once in a step"
    assert distiller.row_fields() == pytest.approx(
        {"teacher_weight_a": 0.5 * np.exp(-0.3), "teacher_weight_b": 2 * np.exp(0.2)}
    )


@pytest.mark.parametrize(("present", "size"), [(True, "0.0"), (False, "nan")])
def test_targets_without_variance_are_refused(
    several: Callable[..., SeveralTeacherSettings], present: bool, size: str
) -> None:
    """The second teacher's targets are the same everywhere, or there are none."""
    objective = several(balance="variance").chosen_objective
    assert isinstance(objective, SeveralTeachers)
    parts = [
        SimpleNamespace(targets=values) for values in (torch.arange(128.0).view(1, 2, 2, 32), torch.ones(1, 2, 2, 48))
    ]
    batch = SimpleNamespace(
        num_frames=torch.tensor([2]), present=torch.tensor([[True, present]]), of_teacher=parts.__getitem__
    )
    batch.moved = lambda device: batch
    reader: Any = SimpleNamespace(
        num_samples=np.array([16_000]),
        teachers=[TeacherTargets(name, (1, 2), dim, None) for name, dim in (("a", 32), ("b", 48))],
        read=lambda indices, draw: batch,
    )
    with pytest.raises(ValueError, match=f"but that of teacher b is {size}; choose weights or uncertainty"):
        loss_sizes(objective, reader, torch.device("cpu"))


def test_the_sizes_of_losses_are_kept_in_checkpoints() -> None:
    balance = LossBalance("variance", 2)
    balance.load_state_dict(LossBalance("variance", 2, [2.0, 4.0]).state_dict())
    assert balance.factors(2) == [0.5, 0.25]


def test_a_teacher_takes_part_between_its_steps(
    caches: tuple[Path, Path], still: StudentConfig, several: Callable[..., SeveralTeacherSettings]
) -> None:
    both, _ = open_both(*caches)
    chosen = several(term("a"), term("b", 48, start_step=2, stop_step=4))
    distiller = make_distiller(Student(still), chosen, both).train()
    assert isinstance(distiller, SeveralDistiller)
    weights = []
    for step in range(5):
        distiller.set_progress(0, step)
        weights.append(distiller.row_fields()["teacher_weight_b"])
    assert weights == [0, 0, 1, 1, 0]
    assert list(distiller.eval().row_fields().values()) == [1, 1], "a validation counts all teachers"


def test_a_resumed_training_is_bit_equal(
    tmp_path: Path,
    caches: tuple[Path, Path],
    tiny: StudentConfig,
    several: Callable[..., SeveralTeacherSettings],
    rows: Callable[..., list[dict[str, Any]]],
    assert_same_end: Callable[[Path, Path], None],
) -> None:
    chosen = several(
        term("a"), term("b", 48, start_step=2), balance="uncertainty", max_steps=6, validate_every=3, ema_decay=0.9
    )
    train(tiny, chosen, *open_both(*caches), tmp_path / "whole")
    train(tiny, chosen.model_copy(update={"max_steps": 6}), *open_both(*caches), tmp_path / "other")
    assert_same_end(tmp_path / "whole", tmp_path / "other")

    class StoppedError(Exception):
        pass

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(tiny, chosen, *open_both(*caches), tmp_path / "run", on_validation=stop)
    train(tiny, chosen, *open_both(*caches), tmp_path / "run")
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    mine, theirs = (
        [{k: v for k, v in row.items() if "loss" in k or "weight" in k} for row in rows(tmp_path / name)]
        for name in ("run", "whole")
    )
    assert mine == theirs and {"teacher_loss_a", "teacher_loss_b", "teacher_weight_a"} < mine[0].keys()
    assert [row["teacher_weight_b"] > 0 for row in rows(tmp_path / "run")] == [False, False, True, True, True, True]


def test_caches_that_do_not_fit_together_are_refused(
    tmp_path: Path, caches: tuple[Path, Path], make_cache: Make
) -> None:
    make_cache(tmp_path / "c", OTHER, masks=MASKS.model_copy(update={"seed": 5}))
    with pytest.raises(CacheError, match="teachers a and c .* have other mask draws, but an utterance has one mask"):
        open_both(caches[0], tmp_path / "c")
    readers = {cache.name: CacheReader(cache, "train") for cache in caches}
    readers["b"].num_frames = readers["b"].num_frames * 2
    with pytest.raises(
        CacheError, match="has .* frames in the cache of teacher a, but .*; patches of a spectrogram are not mapped"
    ):
        SeveralCaches(readers)


def test_the_order_is_that_of_the_largest_plan_and_audio_is_read_once(
    caches: tuple[Path, Path], tmp_path: Path, cache_spec: Make, source_utterances: list[Any]
) -> None:
    larger = CacheReader(caches[1], "train")
    some = [utterance for utterance in source_utterances if utterance.id != larger.ids[0]]
    spec = cache_spec(masks=MASKS)
    build_cache(tmp_path / "c", spec, plan_shards(some, 5), TEACHER, teacher_name=TEACHER, workers=None)
    smaller = CacheReader(tmp_path / "c", "train")
    both = SeveralCaches({"c": smaller, "b": larger})
    assert both.ids == list(larger.ids)
    reads = [(k, members.tolist(), audio) for k, members, _, audio in both.reads([0, 3, 4])]
    assert reads == [(0, [1, 2], True), (1, [0], True), (1, [1, 2], False)]
    # The files of the first cache and of the second are other files, whatever their numbers.
    assert both.shards[0] == smaller.shards.max() + 1 + larger.shards[0]
    assert both.shards[1:].max() <= smaller.shards.max()


@pytest.mark.parametrize(("aggregate", "other"), [("average", "random:3x32"), ("concatenate", OTHER)])
def test_aggregates_by_hand(
    caches: tuple[Path, Path],
    make_cache: Make,
    tmp_path: Path,
    still: StudentConfig,
    settings: Callable[..., TrainSettings],
    aggregate: Any,
    other: str,
) -> None:
    second = caches[1]
    if aggregate == "average":
        second = tmp_path / "c"
        make_cache(second, other, masks=MASKS)
    found = [
        TeacherCache(cache.name, str(cache), (1, 2), "clean_and_masked", weight=weight)
        for cache, weight in ((caches[0], 1.0), (second, 3.0 if aggregate == "average" else 1.0))
    ]
    reader, validation, source = several_readers(found, MASKS, fresh=False, aggregate=aggregate)
    assert isinstance(reader, CombinedCaches) and reader.layers == (1, 2) and not reader.teachers
    assert source.key != several_readers(found, MASKS, fresh=False)[2].key
    batch = reader.read([4, 0], 0)
    a, b = (CacheReader(cache, "train", (1, 2)).read([4, 0], 0).targets for cache in (caches[0], second))
    by_hand = 0.25 * a + 0.75 * b if aggregate == "average" else torch.cat([a, b], -1)
    assert torch.equal(batch.targets, by_hand) and isinstance(batch.coded, CombinedTargets)
    assert batch.coded.shape == batch.targets.shape and reader.dim == by_hand.shape[-1] and batch.present is None
    chosen = settings(aggregate=aggregate)
    student = Student(still.model_copy(update={"target_dim": reader.dim}))
    loss = batch_loss(make_distiller(student, chosen, reader), batch, chosen)
    out = student(batch.waveforms, batch.lengths, batch.frame_mask)
    errors = [
        (out.projections - by_hand).square().mean(-1)[row, :, : int(count)]
        for row, count in enumerate(batch.num_frames)
    ]
    per_layer = sum(error.sum(-1) for error in errors) / batch.num_frames.sum()
    assert loss.total.item() == pytest.approx((0.1 * per_layer[0] + per_layer[1]).item(), rel=1e-5)
    cropped = crop_batch(batch, 6_000, 0, 0)
    assert cropped.targets.shape[2] == int(cropped.num_frames.max())
    assert f"targets={tuple(by_hand.shape)}" in repr(batch) and batch.to("cpu").targets.equal(by_hand)
    # Utterances that a teacher lacks have no such target.
    assert isinstance(validation, CombinedCaches)
    readers = {name: CacheReader(cache, "train", (1, 2)) for name, cache in zip("ab", (caches[0], second), strict=True)}
    gone = readers["b"].ids[0]
    readers["b"].ids = readers["b"].ids.take(np.arange(1, len(readers["b"])))
    for values in ("num_samples", "num_frames"):
        setattr(readers["b"], values, getattr(readers["b"], values)[1:])
    some = CombinedCaches(readers, [1, 1] if aggregate == "average" else None)
    assert some.ids == reader.ids[: reader.ids.index(gone)] + reader.ids[reader.ids.index(gone) + 1 :]
    places = [reader.ids.index(name) for name in some.ids]
    for values in ("num_samples", "num_frames", "shards"):
        assert getattr(some, values).tolist() == getattr(reader, values)[places].tolist()
    assert some._rows[:, 0].tolist() == [readers["a"].ids.index(name) for name in some.ids]
    assert some._rows[:, 1].tolist() == [readers["b"].ids.index(name) for name in some.ids]
    if aggregate == "concatenate":
        with pytest.raises(
            CacheError, match="a and b have widths 32 and 48, so their layers have no average; set train"
        ):
            CombinedCaches(readers, [1, 1])
    readers["b"].layers = (2,)
    with pytest.raises(CacheError, match="2 and 1 layers of the teachers a and b can't be combined; choose as many"):
        CombinedCaches(readers, None)


def test_teachers_with_different_objectives(
    tmp_path: Path,
    make_cache: Make,
    still: StudentConfig,
    settings: Callable[..., TrainSettings],
    several: Callable[..., SeveralTeacherSettings],
    rows: Callable[..., list[dict[str, Any]]],
) -> None:
    none = MASKS.model_copy(update={"draws": 0})
    make_cache(tmp_path / "a", OTHER, masks=none, codec="units:8")
    make_cache(tmp_path / "b", masks=none)
    found = [TeacherCache(name, str(tmp_path / name), (1, 2), "clean_and_masked") for name in "ab"]
    train_reader, validation, _ = several_readers(found, none, fresh=True)
    units = {"objective": "units", "unit_dim": 4, "unmasked_weight": 0.5}
    chosen = several(term("a", 48, units), term("b", weight=3.0), masks="fresh", max_steps=2, validate_every=2)
    objective = chosen.chosen_objective
    assert isinstance(objective, SeveralTeachers) and objective.owner == 1, "the student's own heads predict b"
    distiller = make_distiller(Student(still), chosen, train_reader)
    assert isinstance(distiller, SeveralDistiller)
    batch = train_reader.read([0, 3, 5], 7)
    loss = batch_loss(distiller, batch, chosen, 200.0, cosines=True)
    alone = settings(masks="fresh")
    single = FreshMasks(CacheReader(tmp_path / "b", "train"), none)
    expected = batch_loss(make_distiller(distiller.student, alone, single), batch.of_teacher(1), alone, 200.0)
    a, b = loss.teachers().tolist()
    assert b == expected.total.item() and loss.total.item() == pytest.approx(a + 3 * b)
    train(still, chosen, train_reader, validation, tmp_path / "run")
    row = rows(tmp_path / "run", "validation")[-1]
    assert {"accuracy_masked_layer_a_01", "cosine_masked_layer_b_02", "teacher_loss_a"} < row.keys()
    assert "accuracy_masked_layer_b_01" not in row and "cosine_masked_layer_a_01" not in row
    with pytest.raises(ValueError, match="teachers.c: the student has 2 layers, but it is to learn 3 of this teacher"):
        other = several(term("b"), term("c") | {"num_layers": 3}).chosen_objective
        other.check_targets(still, 5, 32)


def test_split_heads_of_several_teachers(
    caches: tuple[Path, Path], still: StudentConfig, several: Callable[..., SeveralTeacherSettings]
) -> None:
    config = still.model_copy(update={"heads": "split", "split_heads": 2, "layer_grad_scale": True})
    readers = {
        name: CacheReader(cache, "train", layers)
        for name, cache, layers in zip("ab", caches, ((1, 2), (2,)), strict=True)
    }
    both = SeveralCaches(readers)
    chosen = several(term("a"), term("b", 48) | {"num_layers": 1})
    chosen.check_student(config)
    chosen.chosen_objective.check_targets(config, 3, 32)
    distiller = make_distiller(Student(config), chosen, both)
    loss = batch_loss(distiller, both.read([0, 1], 0), chosen)
    loss.total.backward()
    assert loss.per_layer.shape == (3,) and all(p.grad is not None for p in distiller.predictors.parameters())
    for heads in ({}, {"heads": "layerwise", "head_dim": 5}):
        reduced = config.model_copy(update={"time_reduction": "fc1", "time_reduction_index": 1} | heads)
        with pytest.raises(
            ValueError, match="^teachers: heads of several teachers that are split or have a head_dim do not go with"
        ):
            chosen.check_student(reduced)


@pytest.mark.parametrize("head_dim", [None, 6])
def test_heads_on_some_layers_of_several_teachers(
    caches: tuple[Path, Path],
    still: StudentConfig,
    several: Callable[..., SeveralTeacherSettings],
    head_dim: int | None,
) -> None:
    config = still.model_copy(update={"head_layers": (2,), "head_dim": head_dim, "layer_grad_scale": True})
    readers = {name: CacheReader(cache, "train", (2,)) for name, cache in zip("ab", caches, strict=True)}
    both = SeveralCaches(readers)
    chosen = several(term("a") | {"num_layers": 1}, term("b", 48) | {"num_layers": 1})
    chosen.check_student(config)
    chosen.chosen_objective.check_targets(config, 2, 32)
    distiller = make_distiller(Student(config), chosen, both)
    loss = batch_loss(distiller, both.read([0, 1], 0), chosen)
    loss.total.backward()
    assert loss.per_layer.shape == (2,) and all(p.grad is not None for p in distiller.parameters())
    with pytest.raises(
        ValueError, match="teachers.b: the student has 1 layers with heads, but it is to learn 2 of this"
    ):
        several(term("a") | {"num_layers": 1}, term("b", 48)).chosen_objective.check_targets(config, 3, 32)


@pytest.mark.slow
def test_ranks_and_accumulation_change_nothing(
    tmp_path: Path,
    make_cache: Make,
    source_utterances: list[Any],
    still: StudentConfig,
    several: Callable[..., SeveralTeacherSettings],
    rows: Callable[..., list[dict[str, Any]]],
) -> None:
    make_cache(tmp_path / "a", masks=MASKS)
    # With batches of one utterance, a rank then has batches without any target of b.
    Path(next(one for one in source_utterances if one.split == "train").path).write_bytes(b"this is not audio")
    make_cache(tmp_path / "b", OTHER, masks=MASKS)
    keys = {"balance": "uncertainty", "batch_size": 1, "max_steps": 6, "validate_every": 3}
    train(still, several(**keys, accumulate=2), *open_both(tmp_path / "a", tmp_path / "b"), tmp_path / "one")
    mp.spawn(_rank, args=(still, several(**keys), tmp_path), nprocs=2)
    names = (
        "loss",
        "teacher_loss_a",
        "teacher_loss_b",
        "teacher_weight_b",
        "gradient_norm",
        "cosine_masked_layer_b_02",
    )
    for kind in ("train", "validation"):
        ours, theirs = rows(tmp_path / "two", kind), rows(tmp_path / "one", kind)
        assert len(ours) == len(theirs)
        for name in (name for name in names if name in theirs[0]):
            np.testing.assert_allclose([r[name] for r in ours], [r[name] for r in theirs], rtol=1e-4, atol=1e-6)


def _rank(index: int, config: StudentConfig, chosen: SeveralTeacherSettings, folder: Path) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=index, world_size=2)
    readers = open_both(folder / "a", folder / "b")
    train(config, chosen, *readers, folder / "two", rank=Rank(index, 2), wrap=DistributedDataParallel)
    torch.distributed.destroy_process_group()
