"""Dropout that keeps one byte an entry for backward on a CPU, as PyTorch's does on a GPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Dropout(nn.Module):
    """As `torch.nn.Dropout`. On a CPU the rate is the nearest multiple of 2^-16, as in `kept`.

    Args:
        rate: probability of zeroing an entry, from 0 to below 1.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; the same."""
        if x.device.type != "cpu" or not self.training or not self.rate:
            return F.dropout(x, self.rate, self.training)
        y: Tensor = _Dropout.apply(x, self.rate)  # type: ignore[no-untyped-call]
        return y


def kept(shape: torch.Size, rate: float) -> tuple[Tensor, float]:
    """Which entries to keep, bool of that shape on the CPU, and what to multiply them by.

    Random bits come four to a number, since drawing entries one by one takes several times as long. The rate is therefore a
    multiple of 2^-16 (0.1 becomes 0.100006), which the factor accounts for.
    """
    count, threshold = shape.numel(), min(round(rate * 2**16), 2**16 - 1)
    numbers = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return numbers.view(torch.int16)[:count].view(shape) >= threshold - 2**15, 1 / (1 - threshold / 2**16)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float) -> Tensor:
        keep, scale = kept(x.shape, rate)
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return (x * scale).mul_(keep)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        incoming: Tensor = gradient * ctx.scale
        return incoming.mul_(keep), None
