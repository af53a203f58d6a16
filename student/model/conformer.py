"""Conformer layer (Gulati et al. 2020) with attention-map reuse.

Shape suffixes: B batch, T frames, d width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ray_distill.student.model.attention import Attention, AttentionMap
from ray_distill.student.model.dropout import Dropout
from ray_distill.student.model.student_config import StudentConfig


class FeedForward(nn.Module):
    """LayerNorm, linear, swish, linear."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.encoder_embed_dim)
        self.up = nn.Linear(config.encoder_embed_dim, config.encoder_ffn_embed_dim)
        self.down = nn.Linear(config.encoder_ffn_embed_dim, config.encoder_embed_dim)
        self.activation_dropout = Dropout(config.activation_dropout)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BTd: Tensor) -> Tensor:
        """(B, T, d) → (B, T, d)."""
        y: Tensor = self.dropout(self.down(self.activation_dropout(F.silu(self.up(self.norm(x_BTd))))))
        return y


class Convolution(nn.Module):
    """The convolution module.

    After the depthwise convolution stands LayerNorm, where the paper has BatchNorm: its statistics would make an utterance's
    features in training depend on its batch, and a step on how it is spread over ranks.
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

    def forward(self, x_BTd: Tensor, attended: Tensor | None) -> Tensor:
        """(B, T, d) → (B, T, d); ``attended`` as `Attention.forward` takes it."""
        x = F.glu(self.gate(self.norm(x_BTd))).transpose(1, 2)
        if attended is not None:
            x = x.masked_fill(~attended[:, 0], 0)
        x = self.depthwise_norm(self.depthwise(x).transpose(1, 2))
        y: Tensor = self.dropout(self.out(F.silu(x)))
        return y


class ConformerLayer(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, LayerNorm."""

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
        self, x_BTd: Tensor, attended: Tensor | None, shared: AttentionMap | None
    ) -> tuple[Tensor, AttentionMap]:
        """As `Attention.forward`."""
        x = x_BTd + 0.5 * self.first(x_BTd)
        mixed, shared = self.attention(self.attention_norm(x), attended, shared)
        x = x + self.dropout(mixed)
        x = x + self.convolution(x, attended)
        return self.final_norm(x + 0.5 * self.second(x)), shared
