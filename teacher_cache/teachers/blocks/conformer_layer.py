"""The Conformer layer of w2v-BERT 2.0: causal convolution, and attention with embeddings of clipped distances.

Shapes: B utterances, T frames, D width, H heads, h width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConformerLayer(nn.Module):
    """One layer. Parameters have the names of transformers' ``Wav2Vec2BertEncoderLayer``.

    Args:
        dim: Width D.
        heads: Number of attention heads H.
        ffn_dim: Inner width of the feed-forward blocks.
        kernel: Kernel size of the depthwise convolution, in frames.
        left: Largest distance to an earlier frame that has an embedding of its own.
        right: Largest distance to a later frame that has an embedding of its own.
        eps: Value added to the variance in layer norms.
    """

    def __init__(self, dim: int, heads: int, ffn_dim: int, kernel: int, left: int, right: int, eps: float) -> None:
        super().__init__()
        self.ffn1_layer_norm = nn.LayerNorm(dim, eps)
        self.ffn1 = _FeedForward(dim, ffn_dim)
        self.self_attn_layer_norm = nn.LayerNorm(dim, eps)
        self.self_attn = _Attention(dim, heads, left, right)
        self.conv_module = _Convolution(dim, kernel, eps)
        self.ffn2_layer_norm = nn.LayerNorm(dim, eps)
        self.ffn2 = _FeedForward(dim, ffn_dim)
        self.final_layer_norm = nn.LayerNorm(dim, eps)

    def forward(self, x_BTD: Tensor, padding: Tensor | None) -> Tensor:
        """Apply the layer to (B, T, D). ``padding`` is (B, T) bool, True at padding, or None for no padding."""
        x_BTD = x_BTD + 0.5 * self.ffn1(self.ffn1_layer_norm(x_BTD))
        x_BTD = x_BTD + self.self_attn(self.self_attn_layer_norm(x_BTD), padding)
        x_BTD = x_BTD + self.conv_module(x_BTD, padding)
        x_BTD = x_BTD + 0.5 * self.ffn2(self.ffn2_layer_norm(x_BTD))
        out: Tensor = self.final_layer_norm(x_BTD)
        return out


class _FeedForward(nn.Module):
    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(dim, ffn_dim)
        self.output_dense = nn.Linear(ffn_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output_dense(F.silu(self.intermediate_dense(x)))
        return out


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int, left: int, right: int) -> None:
        super().__init__()
        self.heads, self.left, self.right = heads, left, right
        self.linear_q, self.linear_k, self.linear_v = (nn.Linear(dim, dim) for _ in range(3))
        self.linear_out = nn.Linear(dim, dim)
        self.distance_embedding = nn.Embedding(left + right + 1, dim // heads)

    def forward(self, x_BTD: Tensor, padding: Tensor | None) -> Tensor:
        query, key, value = (
            project(x_BTD).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.linear_q, self.linear_k, self.linear_v)
        )
        bias = self._distance_bias(query)
        if padding is not None:
            bias = bias.masked_fill(padding[:, None, None], -torch.inf)
        mixed = F.scaled_dot_product_attention(query, key, value, bias)
        out: Tensor = self.linear_out(mixed.transpose(1, 2).flatten(2))
        return out

    def _distance_bias(self, query_BHTh: Tensor) -> Tensor:
        """Return the (B, H, T, T) scores that a query gives to the distances to the keys, beside those of the keys."""
        frames = torch.arange(query_BHTh.shape[2], device=query_BHTh.device)
        distance_TT = (frames - frames[:, None]).clamp(-self.left, self.right) + self.left
        scores: Tensor = (
            query_BHTh @ self.distance_embedding.weight.to(query_BHTh.dtype).T * query_BHTh.shape[3] ** -0.5
        )
        return scores.gather(3, distance_TT.expand(*scores.shape[:3], -1))


class _Convolution(nn.Module):
    def __init__(self, dim: int, kernel: int, eps: float) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(dim, eps)
        self.pointwise_conv1 = nn.Conv1d(dim, 2 * dim, 1, bias=False)
        self.depthwise_conv = nn.Conv1d(dim, dim, kernel, groups=dim, bias=False)
        self.depthwise_layer_norm = nn.LayerNorm(dim, eps)
        self.pointwise_conv2 = nn.Conv1d(dim, dim, 1, bias=False)

    def forward(self, x_BTD: Tensor, padding: Tensor | None) -> Tensor:
        x = self.layer_norm(x_BTD)
        if padding is not None:
            x = x.masked_fill(padding[:, :, None], 0.0)
        x = F.glu(self.pointwise_conv1(x.transpose(1, 2)), dim=1)
        x = self.depthwise_conv(F.pad(x, (self.depthwise_conv.kernel_size[0] - 1, 0)))
        x = F.silu(self.depthwise_layer_norm(x.transpose(1, 2)))
        out: Tensor = self.pointwise_conv2(x.transpose(1, 2)).transpose(1, 2)
        return out
