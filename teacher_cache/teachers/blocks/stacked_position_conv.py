"""Position embedding of data2vec-audio: stacked convolutions instead of the single one of wav2vec 2.0."""

import torch.nn.functional as F
from torch import Tensor, nn

from ray_distill.teacher_cache.precision import convolve_in_groups


class StackedPositionConv(nn.Module):
    """Convolutions without weight norm, each followed by a layer norm without parameters and GELU.

    Args:
        dim: Width D of the encoder.
        depth: Number of convolutions.
        kernel: Kernel size of each convolution, in frames.
        groups: Number of groups of each convolution.
    """

    def __init__(self, dim: int, depth: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.embed_dim = dim
        self.surplus = 1 - kernel % 2
        self.convolutions = nn.ModuleList(
            nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=groups) for _ in range(depth)
        )

    def forward(self, x_BTD: Tensor, padding: Tensor | None) -> Tensor:
        """Apply the convolutions to (B, T, D). ``padding`` is (B, T) bool; each convolution reads padded frames as zeros."""
        for convolution in self.convolutions:
            if padding is not None:
                x_BTD = x_BTD.masked_fill(padding[:, :, None], 0.0)
            x = convolve_in_groups(convolution, x_BTD.transpose(1, 2))
            x_BTD = x[..., : x.shape[-1] - self.surplus].transpose(1, 2)
            x_BTD = F.gelu(F.layer_norm(x_BTD, x_BTD.shape[-1:]))
        return x_BTD
