"""Fewer frames inside the encoder: the published time-reduction layer, and how its frames become 20 ms frames again.

Shape suffixes: B batch, T frames, R reduced frames, d width.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["fc1", "fc2", "conv1d"]


class TimeReduction(nn.Module):
    """Each ``factor`` neighbouring frames become one.

    ``fc1``: a linear layer over their concatenation. ``fc2``: two, with GELU between. ``conv1d``: a convolution with kernel and stride
    ``factor``, the same map as ``fc1`` with another initialisation. The last group is filled up with zeros, so there are
    ceil(T / factor) reduced frames; the published ``fc1`` adds a whole group of zeros where T is a multiple already, and
    its ``fc2`` can't be run.
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
            if isinstance(module, nn.Linear):  # As everything linear in the encoder.
                nn.init.normal_(module.weight, 0.0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x_BTd: Tensor, padded_BT1: Tensor | None) -> Tensor:
        """(B, T, d) → (B, R, d).

        Args:
            x_BTd: encoder frames; padding may hold anything finite.
            padded_BT1: (B, T, 1) bool, True at padding; None: none is.
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
        """Reduced frames that hold at least one real frame."""
        return (frames + self.factor - 1) // self.factor


class Upsampler(nn.Module):
    """A learnt inverse for a prediction head, as published: a transposed convolution with kernel and stride ``factor``."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.expand = nn.ConvTranspose1d(width, width, factor, factor)

    def forward(self, x_BRd: Tensor, frames: int) -> Tensor:
        """(B, R, d) → (B, frames, d)."""
        y: Tensor = self.expand(x_BRd.transpose(1, 2)).transpose(1, 2)
        return y[:, :frames]


def repeated(x_BRd: Tensor, factor: int, frames: int) -> Tensor:
    """(B, R, d) → (B, frames, d): each reduced frame stands for all the frames it was made from."""
    return x_BRd.repeat_interleave(factor, 1)[:, :frames]
