"""Front end for teachers with spectrogram patches (AST): one convolution over the log-mel spectrogram.

Shape suffixes: B batch, S samples, R rows of patches, T patches (column by column), d width.
"""

import torch
from torch import Tensor, nn

from ray_distill.teacher_cache.patch_geometry import PatchGeometry, flatten_by_column


class PatchEmbedding(nn.Module):
    """Embedding of patches with the teacher's geometry, so that each patch has a target.

    Args:
        geometry: Geometry of the patches.
        width: Width d of the encoder.
    """

    def __init__(self, geometry: PatchGeometry, width: int) -> None:
        super().__init__()
        self.geometry = geometry
        strides = geometry.frequency_stride, geometry.time_stride
        self.conv = nn.Conv2d(1, width, geometry.patch_size, strides)
        # The position convolution of the encoder runs along time; this embedding gives the frequency of a patch, masked or not.
        self.rows = nn.Parameter(torch.empty(geometry.rows, width).normal_(0.0, 0.02))

    def forward(self, waveforms_BS: Tensor, lengths_B: Tensor) -> Tensor:
        """Map waveforms (B, S) at 16 kHz and lengths (B,) to patches (B, T, d)."""
        return flatten_by_column(self.conv(self.geometry.spectrogram(waveforms_BS, lengths_B)))

    def add_row_embedding(self, x_BTd: Tensor) -> Tensor:
        """Return (B, T, d) with the embedding of its row added to each patch."""
        return x_BTd + self.rows.repeat(x_BTd.shape[1] // len(self.rows), 1)
