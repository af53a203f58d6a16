"""Normalisation over real positions: values and gradients, with slicing and with masking."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_distill.teacher_cache import frames
from ray_distill.teacher_cache.frames import group_norm_over_real

LENGTHS = [40, 13, 1]


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 40, dtype=dtype) * 2 + 3
    return (
        x.requires_grad_(),
        torch.randn(5, dtype=dtype, requires_grad=True),
        torch.randn(5, dtype=dtype).requires_grad_(),
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("row_by_row", [True, False])
def test_values_and_gradients_are_those_of_each_row_alone(
    monkeypatch: pytest.MonkeyPatch, row_by_row: bool, channels_last: bool
) -> None:
    monkeypatch.setattr(frames, "_row_by_row", lambda x: row_by_row)
    x, weight, bias = inputs()
    given = x.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else x
    found = group_norm_over_real(given, torch.tensor(LENGTHS), weight, bias)
    gradient = torch.randn_like(x)
    for row, length in enumerate(LENGTHS):
        gradient[row, :, length:] = 0
    found_gradients = torch.autograd.grad(found, (x, weight, bias), gradient)
    alone = [F.group_norm(x[row : row + 1, :, :length], 5, weight, bias) for row, length in enumerate(LENGTHS[:2])]
    # PyTorch refuses a single position. Its variance is zero, so the output is the bias.
    alone.append(bias[None, :, None] + 0 * x[2:, :, :1])
    for row, (length, expected) in enumerate(zip(LENGTHS, alone, strict=True)):
        torch.testing.assert_close(found[row, :, :length], expected[0])
    total = sum((a[0] * gradient[row, :, : a.shape[2]]).sum() for row, a in enumerate(alone))
    for ours, theirs in zip(found_gradients, torch.autograd.grad(total, (x, weight, bias)), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("row_by_row", [True, False])
def test_gradients_of_padded_positions_too(monkeypatch: pytest.MonkeyPatch, row_by_row: bool) -> None:
    # Padded positions of the output depend on real positions through the statistics.
    monkeypatch.setattr(frames, "_row_by_row", lambda x: row_by_row)
    torch.autograd.gradcheck(lambda *args: group_norm_over_real(args[0], torch.tensor(LENGTHS), *args[1:]), inputs())


def test_half_precision_is_summed_in_float32() -> None:
    x = torch.randn(2, 3, 50_000, dtype=torch.bfloat16) + 10
    found = group_norm_over_real(x, torch.tensor([50_000, 30_000]), None, None)
    assert found.dtype == torch.bfloat16
    expected = group_norm_over_real(x.double(), torch.tensor([50_000, 30_000]), None, None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)
