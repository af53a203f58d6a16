"""Transformer layers with layer norms before the blocks, as in Whisper's encoder and AST (a ViT).

Shapes: B utterances, T frames, D width.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class PreNormLayer(nn.Module):
    """One Transformer layer. Parameters have the names of transformers' Whisper.

    Args:
        dim: Width D.
        heads: Number of attention heads.
        ffn_dim: Inner width of the feed-forward block.
        biases: Those of the projections ``q``, ``k``, ``v`` that have a bias. Whisper's keys have none. Default all.
        eps: Value added to the variance in layer norms. Default 1e-5.
    """

    def __init__(self, dim: int, heads: int, ffn_dim: int, biases: str = "qkv", eps: float = 1e-5) -> None:
        super().__init__()
        self.heads = heads
        self.self_attn = nn.ModuleDict({f"{part}_proj": nn.Linear(dim, dim, bias=part in biases) for part in "qkv"})
        self.self_attn["out_proj"] = nn.Linear(dim, dim)
        self.self_attn_layer_norm = nn.LayerNorm(dim, eps)
        self.fc1 = nn.Linear(dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, dim)
        self.final_layer_norm = nn.LayerNorm(dim, eps)

    def forward(self, x_BTD: Tensor, attended: Tensor | None) -> Tensor:
        """Apply the layer to (B, T, D). ``attended`` is (B, 1, 1, T) bool, False at padding, or None for no padding."""
        attention = self.self_attn
        x = self.self_attn_layer_norm(x_BTD)
        query, key, value = (attention[f"{p}_proj"](x).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in "qkv")
        mixed = F.scaled_dot_product_attention(query, key, value, attended)
        x_BTD = x_BTD + attention["out_proj"](mixed.transpose(1, 2).flatten(2))
        out: Tensor = x_BTD + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x_BTD))))
        return out
