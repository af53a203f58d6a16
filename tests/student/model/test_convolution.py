"""GELU and convolution in one step, by matrix products and by conv2d, compared with PyTorch's two steps."""

import pytest
import torch
import torch.nn.functional as F

from ray_distill.student.model import convolution
from ray_distill.student.model.convolution import gelu_convolution

# (channels in, out, kernel, stride, positions), with and without a remainder after the last window.
SHAPES = [
    (1, 5, 10, 5, 333),
    (3, 4, 1, 1, 50),
    (3, 4, 3, 2, 61),
    (3, 4, 3, 2, 60),
    (3, 4, 2, 2, 61),
    (2, 3, 7, 3, 100),
    (2, 3, 1, 2, 9),
]


@pytest.mark.parametrize("way", ["matmul", "conv2d"])
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int, int, int], gelu: bool, way: str
) -> None:
    monkeypatch.setattr(convolution, "_BLOCK_POSITIONS", 7)
    for direction in ("forward", "backward"):
        chosen = getattr(convolution, f"_{direction}_{way}")
        monkeypatch.setattr(convolution, f"_{direction}_matmul", chosen)
    inputs, outputs, kernel, stride, positions = shape
    torch.manual_seed(0)
    x = torch.randn(2, positions, inputs, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(outputs, inputs, kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(outputs, dtype=torch.float64, requires_grad=True)
    found = gelu_convolution(x, weight, bias, stride, gelu=gelu)
    expected = F.conv1d((F.gelu(x) if gelu else x).transpose(1, 2), weight, bias, stride).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, (x, weight, bias), gradient),
        torch.autograd.grad(expected, (x, weight, bias), gradient),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_waveforms_need_no_gradient() -> None:
    weight = torch.randn(4, 1, 10, requires_grad=True)
    gelu_convolution(torch.randn(2, 100, 1), weight, None, 5, gelu=False).sum().backward()
    assert weight.grad is not None and weight.grad.all()


def test_autocast_decides_the_type_and_the_weight_keeps_its_own() -> None:
    x, weight = torch.randn(2, 50, 3, requires_grad=True), torch.randn(4, 3, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = gelu_convolution(x, weight, None, 2, gelu=True)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), gelu_convolution(x, weight, None, 2, gelu=True), rtol=0.02, atol=0.1)
    y.float().sum().backward()
    assert x.grad is not None and weight.grad is not None
    assert x.grad.dtype == weight.grad.dtype == torch.float32
