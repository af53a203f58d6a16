"""data2vec-audio's position embedding: a stack of convolutions where wav2vec 2.0 has one."""

import torch.nn.functional as F
from torch import Tensor, nn


class StackedPositions(nn.Module):
    """Convolutions without weight norm, each followed by a layer norm without weights and GELU.

    Args:
        dim: encoder width, D.
        depth: convolutions.
        kernel: of each, in frames.
        groups: of each.
    """

    def __init__(self, dim: int, depth: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.embed_dim = dim
        self.surplus = 1 - kernel % 2
        self.convolutions = nn.ModuleList(
            nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=groups) for _ in range(depth)
        )

    def forward(self, x_BTD: Tensor, padding: Tensor | None) -> Tensor:
        """(B, T, D) → (B, T, D); padding (B, T) True at padded frames, which each convolution must see as zeros."""
        for convolution in self.convolutions:
            if padding is not None:
                x_BTD = x_BTD.masked_fill(padding[:, :, None], 0.0)
            x = convolution(x_BTD.transpose(1, 2))
            x_BTD = x[..., : x.shape[-1] - self.surplus].transpose(1, 2)
            x_BTD = F.gelu(F.layer_norm(x_BTD, x_BTD.shape[-1:]))
        return x_BTD
