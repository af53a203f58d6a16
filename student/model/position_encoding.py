"""Position encodings: a convolution before the encoder, or relative or rotary positions in attention.

Shape suffixes: B batch, T frames, d width, H heads, h width of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_distill.teacher_cache.precision import convolve_in_groups


class PositionConv(nn.Module):
    """Convolutional position embedding with weight normalisation over the kernel, as in wav2vec 2.0.

    Args:
        width: Width d.
        kernel: Kernel of the convolution.
        groups: Groups of the convolution.
    """

    def __init__(self, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)
        nn.init.normal_(conv.weight, mean=0, std=math.sqrt(4 / (kernel * width)))
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.conv = nn.utils.parametrizations.weight_norm(conv, dim=2)
        self.surplus = 1 - kernel % 2

    def forward(self, x_BTd: Tensor, padded_BT1: Tensor | None = None) -> Tensor:
        """Map (B, T, d) to (B, T, d); padded frames must be zeros."""
        x = convolve_in_groups(self.conv, x_BTd.transpose(1, 2))
        return F.gelu(x[..., : x.shape[-1] - self.surplus]).transpose(1, 2)


class DeepPositionConv(nn.Module):
    """A sequence of smaller position convolutions, as in data2vec and the published ``pos_conv_depth``.

    Each has kernel ``max(3, kernel // depth)`` and is followed by LayerNorm without weights and GELU.

    Args:
        width: Width d.
        kernel: Kernel that is divided among the convolutions.
        groups: Groups of each convolution.
        depth: Number of convolutions.
    """

    def __init__(self, width: int, kernel: int, groups: int, depth: int) -> None:
        super().__init__()
        kernel = max(3, kernel // depth)
        self.convs = nn.ModuleList(
            nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups) for _ in range(depth)
        )
        self.surplus = 1 - kernel % 2

    def forward(self, x_BTd: Tensor, padded_BT1: Tensor | None = None) -> Tensor:
        """Map (B, T, d) to (B, T, d).

        Args:
            x_BTd: (B, T, d) float; padded frames must be zeros.
            padded_BT1: (B, T, 1) bool, True at padding, which is zeroed after each convolution; None if nothing is padded.
        """
        x = x_BTd
        for conv in self.convs:
            y = convolve_in_groups(conv, x.transpose(1, 2))
            y = y[..., : y.shape[-1] - self.surplus].transpose(1, 2)
            x = F.gelu(F.layer_norm(y, y.shape[-1:]))
            if padded_BT1 is not None:
                x = x.masked_fill(padded_BT1, 0)
        return x


def relative_table(frames: int, width: int, like: Tensor) -> Tensor:
    """Return sinusoids (2T - 1, d) of the distances T - 1 down to -(T - 1) (Transformer-XL, appendix B).

    Args:
        frames: T.
        width: d.
        like: Tensor with the device and dtype of the result.
    """
    distances = torch.arange(frames - 1, -frames, -1, device=like.device, dtype=torch.float32)
    angles = distances[:, None] * _frequencies(width, like)
    table = torch.empty(len(distances), width, device=like.device)
    table[:, 0::2], table[:, 1::2] = angles.sin(), angles.cos()[:, : width // 2]
    return table.to(like.dtype)


def relative_shift(scores: Tensor) -> Tensor:
    """Turn scores by query and distance into scores by query and key, by Transformer-XL's relative shift.

    Args:
        scores: (B, H, R, T + R - 1) float: R neighbouring queries, and all their distances to T keys, in the order of
            `relative_table`.

    Returns:
        (B, H, R, T) float; entry (i, j) is the score of query i and its distance to key j.
    """
    batch, heads, queries, distances = scores.shape
    shifted = F.pad(scores, (1, 0)).view(batch, heads, distances + 1, queries)[:, :, 1:]
    return shifted.reshape(batch, heads, queries, distances)[..., : distances + 1 - queries]


def apply_rotary(x: Tensor) -> Tensor:
    """Apply rotary position embedding (RoFormer): rotate pairs (k, k + h/2) by the frame's number times a frequency.

    Args:
        x: (B, H, T, h) float, queries or keys, with even h.

    Returns:
        (B, H, T, h) float.
    """
    width = x.shape[-1]
    angles = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * _frequencies(width, x)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., : width // 2], x[..., width // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _frequencies(width: int, like: Tensor) -> Tensor:
    """Return the frequencies 10000^(-2k / width), (ceil(width / 2),) float32, on like's device."""
    return torch.exp(torch.arange(0, width, 2, device=like.device, dtype=torch.float32) * (-math.log(10_000.0) / width))
