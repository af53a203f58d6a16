"""Transformer layer with attention-map reuse.

Shape suffixes: B batch, T frames, d width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ray_distill.student.model.attention import Attention, AttentionMap
from ray_distill.student.model.dropout import Dropout
from ray_distill.student.model.student_config import StudentConfig


class TransformerLayer(nn.Module):
    """Transformer layer, normalised after each part, or before it with ``layer_norm_first``."""

    def __init__(self, config: StudentConfig, reuses: bool) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.norm_first = config.layer_norm_first
        self.attention = Attention(config, reuses)
        self.attention_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, config.encoder_ffn_embed_dim)
        self.down = nn.Linear(config.encoder_ffn_embed_dim, width)
        self.final_norm = nn.LayerNorm(width)
        self.dropout = Dropout(config.dropout)
        self.activation_dropout = Dropout(config.activation_dropout)

    def forward(
        self, x_BTd: Tensor, attention_mask: Tensor | None, previous_map: AttentionMap | None
    ) -> tuple[Tensor, AttentionMap]:
        """Return the output (B, T, d) and the attention map; see `Attention.forward`."""
        mixed, previous_map = self.attention(
            self.attention_norm(x_BTd) if self.norm_first else x_BTd, attention_mask, previous_map
        )
        x = x_BTd + self.dropout(mixed)
        if not self.norm_first:
            x = self.attention_norm(x)
        inner = self.activation_dropout(F.gelu(self.up(self.final_norm(x) if self.norm_first else x)))
        x = x + self.dropout(self.down(inner))
        return x if self.norm_first else self.final_norm(x), previous_map
