"""The distillation loss computed by hand (weights, masks, padding, normaliser), and `LayerDistiller` compared with it."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ray_distill.student import Student, distillation_loss
from ray_distill.student.objectives.layer_loss import head_loss
from ray_distill.student.objectives.layer_prediction import LayerDistiller, LayerPrediction

from ...tiny import tiny_student

# Two layers, D = 2; row 0 has three real frames, row 1 one.
PROJECTIONS = torch.zeros(2, 2, 3, 2)
TARGETS = torch.tensor(
    [
        [[[1.0, 1], [2, 0], [0, 2]], [[3.0, 1], [0, 0], [1, 1]]],
        [[[2.0, 2], [9, 9], [9, 9]], [[0.0, 2], [9, 9], [9, 9]]],
    ]
)
FRAMES = torch.tensor([3, 1])
MASK = torch.tensor([[True, False, False], [True, False, False]])


def test_squared_error_by_hand() -> None:
    loss = distillation_loss(PROJECTIONS, TARGETS, FRAMES, MASK)
    # Mean over D of each real frame. Layer 1: 1, 2, 2 | 4. Layer 2: 5, 0, 1 | 2. Four frames.
    torch.testing.assert_close(loss.per_layer, torch.tensor([9 / 4, 8 / 4]))
    torch.testing.assert_close(loss.hint, torch.tensor(0.1 * 9 / 4))
    torch.testing.assert_close(loss.final, torch.tensor(8 / 4))
    torch.testing.assert_close(loss.total, torch.tensor(0.1 * 9 / 4 + 8 / 4))
    assert (float(loss.mask_hint), float(loss.unmask_hint)) == (5 / 4, 4 / 4)
    assert (float(loss.mask_final), float(loss.unmask_final)) == (7 / 4, 1 / 4)


def test_absolute_error_by_hand() -> None:
    loss = distillation_loss(PROJECTIONS, TARGETS, FRAMES, kind="l1", hint_weight=0.5, final_weight=2.0)
    # Layer 1: 1, 1, 1 | 2. Layer 2: 2, 0, 1 | 1.
    torch.testing.assert_close(loss.per_layer, torch.tensor([5 / 4, 4 / 4]))
    torch.testing.assert_close(loss.total, torch.tensor(0.5 * 5 / 4 + 2 * 4 / 4))
    assert loss.mask_hint is None


def test_hint_sums_over_all_layers_below_the_last() -> None:
    loss = distillation_loss(torch.zeros(1, 4, 1, 1), torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1), torch.tensor([1]))
    assert float(loss.hint) == pytest.approx(0.1 * (1 + 4 + 9))
    assert float(loss.final) == 16


@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_padded_frames_count_neither_in_the_loss_nor_in_gradients(kind: str) -> None:
    torch.manual_seed(0)
    projections = torch.randn(2, 3, 7, 4, requires_grad=True)
    targets, frames = torch.randn(2, 3, 7, 4), torch.tensor([7, 4])
    changed = targets.clone()
    changed[1, :, 4:] = 1e4
    loss = distillation_loss(projections, targets, frames, kind=kind).total
    assert loss == distillation_loss(projections, changed, frames, kind=kind).total
    # Equal to the mean of the utterances' own losses, weighted by their frames.
    apart = [
        distillation_loss(projections[i : i + 1, :, :n], targets[i : i + 1, :, :n], frames[i : i + 1], kind=kind).total
        for i, n in enumerate([7, 4])
    ]
    torch.testing.assert_close(loss, (apart[0] * 7 + apart[1] * 4) / 11)
    loss.backward()
    assert not projections.grad[1, :, 4:].any()
    assert projections.grad[1, :, :4].all()


@pytest.mark.parametrize("normalizer", [10, 10.0, torch.tensor(10)])
def test_normalizer_lets_parts_of_a_step_be_summed(normalizer: float | torch.Tensor) -> None:
    torch.manual_seed(0)
    projections, targets = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4)
    frames = torch.tensor([5, 2, 3])
    whole = distillation_loss(projections, targets, frames)
    parts = [
        distillation_loss(projections[rows], targets[rows], frames[rows], normalizer=normalizer).total
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole.total)


def test_masked_and_unmasked_shares_add_up_and_the_mask_changes_nothing_else() -> None:
    torch.manual_seed(0)
    projections, targets = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    frames = torch.tensor([5, 3])
    mask = torch.rand(2, 5) < 0.5
    loss, unsplit = (distillation_loss(projections, targets, frames, m) for m in (mask, None))
    torch.testing.assert_close(loss.total, unsplit.total)
    torch.testing.assert_close(loss.mask_hint + loss.unmask_hint, loss.per_layer[:-1].sum())
    torch.testing.assert_close(loss.mask_final + loss.unmask_final, loss.per_layer[-1])


def test_half_precision_is_summed_in_float32() -> None:
    projections = torch.full((1, 2, 100, 64), 200.0, dtype=torch.float16)
    loss = distillation_loss(projections, torch.full_like(projections, -200.0), torch.tensor([100]))
    assert loss.total.dtype == torch.float32
    assert float(loss.final) == 160_000  # beyond float16's 65504


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": TARGETS[:, :1]}, r"\(2, 2, 3, 2\) and targets \(2, 1, 3, 2\) must have one shape"),
        ({"num_frames": torch.tensor([3])}, r"num_frames must be \(2,\), not \(1,\)"),
        ({"frame_mask": MASK[:1]}, r"frame_mask must be \(2, 3\), not \(1, 3\)"),
        ({"kind": "l2"}, "'l2' is not known; known kinds: mse, l1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    arguments = {"projections": PROJECTIONS, "targets": TARGETS, "num_frames": FRAMES} | changes
    with pytest.raises(ValueError, match=message):
        distillation_loss(**arguments)


def test_masked_and_unmasked_frames_are_weighted_apart() -> None:
    torch.manual_seed(0)
    projections, targets = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    frames = torch.tensor([5, 3])
    mask = torch.rand(2, 5) < 0.5
    plain = distillation_loss(projections, targets, frames, mask, hint_weight=1.0)
    assert plain.mask_hint is not None and plain.mask_final is not None
    masked, total = plain.mask_hint + plain.mask_final, plain.total
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.5, 2.0)):
        loss = distillation_loss(projections, targets, frames, mask, hint_weight=1.0, frame_weights=weights)
        torch.testing.assert_close(loss.total, weights[0] * masked + weights[1] * (total - masked))
        unmasked = distillation_loss(projections, targets, frames, None, hint_weight=1.0, frame_weights=weights)
        torch.testing.assert_close(unmasked.total, total)


TINY = tiny_student(encoder_layers=3, target_dim=16)
WAVEFORMS, LENGTHS = torch.randn(3, 6400, generator=torch.Generator().manual_seed(0)), torch.tensor([6400, 4321, 3000])
FRAME_MASK = torch.rand(3, 19, generator=torch.Generator().manual_seed(1)) < 0.5


def tiny(target_dim: int = 16) -> tuple[Student, Tensor]:
    torch.manual_seed(0)
    student = Student(TINY.model_copy(update={"target_dim": target_dim})).eval()
    return student, torch.randn(3, 3, 19, target_dim)


def gradients(student: Student) -> dict[str, Tensor]:
    """Return the gradients and clear them. Those of keys' biases are left out: they consist of rounding errors."""
    found = {n: p.grad for n, p in student.named_parameters() if p.grad is not None and "key.bias" not in n}
    student.zero_grad()
    return found


def assert_same_loss(found: object, expected: object) -> None:
    for field in fields(expected):  # type: ignore[arg-type]
        if field.name != "cosines":
            ours, theirs = getattr(found, field.name), getattr(expected, field.name)
            assert (ours is None) == (theirs is None), field.name
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, msg=lambda m, name=field.name: f"{name}: {m}")


@pytest.mark.parametrize("mask", [FRAME_MASK, None])
@pytest.mark.parametrize("normalizer", [None, 50.0, torch.tensor(50)])
@pytest.mark.parametrize("kind", ["mse", "l1"])
@pytest.mark.parametrize("frame_weights", [(1.0, 1.0), (2.0, 0.0)])
@pytest.mark.parametrize("target_dim", [16, 12])  # 12: as wide as the student, so without heads
def test_a_distiller_gives_the_loss_and_gradients_of_the_two_apart(
    kind: str,
    target_dim: int,
    normalizer: float | Tensor | None,
    mask: Tensor | None,
    frame_weights: tuple[float, float],
) -> None:
    student, targets = tiny(target_dim)
    weights: dict[str, Any] = {"hint_weight": 0.3, "final_weight": 2.0, "frame_weights": frame_weights}
    out = student(WAVEFORMS, LENGTHS, mask)
    expected = distillation_loss(
        out.projections, targets, out.num_frames, mask, kind=kind, normalizer=normalizer, **weights
    )
    (expected.total * 3).backward()
    expected_gradients = gradients(student)
    # Targets may hold any values at padded frames.
    targets = targets.clone()
    targets[1, :, 13:] = torch.nan
    found = LayerDistiller(student, kind=kind, **weights)(WAVEFORMS, LENGTHS, mask, targets, normalizer)
    (found.total * 3).backward()
    found_gradients = gradients(student)
    assert_same_loss(found, expected)
    assert found.cosines is None
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            found_gradients[name], gradient, rtol=0, atol=2e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_each_part_of_a_distillers_loss_has_gradients_of_its_own() -> None:
    student, targets = tiny()
    out = student(WAVEFORMS, LENGTHS)
    for part in ("hint", "final"):
        getattr(distillation_loss(out.projections, targets, out.num_frames), part).backward(retain_graph=True)
        expected = gradients(student)
        getattr(LayerDistiller(student)(WAVEFORMS, LENGTHS, None, targets), part).backward()
        for name, gradient in gradients(student).items():
            torch.testing.assert_close(gradient, expected.get(name, torch.zeros_like(gradient)), rtol=1e-4, atol=1e-6)


def test_a_distiller_without_gradients_gives_the_same_loss() -> None:
    student, targets = tiny()
    distiller = LayerDistiller(student)
    with torch.no_grad():
        found = distiller(WAVEFORMS, LENGTHS, FRAME_MASK, targets)
    assert not found.total.requires_grad
    assert_same_loss(found, distiller(WAVEFORMS, LENGTHS, FRAME_MASK, targets))


@pytest.mark.parametrize("mask", [FRAME_MASK, None])
def test_cosines_of_masked_and_unmasked_frames(mask: Tensor | None) -> None:
    student, targets = tiny()
    found = LayerDistiller(student)(WAVEFORMS, LENGTHS, mask, targets, cosines=True).cosines
    assert found.dtype == torch.float64 and not found.requires_grad
    with torch.no_grad():
        out = student(WAVEFORMS, LENGTHS, mask)
    for kind in (0, 1):
        frames = 0
        sums = torch.zeros(3, dtype=torch.float64)
        for row, count in enumerate(out.num_frames.tolist()):
            for frame in range(count):
                if (mask is not None and bool(mask[row, frame])) == (kind == 0):
                    frames += 1
                    for layer in range(3):
                        pair = out.projections[row, layer, frame], targets[row, layer, frame]
                        sums[layer] += float(F.cosine_similarity(*pair, dim=0))
        assert found[kind, -1] == frames
        torch.testing.assert_close(found[kind, :-1], sums, rtol=0, atol=1e-4)


def test_a_distiller_in_half_precision_sums_in_float32() -> None:
    student, targets = tiny()
    expected = LayerDistiller(student)(WAVEFORMS, LENGTHS, None, targets)
    expected.total.backward()
    expected_gradients = gradients(student)
    for size in (1.0, 1e4):  # 1e4: squares beyond float16's 65504, summed over frames.
        with torch.autocast("cpu", torch.bfloat16):
            found = LayerDistiller(student)(WAVEFORMS, LENGTHS, None, (targets * size).half())
        assert found.total.dtype == torch.float32 and torch.isfinite(found.total)
        found.total.backward()
        found_gradients = gradients(student)
        assert all(torch.isfinite(gradient).all() for gradient in found_gradients.values())
        if size == 1.0:
            torch.testing.assert_close(found.total, expected.total, rtol=0.01, atol=0)
            ours, theirs = (torch.cat([g.flatten() for g in x.values()]) for x in (found_gradients, expected_gradients))
            assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_gradients_summed_over_many_frames_do_not_overflow_float16() -> None:
    head = torch.nn.Linear(2, 4)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    x, targets = torch.ones(1, 30_000, 2), torch.full((1, 30_000, 4), 5.0)
    with torch.autocast("cpu", torch.float16):
        total, _, _ = head_loss(x, head, targets, torch.zeros(1, 30_000, dtype=torch.bool), "mse", False)
    (total / 30_000).backward()
    # Errors of -5 times inputs of 1 sum to -150,000, beyond float16.
    torch.testing.assert_close(head.weight.grad, torch.full((4, 2), -2.5), rtol=1e-2, atol=0)


def test_a_loss_that_is_not_finite_shows_in_the_gradients() -> None:
    # By such gradients all ranks of a training learn that a step must be skipped.
    for kind in ("mse", "l1"):
        student, targets = tiny()
        targets[0, 1, 2, 3] = torch.nan
        loss = LayerDistiller(student, kind=kind)(WAVEFORMS, LENGTHS, None, targets).total
        assert torch.isnan(loss)
        (loss * loss.detach()).backward()
        assert not all(torch.isfinite(gradient).all() for gradient in gradients(student).values())


@pytest.mark.parametrize(
    ("shape", "message"),
    [((3, 2, 19, 16), r"must be \(B, P, T, D\) = \(3, 3, 19, 16\)"), ((3, 3, 18, 16), r"not \(3, 3, 18, 16\)")],
)
def test_targets_that_do_not_fit_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerDistiller(tiny()[0])(WAVEFORMS, LENGTHS, None, torch.zeros(shape))


def test_weights_of_frames_without_masks_are_refused() -> None:
    objective = LayerPrediction(frame_weights=(1.0, 0.0))
    for draws, fresh in ((2, False), (0, True)):
        objective.check_source("pca", cached=True, draws=draws, fresh_masks=fresh)
    with pytest.raises(ValueError, match=r"train\.frame_weights does nothing without masks; set masks\.draws"):
        objective.check_source("pca", cached=True, draws=0, fresh_masks=False)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'l2' is not known"):
        LayerDistiller(tiny()[0], kind="l2")  # type: ignore[arg-type]


def _rank(index: int, world: int, meeting: str, results: str) -> None:
    dist.init_process_group("gloo", init_method=meeting, rank=index, world_size=world)
    student, targets = tiny()
    model = DistributedDataParallel(LayerDistiller(student))
    rows = slice(0, 1) if index == 0 else slice(1, 3)
    loss = model(WAVEFORMS[rows], LENGTHS[rows], FRAME_MASK[rows], targets[rows], 41.0, cosines=True)
    (loss.total * world).backward()
    torch.save((loss.total.detach(), gradients(student)), f"{results}/{index}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ddp_wraps_it(tmp_path: Path) -> None:
    meeting = f"file://{tmp_path}/meeting"
    torch.multiprocessing.spawn(_rank, (2, meeting, str(tmp_path)), nprocs=2)
    student, targets = tiny()
    loss = LayerDistiller(student)(WAVEFORMS, LENGTHS, FRAME_MASK, targets, 41.0)
    loss.total.backward()
    expected = gradients(student)
    (first, ranks), (second, others) = (torch.load(tmp_path / str(index)) for index in range(2))
    torch.testing.assert_close(first + second, loss.total)
    for name, gradient in expected.items():
        torch.testing.assert_close(ranks[name], gradient, rtol=1e-4, atol=1e-6)
        assert torch.equal(ranks[name], others[name])
