"""Blocks of the front end, channels last: GELU and convolution in one step that saves only the input of the GELU, and a norm.

Shape suffixes: B batch, S positions, C channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ray_distill.teacher_cache.frames import conv_output_length, group_norm_over_real

_BLOCK_POSITIONS = 1024
"""Number of output positions that are computed at a time on a CPU, so that the operands fit into its caches."""


class ConvBlock(nn.Module):
    """GELU (except in the first block), unpadded convolution, and normalisation if any.

    The published order is convolution, normalisation, GELU. Here the GELU is moved into the next block, and the last GELU
    into the student, so that GELU and convolution are one step, which does not save the GELU's output for backward.

    Args:
        inputs: Input channels C.
        channels: Output channels C'.
        kernel, stride: Kernel and stride of the convolution.
        bias: Whether the convolution has a bias.
        norm: ``group_norm``, ``layer_norm`` or None.
        first: Whether this is the first block, which has no GELU.

    Attributes:
        input_gate: (C,) float, factor of each input channel after the GELU while a student is pruned; None otherwise.
    """

    input_gate: Tensor | None = None

    def __init__(
        self, inputs: int, channels: int, kernel: int, stride: int, bias: bool, norm: str | None, first: bool
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.first = kernel, stride, first
        self.conv = nn.Conv1d(inputs, channels, kernel, stride, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight)
        self.norm: nn.Module | None = None
        if norm == "group_norm":
            self.norm = nn.GroupNorm(channels, channels)
        elif norm == "layer_norm":
            self.norm = nn.LayerNorm(channels)

    def forward(self, x_BSC: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, S, C) and lengths (B,) to (B, S', C') and lengths (B,)."""
        weight = self.conv.weight if self.input_gate is None else self.conv.weight * self.input_gate[:, None]
        x = gelu_convolution(x_BSC, weight, self.conv.bias, self.stride, gelu=not self.first)
        lengths = conv_output_length(lengths_B, [(self.kernel, self.stride)])
        if isinstance(self.norm, nn.GroupNorm):
            norm = self.norm
            x = group_norm_over_real(x.transpose(1, 2), lengths, norm.weight, norm.bias, norm.eps).transpose(1, 2)
        elif self.norm is not None:
            x = self.norm(x)
        return x, lengths


def gelu_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, *, gelu: bool) -> Tensor:
    """Return ``conv1d(gelu(x))``, unpadded, channels last. Backward computes the GELU again.

    Args:
        x: (B, S, C) float, with S at least the kernel.
        weight: (C', C, kernel) float, as in `torch.nn.Conv1d`.
        bias: (C',) float, or None.
        stride: Stride of the convolution.
        gelu: Whether to apply the GELU.

    Returns:
        (B, (S - kernel) // stride + 1, C') in the dtype of the weight, or of autocast.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    y: Tensor = _GeluConvolution.apply(x.to(dtype), weight.to(dtype), stride, gelu)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias.to(dtype)


class _GeluConvolution(torch.autograd.Function):
    """GELU and convolution that store only x and the weight for backward, and on a CPU work block by block in its caches.

    For the whole front end on a CPU, this needs half the stored bytes and 0.83 times the CPU time of plain GELU and
    convolution (benchmarks/training_step/autograd_functions.py).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, gelu: bool) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.gelu = stride, gelu
        return (_forward_matmul if x.device.type == "cpu" else _forward_conv2d)(x, weight, stride, gelu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        compute = _backward_matmul if x.device.type == "cpu" else _backward_conv2d
        grad_x, grad_weight = compute(
            x, weight, gradient.contiguous(), ctx.stride, ctx.gelu, needs_x=ctx.needs_input_grad[0]
        )
        return grad_x, grad_weight, None, None


def _gelu_backward(gradient: Tensor, x: Tensor) -> None:
    """Turn the gradient of gelu(x) into the gradient of x, in place."""
    torch.ops.aten.gelu_backward.grad_input(gradient, x, approximate="none", grad_input=gradient)


# On a GPU: a 2-d convolution in channels_last, whose fast kernels use this layout without a copy.


def _as_image(x_BSC: Tensor) -> Tensor:
    return x_BSC.transpose(1, 2)[:, :, None]


def _kernel_as_image(weight: Tensor) -> Tensor:
    return weight[:, :, None].contiguous(memory_format=torch.channels_last)


def _forward_conv2d(x: Tensor, weight: Tensor, stride: int, gelu: bool) -> Tensor:
    activated = F.gelu(x) if gelu else x
    y = F.conv2d(_as_image(activated), _kernel_as_image(weight), stride=(1, stride))
    return y[:, :, 0].transpose(1, 2).contiguous()


def _backward_conv2d(
    x: Tensor, weight: Tensor, gradient: Tensor, stride: int, gelu: bool, *, needs_x: bool
) -> tuple[Tensor | None, Tensor]:
    activated = F.gelu(x) if gelu else x
    image, kernel, needed = _as_image(activated), _kernel_as_image(weight), [needs_x, True, False]
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        _as_image(gradient), image, kernel, None, [1, stride], [0, 0], [1, 1], False, [0, 0], 1, needed
    )
    if needs_x:
        grad_x = grad_x[:, :, 0].transpose(1, 2).contiguous()
        if gelu:
            _gelu_backward(grad_x, x)
    return grad_x, grad_weight[:, :, 0]


# On a CPU: a sum of matrix products. Taps [j, j + stride) of all windows of an utterance form the rows of a matrix without a
# copy: those of window t start at position t * stride + j.


def _tap_groups(kernel: int, stride: int) -> list[tuple[int, int]]:
    """Return (first tap, number of taps) of each product; at most ``stride`` taps, so that rows do not overlap."""
    return [(first, min(stride, kernel - first)) for first in range(0, kernel, stride)]


def _window_rows(x_SC: Tensor, first: int, taps: int, stride: int, count: int) -> Tensor:
    """Return a view (count, taps * C) of x; row t holds ``taps`` positions from t * stride + first on."""
    channels = x_SC.shape[1]
    offset = x_SC.storage_offset() + first * channels
    return x_SC.as_strided((count, taps * channels), (stride * channels, 1), offset)


def _forward_matmul(x: Tensor, weight: Tensor, stride: int, gelu: bool) -> Tensor:
    outputs, _, kernel = weight.shape
    taps_first = weight.permute(2, 1, 0).contiguous()
    count = (x.shape[1] - kernel) // stride + 1
    y = x.new_empty(x.shape[0], count, outputs)
    for x_SC, y_SC in zip(x, y, strict=True):
        for begin in range(0, count, _BLOCK_POSITIONS):
            block = y_SC[begin : begin + _BLOCK_POSITIONS]
            inputs = x_SC[begin * stride : (begin + len(block) - 1) * stride + kernel]
            activated = F.gelu(inputs) if gelu else inputs
            for first, taps in _tap_groups(kernel, stride):
                rows = _window_rows(activated, first, taps, stride, len(block))
                block.addmm_(rows, taps_first[first : first + taps].flatten(0, 1), beta=min(first, 1))
    return y


def _backward_matmul(
    x: Tensor, weight: Tensor, gradient: Tensor, stride: int, gelu: bool, *, needs_x: bool
) -> tuple[Tensor | None, Tensor]:
    _, _, kernel = weight.shape
    taps_first = weight.permute(2, 1, 0).contiguous()
    grad_taps = torch.zeros_like(taps_first)
    grad_x = torch.zeros_like(x) if needs_x else None
    for row, (x_SC, gradient_SC) in enumerate(zip(x, gradient, strict=True)):
        finished = 0
        for begin in range(0, len(gradient_SC), _BLOCK_POSITIONS):
            block = gradient_SC[begin : begin + _BLOCK_POSITIONS]
            span = slice(begin * stride, (begin + len(block) - 1) * stride + kernel)
            activated = F.gelu(x_SC[span]) if gelu else x_SC[span]
            for first, taps in _tap_groups(kernel, stride):
                group = slice(first, first + taps)
                rows = _window_rows(activated, first, taps, stride, len(block))
                grad_taps[group].flatten(0, 1).addmm_(rows.t(), block)
                if grad_x is not None:
                    rows = _window_rows(grad_x[row, span], first, taps, stride, len(block))
                    rows.addmm_(block, taps_first[group].flatten(0, 1).t())
            if grad_x is not None and gelu:
                # The next block adds only to positions from its own first one on.
                last = begin + len(block) == len(gradient_SC)
                done = slice(finished, len(x_SC) if last else span.start + len(block) * stride)
                _gelu_backward(grad_x[row, done], x_SC[done])
                finished = done.stop
    return grad_x, grad_taps.permute(2, 1, 0)
