"""A student's front end for a teacher that sees patches of a spectrogram (AST): one convolution over the log-mel spectrogram.

Shape suffixes: B batch, S samples, R rows of patches, T patches (column by column), d width.
"""

import torch
from torch import Tensor, nn

from ray_distill.teacher_cache.patch_geometry import PatchGeometry, flatten_by_column


class PatchEmbedding(nn.Module):
    """Patches of the teacher's own geometry, so that each has a target."""

    def __init__(self, geometry: PatchGeometry, width: int) -> None:
        super().__init__()
        self.geometry = geometry
        strides = geometry.frequency_stride, geometry.time_stride
        self.conv = nn.Conv2d(1, width, geometry.patch_size, strides)
        # The encoder's position convolution runs along time; that a patch is of high or low frequency, masked or not, is told here.
        self.rows = nn.Parameter(torch.empty(geometry.rows, width).normal_(0.0, 0.02))

    def forward(self, waveforms_BS: Tensor, lengths_B: Tensor) -> Tensor:
        """(B, S) at 16 kHz, (B,) → (B, T, d)."""
        return flatten_by_column(self.conv(self.geometry.spectrogram(waveforms_BS, lengths_B)))

    def with_rows(self, x_BTd: Tensor) -> Tensor:
        """(B, T, d) with each patch's row added."""
        return x_BTd + self.rows.repeat(x_BTd.shape[1] // len(self.rows), 1)
