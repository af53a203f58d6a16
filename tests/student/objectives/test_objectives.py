"""Temporal relations, the cosine term, drawn hint layers, SpecAugment and initial weights."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ray_distill.student import Student, StudentConfig, distillation_loss, load_student
from ray_distill.student.objectives.layer_prediction import LayerDistiller
from ray_distill.student.objectives.temporal_relation import RelationDistiller, relation
from ray_distill.student.training.spec_augment import SpecAugment, spec_augment
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.training_loop import train
from ray_distill.student.training.validation import make_distiller
from ray_distill.teacher_cache.reader import CacheReader

from ...tiny import tiny_student

Readers = tuple[CacheReader, CacheReader]
Settings = Callable[..., TrainSettings]
Rows = Callable[..., list[dict[str, Any]]]
WAVEFORMS, LENGTHS = torch.randn(2, 6400, generator=torch.Generator().manual_seed(0)), torch.tensor([6400, 3000])
FRAMES = (19, 9)


@pytest.fixture
def bare(still: StudentConfig) -> Student:
    """A student without heads and dropout."""
    torch.manual_seed(0)
    return Student(still.model_copy(update={"heads": "none", "encoder_layers": 3})).eval()


@pytest.mark.parametrize("objective", ["prediction", "star"])
@pytest.mark.parametrize(
    "options",
    [
        {"layer_drop": 0.1, "feature_grad_mult": 0.1, "layer_grad_scale": True, "attention_reuse": "alternate"},
        {"conv_norm": "layer_norm", "conv_pos_depth": 2, "attention_reuse": "alternate", "reuse_behaviour": "released"},
        {"layer_type": "conformer", "position": "relative"},
        {"position": "rotary", "time_reduction": "fc1", "time_reduction_index": 1, "attention_reuse": "none"},
    ],
)
def test_the_host_waits_for_no_result_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, options: dict[str, Any], objective: str
) -> None:
    """The meta device replaces a GPU: it refuses each read by the host. All but its attention are the operations of a GPU."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # Meta tensors know no autocast.
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: nullcontext())
    config = tiny_student(encoder_layers=4, heads="none" if objective == "star" else "layerwise", **options)
    with torch.device("meta"):
        student = Student(config)
    distiller = make_distiller(student, settings(objective=objective, spec_augment={"time_warp_window": 2}))
    frames = config.num_frames(6400)
    waveforms, targets = torch.zeros(2, 6400, device="meta"), torch.zeros(2, 4, frames, 32, device="meta")
    mask = torch.zeros(2, frames, dtype=torch.bool, device="meta")
    distiller(waveforms, LENGTHS.tolist(), mask, targets, 28).total.backward()
    assert all(p.grad is not None for p in student.parameters())
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        distiller(waveforms, LENGTHS.to("meta"), mask, targets, 28)


@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_star_by_hand(bare: Student, kind: Any) -> None:
    targets = torch.randn(2, 3, 19, 32)
    targets[1, :, 9:] = torch.nan
    loss = RelationDistiller(bare, kind=kind, layer_weight=0.5, intra_weight=2.0)(
        WAVEFORMS, LENGTHS, None, targets, cosines=True
    )
    states = bare(WAVEFORMS, LENGTHS).hidden_states
    total, similarity = torch.tensor(0.0), torch.zeros(3)
    for row, frames in enumerate(FRAMES):
        ours, theirs = states[row, :, :frames], targets[row, :, :frames]
        for layer in range(3):
            pairs = [(layer, 0.5 / 3)] + ([(layer - 1, 2.0 / 2)] if layer else [])
            for other, weight in pairs:
                difference = ours[other] @ ours[layer].t() / 16 - theirs[other] @ theirs[layer].t() / 32
                error = difference.square() if kind == "mse" else difference.abs()
                total = total + weight * error.mean() * frames / sum(FRAMES)
            grams = ours[layer] @ ours[layer].t(), theirs[layer] @ theirs[layer].t()
            similarity[layer] += F.cosine_similarity(*grams, -1).sum().detach()
    torch.testing.assert_close(loss.total, total)
    torch.testing.assert_close(loss.per_layer.sum(), total)
    assert loss.cosines is not None
    torch.testing.assert_close(loss.cosines[1, :3].float(), similarity)
    assert loss.cosines[:, 3].tolist() == [0, sum(FRAMES)]
    loss.total.backward()
    assert all(torch.isfinite(p.grad).all() for n, p in bare.named_parameters() if n != "mask_embedding")


def test_star_reaches_zero_where_student_and_teacher_agree_up_to_a_rotation(bare: Student) -> None:
    with torch.no_grad():
        states = bare(WAVEFORMS, LENGTHS).hidden_states
        rotation = torch.linalg.qr(torch.randn(32, 32)).Q[:16]
        targets = states @ rotation * 2**0.5  # The targets are twice as wide, and the norm grows with the width.
        loss = RelationDistiller(bare)(WAVEFORMS, LENGTHS, None, targets)
        assert float(loss.total) < 1e-8
        assert float(RelationDistiller(bare)(WAVEFORMS, LENGTHS, None, targets.flip(2)).total) > 1e-3
    torch.testing.assert_close(relation(states[:, 0], states[:, 0]).mT, relation(states[:, 0], states[:, 0]))


def test_star_parts_of_a_step_can_be_summed(bare: Student) -> None:
    targets = torch.randn(2, 3, 19, 32)
    distiller = RelationDistiller(bare)
    whole = distiller(WAVEFORMS, LENGTHS, None, targets)
    parts = [
        distiller(WAVEFORMS[i : i + 1, :n], LENGTHS[i : i + 1], None, targets[i : i + 1, :, :f], sum(FRAMES)).total
        for i, (n, f) in enumerate(zip((6400, 3000), FRAMES, strict=True))
    ]
    torch.testing.assert_close(sum(parts), whole.total)
    with pytest.raises(ValueError, match="targets must be"):
        distiller(WAVEFORMS, LENGTHS, None, targets[:, :2])


@pytest.mark.parametrize("term", ["log_sigmoid", "plain"])
def test_cosine_term_by_hand_and_its_gradient(still: StudentConfig, term: str) -> None:
    torch.manual_seed(0)
    student, targets = Student(still).eval(), torch.randn(2, 2, 19, 32)
    out = student(WAVEFORMS, LENGTHS)
    errors = torch.zeros(2)
    for row, frames in enumerate(FRAMES):
        ours, theirs = out.projections[row, :, :frames], targets[row, :, :frames]
        cosines = (ours * theirs).sum(-1) / ours.norm(dim=-1) / theirs.norm(dim=-1)
        second = 1 - cosines if term == "plain" else torch.log1p(torch.exp(-cosines))
        errors = errors + ((ours - theirs).abs().mean(-1) + 0.7 * second).sum(1)
    by_hand = 0.1 * errors[0] / sum(FRAMES) + errors[1] / sum(FRAMES)
    settings: dict[str, Any] = {"kind": "l1", "cosine_weight": 0.7, "cosine_term": term}
    plain = distillation_loss(out.projections, targets, out.num_frames, **settings).total
    torch.testing.assert_close(plain, by_hand)
    plain.backward()
    # A key's bias shifts all scores of a query equally, so its gradient consists of rounding errors.
    expected = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None and "key.bias" not in n}
    student.zero_grad()
    fused = LayerDistiller(student, **settings)(WAVEFORMS, LENGTHS, None, targets).total
    torch.testing.assert_close(fused, by_hand)
    fused.backward()
    for name, gradient in expected.items():
        found = dict(student.named_parameters())[name].grad
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=2e-5 * float(gradient.abs().max()), msg=name)


def test_hints_choose_layers_and_leave_no_parameter_out(still: StudentConfig) -> None:
    torch.manual_seed(0)
    student, targets = Student(still.model_copy(update={"encoder_layers": 4})).eval(), torch.randn(2, 4, 19, 32)
    out = student(WAVEFORMS, LENGTHS)
    every = distillation_loss(out.projections, targets, out.num_frames)
    distiller = LayerDistiller(student)
    distiller.hints = [True, False, True]
    some = distiller(WAVEFORMS, LENGTHS, None, targets)
    torch.testing.assert_close(some.per_layer, every.per_layer)
    torch.testing.assert_close(some.hint, 0.1 * (every.per_layer[0] + every.per_layer[2]))
    some.total.backward()
    assert student.heads[0].weight.grad.any() and not student.heads[1].weight.grad.any()
    with pytest.raises(ValueError, match="hints has 2 entries for 3 layers below the last"):
        distillation_loss(out.projections, targets, out.num_frames, hints=[True, False])


def test_drawn_hint_layers_change_with_the_epoch_and_follow_the_seed(settings: Settings, still: StudentConfig) -> None:
    student = Student(still.model_copy(update={"encoder_layers": 12}))

    def hints(epoch: int, **changes: Any) -> Any:
        distiller = make_distiller(student, settings(**changes))
        distiller.set_progress(epoch, 0)
        return distiller.hints

    chosen = [hints(epoch, hint_layers=3) for epoch in range(200)]
    assert all(drawn is not None and len(drawn) == 11 and sum(drawn) == 3 for drawn in chosen)
    share = np.mean(np.array(chosen), 0)
    assert share.min() > 0.17 and share.max() < 0.38  # Each layer in 3 of 11 epochs.
    assert chosen == [hints(epoch, hint_layers=3) for epoch in range(200)]
    assert chosen != [hints(epoch, hint_layers=3, seed=1) for epoch in range(200)]
    assert hints(0) is None


def test_count_padding_is_the_published_sum(shared: Path) -> None:
    golden = load_file(shared / "golden" / "golden.safetensors")
    mask = golden["mask_indices"].bool()
    targets = torch.where(mask[:, None, :, None], golden["teacher_unmasked"], golden["teacher_masked"])
    lengths = (~golden["padding_mask"].bool()).sum(1)
    loss = distillation_loss(
        golden["maskhubert_batch_projections"], targets, (lengths - 400) // 320 + 1, mask, count_padding=True
    )
    torch.testing.assert_close(loss.total, golden["maskhubert_batch_loss"], rtol=0, atol=2e-5)
    real = distillation_loss(golden["maskhubert_batch_projections"], targets, (lengths - 400) // 320 + 1, mask)
    assert abs(float(real.total - loss.total)) > 1e-3


def test_counting_padding_divides_training_steps_by_more_frames(
    tmp_path: Path, still: StudentConfig, settings: Settings, readers: Readers, rows: Rows
) -> None:
    for name, counted in (("real", False), ("padded", True)):
        train(still, settings(max_steps=1, count_padding=counted), *readers, tmp_path / name)
    real, padded = (rows(tmp_path / name)[0] for name in ("real", "padded"))
    assert 0.5 < padded["loss"] / real["loss"] < 1
    assert padded["loss"] / real["loss"] == pytest.approx(1 - real["padding_waste"], abs=0.03)


def test_spec_augment_masks_real_frames_and_lets_gradients_through() -> None:
    torch.manual_seed(0)
    x, frames = torch.ones(4, 50, 30, requires_grad=True), torch.tensor([50, 40, 12, 1])
    policy = SpecAugment(time_mask_width=10, frequency_mask_width=8, fill="zero")
    for _ in range(20):
        y = spec_augment(x, frames, policy)
        for row, n in enumerate(frames.tolist()):
            torch.testing.assert_close(y[row, n:], x[row, n:])
            kept = y[row, :n].detach().bool()
            times, bands = kept.any(1), kept.any(0)
            assert torch.equal(kept, times[:, None] & bands)
            assert (~times).sum() <= 2 * 9
            assert (~bands).sum() <= 2 * 7 or not times.any()
    y.sum().backward()
    assert torch.equal(x.grad.bool(), y.bool())
    assert torch.equal(spec_augment(x, frames, SpecAugment(time_masks=0, frequency_masks=0)), x)
    bounded = SpecAugment(frequency_masks=0, time_masks=1, time_mask_share=0.1, fill="zero")
    for _ in range(20):
        assert int((spec_augment(x, frames, bounded)[0] == 0).all(1).sum()) <= 5


def test_spec_augment_fills_with_the_utterances_own_mean() -> None:
    torch.manual_seed(0)
    x, frames = torch.randn(2, 40, 30) + 5, torch.tensor([40, 15])
    x[1, 15:] = 1e6  # Padding must not matter.
    policy = SpecAugment(time_mask_width=10)
    filled = 0
    for _ in range(20):
        y = spec_augment(x, frames, policy)
        for row, n in enumerate(frames.tolist()):
            changed = y[row] != x[row]
            assert not changed[n:].any()
            filled += int(changed.sum())
            expected = x[row, :n].mean().expand(int(changed.sum()))
            torch.testing.assert_close(y[row][changed], expected)
    assert filled > 1000


def test_time_warp_moves_frames_by_no_more_than_its_window() -> None:
    torch.manual_seed(0)
    ramp = torch.arange(60.0)[None, :, None]
    policy = SpecAugment(time_warp_window=5, time_masks=0, frequency_masks=0)
    moves = [(spec_augment(ramp, torch.tensor([60]), policy) - ramp)[0, :, 0] for _ in range(20)]
    assert max(float(move.abs().max()) for move in moves) <= 6
    assert np.mean([float(move.abs().max()) for move in moves]) > 1
    assert all((move + ramp[0, :, 0]).diff().min() >= 0 for move in moves)  # The order of frames does not change.
    short = torch.randn(1, 10, 1)
    assert torch.equal(spec_augment(short, torch.tensor([10]), policy), short)


def test_spec_augment_changes_training_and_not_validation(
    still: StudentConfig, readers: Readers, settings: Settings
) -> None:
    torch.manual_seed(0)
    distiller = LayerDistiller(Student(still), spec_augment=SpecAugment())
    targets = torch.randn(2, 2, 19, 32)
    with torch.no_grad():
        losses = [float(distiller(WAVEFORMS, LENGTHS, None, targets).total) for _ in range(2)]
        distiller.eval()
        quiet = [float(distiller(WAVEFORMS, LENGTHS, None, targets).total) for _ in range(2)]
    assert losses[0] != losses[1]
    assert quiet[0] == quiet[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "changes"),
    [
        ({"heads": "none"}, {"objective": "star"}),
        ({"heads": "split", "split_heads": 2, "encoder_layers": 1}, {"loss": "l1", "cosine_weight": 1.0}),
        ({"time_reduction": "conv1d", "layer_drop": 0.2}, {"spec_augment": {}, "hint_layers": None}),
        ({"layer_type": "conformer", "depthwise_kernel": 3, "position": "rotary"}, {"mask_embedding": "frozen"}),
    ],
    ids=["star", "distilhubert", "fithubert", "conformer"],
)
def test_each_objective_learns_and_goes_on_bit_for_bit(
    tmp_path: Path,
    tiny: StudentConfig,
    settings: Settings,
    readers: Readers,
    assert_same_end: Callable[[Path, Path], None],
    student: dict[str, Any],
    changes: dict[str, Any],
) -> None:
    config = StudentConfig.model_validate(tiny.model_dump() | student)
    changed = settings(max_steps=40, validate_every=20, **changes)
    result = train(config, changed, *readers, tmp_path / "whole")
    assert result.last_validation_loss < 0.95 * result.first_validation_loss

    class Stop(Exception):
        pass

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 20:
            raise Stop

    with pytest.raises(Stop):
        train(config, changed, *readers, tmp_path / "again", on_validation=stop)
    train(config, changed, *readers, tmp_path / "again")
    assert_same_end(tmp_path / "whole", tmp_path / "again")


def test_training_starts_from_given_tensors_and_freezes_a_shared_embedding(
    tmp_path: Path, tiny: StudentConfig, settings: Settings, readers: Readers
) -> None:
    given = {
        "mask_embedding": torch.full((16,), 0.25),
        "conv_blocks.2.conv.weight": torch.full((8, 8, 3), 0.01),
    }
    save_file(given, tmp_path / "initial.safetensors")
    changed = settings(mask_embedding="teacher", max_steps=2, validate_every=2, learning_rate=1e-9)
    train(tiny, changed, *readers, tmp_path / "run", initial=tmp_path / "initial.safetensors")
    state = load_student(tmp_path / "run" / "checkpoints" / "best").state_dict()
    assert torch.equal(state["mask_embedding"], given["mask_embedding"])
    torch.testing.assert_close(state["conv_blocks.2.conv.weight"], given["conv_blocks.2.conv.weight"])
    save_file({"gate": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="unexpected tensor 'gate'"):
        train(tiny, changed, *readers, tmp_path / "other", initial=tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("student", "changes", "message"),
    [
        ({}, {"objective": "star"}, "objective star does not go with student.heads layerwise"),
        ({"heads": "none"}, {}, "prediction needs heads"),
        ({}, {"hint_layers": 2}, "hint_layers is 2, but there are 1 layers below the last"),
        ({}, {"cosine_term": "plain"}, "train.cosine_term plain does nothing without train.cosine_weight"),
        ({"heads": "split", "split_heads": 3}, {}, "the student predicts 3 layers of width 32, but the targets have 2"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path,
    tiny: StudentConfig,
    settings: Settings,
    readers: Readers,
    student: dict[str, Any],
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny.model_copy(update=student), settings(**changes), *readers, tmp_path / "run")
    assert not json.dumps(sorted(path.name for path in tmp_path.glob("run/*"))).count("checkpoints")


@pytest.mark.parametrize(
    ("objective", "key", "value", "harmless"),
    [
        ("star", "hint_layers", 1, None),
        ("star", "cosine_weight", 1.0, 0.0),
        ("star", "hint_weight", 0.0, 0.1),
        ("star", "final_weight", 2.0, 1.0),
        ("prediction", "relation_weights", (1.0, 0.5), (1.0, 1.0)),
    ],
)
def test_keys_of_the_other_objective_are_refused(
    settings: Settings, objective: str, key: str, value: Any, harmless: Any
) -> None:
    with pytest.raises(ValueError, match=f"train.{key} does nothing with train.objective {objective}: "):
        settings(objective=objective, **{key: value})
    assert getattr(settings(objective=objective, **{key: harmless}), key) == harmless
