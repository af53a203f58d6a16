"""Conformer layer (Gulati et al. 2020) with attention-map reuse.

Shape suffixes: B batch, T frames, d width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ray_distill.student.model.attention import Attention, AttentionMap
from ray_distill.student.model.dropout import Dropout
from ray_distill.student.model.student_config import StudentConfig


class FeedForward(nn.Module):
    """Feed-forward module: LayerNorm, linear, swish, linear."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.encoder_embed_dim)
        self.up = nn.Linear(config.encoder_embed_dim, config.encoder_ffn_embed_dim)
        self.down = nn.Linear(config.encoder_ffn_embed_dim, config.encoder_embed_dim)
        self.activation_dropout = Dropout(config.activation_dropout)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BTd: Tensor) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        y: Tensor = self.dropout(self.down(self.activation_dropout(F.silu(self.up(self.norm(x_BTd))))))
        return y


class Convolution(nn.Module):
    """Convolution module.

    The depthwise convolution is followed by LayerNorm. The paper has BatchNorm, whose statistics would make an utterance's
    features in training depend on its batch, and a step on the number of ranks.
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        width, kernel = config.encoder_embed_dim, config.depthwise_kernel
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width, bias=False)
        self.depthwise_norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BTd: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Map (B, T, d) to (B, T, d); ``attention_mask`` as for `Attention.forward`."""
        x = F.glu(self.gate(self.norm(x_BTd))).transpose(1, 2)
        if attention_mask is not None:
            x = x.masked_fill(~attention_mask[:, 0], 0)
        x = self.depthwise_norm(self.depthwise(x).transpose(1, 2))
        y: Tensor = self.dropout(self.out(F.silu(x)))
        return y


class ConformerLayer(nn.Module):
    """Conformer layer: half a feed-forward module, attention, convolution, half a feed-forward module, LayerNorm."""

    def __init__(self, config: StudentConfig, reuses: bool) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.first = FeedForward(config)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(config, reuses)
        self.dropout = Dropout(config.dropout)
        self.convolution = Convolution(config)
        self.second = FeedForward(config)
        self.final_norm = nn.LayerNorm(width)

    def forward(
        self, x_BTd: Tensor, attention_mask: Tensor | None, previous_map: AttentionMap | None
    ) -> tuple[Tensor, AttentionMap]:
        """Return the output (B, T, d) and the attention map; see `Attention.forward`."""
        x = x_BTd + 0.5 * self.first(x_BTd)
        mixed, previous_map = self.attention(self.attention_norm(x), attention_mask, previous_map)
        x = x + self.dropout(mixed)
        x = x + self.convolution(x, attention_mask)
        return self.final_norm(x + 0.5 * self.second(x)), previous_map
