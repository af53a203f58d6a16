"""Transformer layer with attention-map reuse.

Shape suffixes: B batch, T frames, d width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ray_distill.student.model.attention import Attention, AttentionMap
from ray_distill.student.model.dropout import Dropout
from ray_distill.student.model.gated_linear import GatedLinear
from ray_distill.student.model.student_config import StudentConfig


class TransformerLayer(nn.Module):
    """Transformer layer, normalised after each part, or before it with ``layer_norm_first``.

    A layer with 0 heads has no attention, and one with a feed-forward width of 0 no feed-forward part. Their norms stay, except for
    norms before a part that is not there.

    Args:
        config: Architecture of the student.
        reuses: Whether this layer reuses an attention map.
        heads: Number of attention heads. Default None: ``config.encoder_attention_heads``.
        ffn_dim: Width of the feed-forward part. Default None: ``config.encoder_ffn_embed_dim``.
    """

    def __init__(
        self, config: StudentConfig, reuses: bool, heads: int | None = None, ffn_dim: int | None = None
    ) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.norm_first = config.layer_norm_first
        self.attention = None if heads == 0 else Attention(config, reuses, heads)
        # DDP needs the gradient of every parameter, so there is no norm without use.
        self.attention_norm = None if self.norm_first and self.attention is None else nn.LayerNorm(width)
        inner = config.encoder_ffn_embed_dim if ffn_dim is None else ffn_dim
        self.up = nn.Linear(width, inner) if inner else None
        self.down = GatedLinear(inner, width) if inner else None
        self.final_norm = None if self.norm_first and self.up is None else nn.LayerNorm(width)
        self.dropout = Dropout(config.dropout)
        self.activation_dropout = Dropout(config.activation_dropout)

    def forward(
        self, x_BTd: Tensor, attention_mask: Tensor | None, previous_map: AttentionMap | None
    ) -> tuple[Tensor, AttentionMap | None]:
        """Return the output (B, T, d) and the attention map; see `Attention.forward`."""
        x, norm_first = x_BTd, self.norm_first
        if self.attention is not None:
            mixed, previous_map = self.attention(
                self.attention_norm(x) if norm_first and self.attention_norm is not None else x,
                attention_mask,
                previous_map,
            )
            x = x + self.dropout(mixed)
        if not norm_first and self.attention_norm is not None:
            x = self.attention_norm(x)
        if self.up is not None and self.down is not None:
            inner = self.up(self.final_norm(x) if norm_first and self.final_norm is not None else x)
            x = x + self.dropout(self.down(self.activation_dropout(F.gelu(inner))))
        if not norm_first and self.final_norm is not None:
            x = self.final_norm(x)
        return x, previous_map
