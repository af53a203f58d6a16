"""An identity whose gradient is scaled, for the layers that get less of the gradient of their heads."""

import torch
from torch import Tensor


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is scaled.

    The forward pass returns x itself, as a view. The plain form ``scale * x + (1 - scale) * x.detach()`` would round x, and
    needs about 1.7 times the CPU time (benchmarks/training_step/autograd_functions.py).
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None  # type: ignore[attr-defined]


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """Return x, with the gradient that flows back through it multiplied by ``scale``."""
    scaled: Tensor = _ScaleGradient.apply(x, scale)  # type: ignore[no-untyped-call]
    return scaled
