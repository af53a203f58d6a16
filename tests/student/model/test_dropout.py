"""Dropout with 16-bit random numbers: rate, scale, gradients, reproducibility."""

import pytest
import torch

from ray_distill.student.model.dropout import Dropout, dropout_mask


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_rate_and_independence(rate: float) -> None:
    torch.manual_seed(0)
    keep, scale = dropout_mask(torch.Size((1000, 1003)), rate)
    drop = ~keep
    assert scale == pytest.approx(1 / (1 - rate), rel=2e-4)
    count = drop.numel()
    deviation = (rate * (1 - rate) / count) ** 0.5
    assert float(drop.double().mean()) == pytest.approx(rate, abs=5 * deviation + 2**-17)
    flat = drop.flatten()[: count // 4 * 4].double()
    # All four parts of a 64-bit number have the same rate, and neighbours are independent.
    for lane in flat.view(-1, 4).mean(0).tolist():
        assert lane == pytest.approx(rate, abs=10 * deviation + 2**-17)
    for distance in (1, 2, 3, 4):
        both = float((flat[distance:] * flat[:-distance]).mean())
        assert both == pytest.approx(rate**2, abs=10 * deviation)


def test_values_and_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 40, requires_grad=True)
    y = Dropout(0.25)(x)
    keep = y != 0
    assert 0.6 < float(keep.float().mean()) < 0.9
    torch.testing.assert_close(y, x * keep / 0.75)
    y.backward(torch.full_like(y, 3.0))
    torch.testing.assert_close(x.grad, keep * 4.0)


def test_none_in_evaluation_and_at_rate_zero() -> None:
    x = torch.randn(100)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)


def test_a_seed_repeats_it() -> None:
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(dropout_mask(torch.Size((99,)), 0.5)[0])
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_a_rate_just_below_one_drops_almost_all() -> None:
    keep, scale = dropout_mask(torch.Size((1000,)), 1 - 1e-9)
    assert keep.float().mean() < 0.01
    assert scale == 2**16
