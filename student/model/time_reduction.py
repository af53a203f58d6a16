"""Time reduction: the published layer that merges frames inside the encoder, and its inverses.

Shape suffixes: B batch, T frames, R reduced frames, d width.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["fc1", "fc2", "conv1d"]


class TimeReduction(nn.Module):
    """Merge groups of ``factor`` neighbouring frames into one frame each.

    ``fc1`` is a linear layer over the concatenated frames. ``fc2`` is two linear layers with GELU between them. ``conv1d`` is
    a convolution with kernel and stride ``factor``: the same map as ``fc1`` with another initialisation. The last group is
    padded with zeros, which gives ceil(T / factor) reduced frames. The published ``fc1`` adds a whole group of zeros if T is
    already a multiple, and the published ``fc2`` fails when it is run.

    Args:
        width: Width d.
        kind: ``fc1``, ``fc2`` or ``conv1d``.
        factor: Number of frames in a group.
    """

    def __init__(self, width: int, kind: Kind, factor: int) -> None:
        super().__init__()
        self.factor = factor
        wide = width * factor
        self.reduce: nn.Module
        if kind == "conv1d":
            self.reduce = nn.Conv1d(width, width, factor, factor)
        elif kind == "fc1":
            self.reduce = nn.Linear(wide, width)
        else:
            self.reduce = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, width))
        for module in self.reduce.modules():
            if isinstance(module, nn.Linear):  # As all linear layers in the encoder.
                nn.init.normal_(module.weight, 0.0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x_BTd: Tensor, padded_BT1: Tensor | None) -> Tensor:
        """Map (B, T, d) to (B, R, d).

        Args:
            x_BTd: (B, T, d) float, with any finite values at padding.
            padded_BT1: (B, T, 1) bool, True at padding; None if nothing is padded.
        """
        x = x_BTd if padded_BT1 is None else x_BTd.masked_fill(padded_BT1, 0)
        x = F.pad(x, (0, 0, 0, -x.shape[1] % self.factor))
        reduced: Tensor
        if isinstance(self.reduce, nn.Conv1d):
            reduced = self.reduce(x.transpose(1, 2)).transpose(1, 2)
        else:
            reduced = self.reduce(x.reshape(x.shape[0], -1, x.shape[2] * self.factor))
        return reduced

    def num_frames(self, frames: Tensor) -> Tensor:
        """Return the number of reduced frames with at least one real frame, for numbers of frames of any shape."""
        return (frames + self.factor - 1) // self.factor


class Upsampler(nn.Module):
    """A learned inverse before a prediction head, as published: a transposed convolution with kernel and stride ``factor``."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.expand = nn.ConvTranspose1d(width, width, factor, factor)

    def forward(self, x_BRd: Tensor, frames: int) -> Tensor:
        """Map (B, R, d) to (B, frames, d)."""
        y: Tensor = self.expand(x_BRd.transpose(1, 2)).transpose(1, 2)
        return y[:, :frames]


def repeat_frames(x_BRd: Tensor, factor: int, frames: int) -> Tensor:
    """Map (B, R, d) to (B, frames, d) by repeating each reduced frame for all the frames it was made from."""
    return x_BRd.repeat_interleave(factor, 1)[:, :frames]
