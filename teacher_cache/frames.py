"""Frame arithmetic: numbers of frames, durations, padding masks, and normalisation that ignores padding."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SAMPLE_RATE = 16_000
"""Sampling rate of all waveforms in Hz."""

FRAME_SAMPLES = 320
"""Number of samples between the starts of neighbouring frames (20 ms)."""

FRAME_RATE = Fraction(SAMPLE_RATE, FRAME_SAMPLES)
"""Frames per second of students, of masks and of most teachers: 50."""

RECEPTIVE_FIELD = 400
"""Number of samples in the receptive field of a frame (25 ms). Shorter audio has no frames."""

Length = TypeVar("Length", int, Tensor)


def num_frames(num_samples: Length) -> Length:
    """Return HuBERT's number of frames of a waveform: ``(num_samples - 400) // 320 + 1``, at least 0.

    This is exact for the seven convolutions of HuBERT, WavLM and wav2vec 2.0 (kernels 10,3,3,3,3,2,2; strides 5,2,2,2,2,2,2)
    and for the published students, which add layers with kernel size 1.

    Args:
        num_samples: An int, or an integer tensor of any shape.
    """
    frames = (num_samples - RECEPTIVE_FIELD) // FRAME_SAMPLES + 1
    return frames.clamp(min=0) if isinstance(frames, Tensor) else max(frames, 0)


def shown_audio(seconds: float) -> str:
    """Return a duration of audio in hours, such as ``0.17 h``, or below a tenth of an hour in minutes or seconds."""
    if seconds >= 360:
        return f"{seconds / 3600:.2f} h"
    return f"{seconds / 60:.2g} min" if seconds >= 60 else f"{seconds:.2g} s"


def conv_output_length(length: Length, kernels_and_strides: Sequence[tuple[int, int]]) -> Length:
    """Return the output length of unpadded 1-d convolutions, given as (kernel, stride) pairs. It is at least 0."""
    for kernel, stride in kernels_and_strides:
        length = (length - kernel) // stride + 1
    return length.clamp(min=0) if isinstance(length, Tensor) else max(length, 0)


def padding_mask(lengths: Tensor, max_length: int) -> Tensor:
    """Return a (B, max_length) bool tensor that is True at padding.

    Args:
        lengths: (B,) integer tensor of real lengths.
        max_length: Length of the padded batch.
    """
    return torch.arange(max_length, device=lengths.device) >= lengths[:, None]


def group_norm_over_real(
    x: Tensor, lengths: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> Tensor:
    """Apply a GroupNorm with one group per channel whose statistics use real positions only.

    ``torch.nn.GroupNorm(C, C)``, as in the first convolution of HuBERT Base, also averages over padding, so the features of an
    utterance depend on its batch. Here they do not. Without padding the two agree up to rounding.

    Args:
        x: (B, C, T) float. Values at padding must be finite.
        lengths: (B,) integer tensor, number of real positions of each row, at least 1.
        weight: (C,) scale, or None.
        bias: (C,) shift, or None.
        eps: Value added to the variance. Default 1e-5, PyTorch's.

    Returns:
        (B, C, T) of x's dtype. Values at padding are finite and meaningless.
    """
    channels = x.new_ones(x.shape[1], dtype=torch.float32)
    scale = channels if weight is None else weight
    shift = torch.zeros_like(channels) if bias is None else bias
    out: Tensor = _GroupNormOverReal.apply(x, lengths, scale, shift, eps)  # type: ignore[no-untyped-call]
    return out


def _row_by_row(x: Tensor) -> bool:
    """Return whether to slice rows to their lengths instead of masking. On a GPU, slicing would synchronise with the CPU."""
    return x.device.type == "cpu"


def _moments(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (B, C, 1) variance and mean of a (B, C, T) tensor over real positions.

    They are float64 for float64 input and float32 otherwise, because half precision can't sum thousands of positions.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if not _row_by_row(x):
        real = ~padding_mask(lengths, x.shape[2])[:, None]
        count = lengths[:, None, None]
        mean = (x.to(wide) * real).sum(-1, keepdim=True) / count
        return ((x.to(wide) - mean) * real).square().sum(-1, keepdim=True) / count, mean
    moments = []
    for row, length in zip(x, lengths.tolist(), strict=True):
        values = row[:, :length].to(wide)
        mean = values.mean(-1, keepdim=True)
        centred = values - mean
        mean = mean + centred.mean(-1, keepdim=True)  # Correct for rounding.
        moments.append(torch.stack([centred.square_().mean(-1, keepdim=True), mean]))
    variance, mean = torch.stack(moments, 1)
    return variance, mean


class _GroupNormOverReal(torch.autograd.Function):
    """Autograd function that saves only x for backward, without a mask, a float32 copy or a centred copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        variance, mean = _moments(x, lengths)
        deviation = torch.sqrt(variance + eps)
        ctx.save_for_backward(x, lengths, weight, mean, deviation)
        return (x - mean).div_(deviation).mul_(weight[:, None]).add_(bias[:, None]).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:
        x, lengths, weight, mean, deviation = ctx.saved_tensors
        gradient, values = gradient.to(mean.dtype), x.to(mean.dtype)
        # Sums over positions of dy and of dy * normalised(x).
        plain = gradient.sum(-1, keepdim=True)
        normalised = ((gradient * values).sum(-1, keepdim=True) - mean * plain) / deviation
        scale = weight.to(mean.dtype)[:, None] / deviation
        grad_x = gradient * scale
        # The gradient through the statistics is slope * x + offset, at real positions only.
        slope = -scale / deviation * normalised / lengths[:, None, None]
        offset = -scale * plain / lengths[:, None, None] - slope * mean
        if not _row_by_row(x):
            padded = padding_mask(lengths, x.shape[2])[:, None]
            grad_x += torch.addcmul(offset, values, slope).masked_fill_(padded, 0)
        else:
            for row, length in enumerate(lengths.tolist()):
                grad_x[row, :, :length].addcmul_(values[row, :, :length], slope[row]).add_(offset[row])
        return (
            grad_x.to(x.dtype),
            None,
            normalised.sum((0, 2)).to(weight.dtype),
            plain.sum((0, 2)).to(weight.dtype),
            None,
        )
