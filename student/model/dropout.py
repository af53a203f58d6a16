"""Dropout on a CPU with a mask of one byte per entry, as PyTorch's has on a GPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Dropout(nn.Module):
    """`torch.nn.Dropout`, with less time and memory on a CPU. There the rate is rounded as in `dropout_mask`.

    The compiler gets PyTorch's dropout, since it can't trace the hand-written one.

    Args:
        rate: Probability of zeroing an entry, from 0 to below 1.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def extra_repr(self) -> str:
        return f"{self.rate:g}"

    def forward(self, x: Tensor) -> Tensor:
        """Return x with entries zeroed in training mode; any shape."""
        if x.device.type != "cpu" or not self.training or not self.rate or torch.compiler.is_compiling():
            return F.dropout(x, self.rate, self.training)
        y: Tensor = _ByteMaskDropout.apply(x, self.rate)  # type: ignore[no-untyped-call]
        return y


def dropout_mask(shape: torch.Size, rate: float, generator: torch.Generator | None = None) -> tuple[Tensor, float]:
    """Draw a dropout mask on the CPU.

    Each 64-bit random number gives four 16-bit ones, because drawing entries one by one takes several times as long. The
    rate is therefore rounded to a multiple of 2^-16 (0.1 becomes 0.100006), which the factor accounts for.

    Args:
        shape: Shape of the mask.
        rate: Probability of zeroing an entry.
        generator: Source of the random numbers, on the CPU. Default: PyTorch's.

    Returns:
        The mask, bool, True where an entry is kept, and the factor by which kept entries are multiplied.
    """
    count, threshold = shape.numel(), min(round(rate * 2**16), 2**16 - 1)
    numbers = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return numbers.view(torch.int16)[:count].view(shape) >= threshold - 2**15, 1 / (1 - threshold / 2**16)


class _ByteMaskDropout(torch.autograd.Function):
    """Dropout that stores one byte per entry for backward, where PyTorch's dropout on a CPU stores a float.

    On a CPU, this needs a quarter of the stored bytes and two thirds of the CPU time of `torch.nn.functional.dropout`
    (benchmarks/training_step/autograd_functions.py).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float) -> Tensor:
        mask, scale = dropout_mask(x.shape, rate)
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return (x * scale).mul_(mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        scaled: Tensor = gradient * ctx.scale
        return scaled.mul_(mask), None
