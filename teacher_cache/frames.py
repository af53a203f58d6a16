"""Frame arithmetic: how samples become frames, which frames are padding, and normalisation that ignores padding."""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE_RATE = 16_000
"""Samples per second of every waveform in this product."""

FRAME_SAMPLES = 320
"""Samples between the starts of neighbouring frames (20 ms)."""

RECEPTIVE_FIELD = 400
"""Samples one frame sees (25 ms); shorter audio has no frame."""

Length = TypeVar("Length", int, Tensor)


def num_frames(num_samples: Length) -> Length:
    """Frames of a waveform under HuBERT's convolutions: ``(num_samples - 400) // 320 + 1``, at least 0.

    The seven convolutions of HuBERT, WavLM and wav2vec 2.0 (kernels 10,3,3,3,3,2,2; strides 5,2,2,2,2,2,2) give exactly
    this, and the published students' front ends (with extra kernel-1 layers) too.

    Args:
        num_samples: an int, or an integer tensor of any shape.
    """
    frames = (num_samples - RECEPTIVE_FIELD) // FRAME_SAMPLES + 1
    return frames.clamp(min=0) if isinstance(frames, Tensor) else max(frames, 0)


def conv_output_length(length: Length, kernels_and_strides: Sequence[tuple[int, int]]) -> Length:
    """Output length of a stack of unpadded 1-d convolutions, given as (kernel, stride) pairs; at least 0."""
    for kernel, stride in kernels_and_strides:
        length = (length - kernel) // stride + 1
    return length.clamp(min=0) if isinstance(length, Tensor) else max(length, 0)


def padding_mask(lengths: Tensor, max_length: int) -> Tensor:
    """(B, max_length) bool, True at positions at or beyond each row's length.

    Args:
        lengths: (B,) integer tensor of real lengths.
        max_length: width of the padded batch.
    """
    return torch.arange(max_length, device=lengths.device) >= lengths[:, None]


def group_norm_over_real(
    x: Tensor, lengths: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> Tensor:
    """GroupNorm with one group per channel whose statistics count real positions only.

    ``torch.nn.GroupNorm(C, C)``, as in the first convolution of HuBERT Base, averages over padding too, so an utterance's
    features depend on what it is batched with. Here they do not. With no padding the two agree to rounding.

    Args:
        x: (B, C, T) float; padded positions may hold anything finite.
        lengths: (B,) integer tensor, real positions of each row, each at least 1.
        weight: (C,) scale, or None.
        bias: (C,) shift, or None.
        eps: added to the variance; PyTorch's default.

    Returns:
        (B, C, T), of x's dtype; padded positions hold finite values of no meaning.
    """
    channels, width = x.shape[1], x.shape[2]
    if bool((lengths == width).all()):
        return F.group_norm(x, channels, weight, bias, eps)
    # Statistics in float32: half precision can't hold a sum over thousands of positions.
    values = x.float()
    real = ~padding_mask(lengths, width)[:, None, :]
    count = lengths[:, None, None].to(values.dtype)
    mean = (values * real).sum(-1, keepdim=True) / count
    centred = values - mean
    variance = (centred.square() * real).sum(-1, keepdim=True) / count
    out = centred * torch.rsqrt(variance + eps)
    if weight is not None:
        out = out * weight.float()[None, :, None]
    if bias is not None:
        out = out + bias.float()[None, :, None]
    return out.to(x.dtype)
