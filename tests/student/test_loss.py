"""The distillation loss by hand: weights, masks, padding, what it is divided by."""

import pytest
import torch

from student import distillation_loss

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
    # Equal to the mean over utterances alone, weighted by their frames.
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
