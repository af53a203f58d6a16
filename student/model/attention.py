"""Self-attention with reuse of attention maps, without saving a (T, T) map for backward.

Shape suffixes: B batch, T frames, d student width, H heads, h width of a head.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ray_distill.student.model.dropout import dropout_mask
from ray_distill.student.model.position_encoding import apply_rotary, relative_shift, relative_table
from ray_distill.student.model.student_config import StudentConfig

_BLOCK_ENTRIES = 500_000
"""Number of entries of attention maps that are computed at a time on a CPU with dropout, so that they fit into its caches."""


class AttentionMap(NamedTuple):
    """Queries, keys and bias of an attention map, not the map itself, which is computed from them again.

    Attributes:
        queries, keys: (B, H, T, h) float.
        bias: (B, H, T, T) float, added to the scores by relative positions; None otherwise.
    """

    queries: Tensor
    keys: Tensor
    bias: Tensor | None = None


class Attention(nn.Module):
    """Self-attention that computes its own map, or applies the map of an earlier layer to its own values.

    A reused map is softmax(QK^T) of an earlier layer, so attention with that layer's Q and K and this layer's V gives the
    same result. Dropout applies only where a map is computed.

    Args:
        config: Architecture of the student.
        reuses: Whether this layer reuses a map.
    """

    def __init__(self, config: StudentConfig, reuses: bool) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.heads = config.encoder_attention_heads
        self.reuses = reuses
        self.second_softmax = config.reuse_behaviour == "released"
        self.dropout = config.attention_dropout
        self.positions = config.position
        if not reuses:
            self.query = nn.Linear(width, width)
            self.key = nn.Linear(width, width)
            if self.positions == "relative":
                self.distance = nn.Linear(width, width, bias=False)
                biases = (
                    nn.init.xavier_uniform_(torch.empty(self.heads, width // self.heads))[:, None] for _ in range(2)
                )
                self.content_bias, self.distance_bias = map(nn.Parameter, biases)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, reuses={self.reuses}, dropout={self.dropout:g}"

    def _split_heads(self, x_BTd: Tensor) -> Tensor:
        return x_BTd.view(*x_BTd.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(
        self, x_BTd: Tensor, attention_mask: Tensor | None, previous_map: AttentionMap | None
    ) -> tuple[Tensor, AttentionMap]:
        """Return the output (B, T, d) and the map, for layers that reuse it.

        Args:
            x_BTd: (B, T, d) float.
            attention_mask: (B, 1, 1, T) bool, False at padding; None if nothing is padded.
            previous_map: Last computed map; only used by a layer that reuses it.
        """
        if not self.reuses:
            previous_map = self._compute_map(x_BTd)
        assert previous_map is not None
        values = self._split_heads(self.value(x_BTd))
        if self.reuses and self.second_softmax:
            scores = _scores(previous_map)
            for _ in range(2):
                if attention_mask is not None:
                    scores = scores.masked_fill(~attention_mask, float("-inf"))
                scores = scores.softmax(-1)
            mixed = scores @ values
        else:
            rate = self.dropout if self.training and not self.reuses else 0.0
            if previous_map.bias is None:
                mixed = attend(previous_map.queries, previous_map.keys, values, attention_mask, rate)
            else:
                scores = _scores(previous_map)
                if attention_mask is not None:
                    scores = scores.masked_fill(~attention_mask, float("-inf"))
                mixed = F.dropout(scores.softmax(-1), rate) @ values
        return self.out(mixed.transpose(1, 2).flatten(2)), previous_map

    def _compute_map(self, x_BTd: Tensor) -> AttentionMap:
        queries, keys = self._split_heads(self.query(x_BTd)), self._split_heads(self.key(x_BTd))
        if self.positions == "rotary":
            return AttentionMap(apply_rotary(queries), apply_rotary(keys))
        if self.positions == "relative":
            frames, width = x_BTd.shape[1:]
            distances = self._split_heads(self.distance(relative_table(frames, width, x_BTd))[None])
            scores = (queries + self.distance_bias) @ distances.transpose(-1, -2) / math.sqrt(queries.shape[-1])
            return AttentionMap(queries + self.content_bias, keys, relative_shift(scores))
        return AttentionMap(queries, keys)


def _scores(factors: AttentionMap) -> Tensor:
    """Return attention scores (B, H, T, T) before softmax."""
    scores = factors.queries @ factors.keys.transpose(-1, -2) / math.sqrt(factors.keys.shape[-1])
    return scores if factors.bias is None else scores + factors.bias


def attend(queries: Tensor, keys: Tensor, values: Tensor, attention_mask: Tensor | None, dropout: float) -> Tensor:
    """Return ``dropout(softmax(QK^T / sqrt(h))) V``, (B, H, T, h), without saving a (T, T) map for backward.

    Args:
        queries, keys, values: (B, H, T, h) float.
        attention_mask: (B, 1, 1, T) bool, False at padding, which follows the real frames; None if nothing is padded.
        dropout: Probability of dropping an entry of the map.
    """
    if dropout and queries.device.type == "cpu":  # PyTorch's fused attention for CPUs has no dropout.
        mixed: Tensor = _DropoutAttention.apply(queries, keys, values, attention_mask, dropout)  # type: ignore[no-untyped-call]
        return mixed
    if queries.is_cuda and queries.element_size() == 2 and attention_mask is not None:
        return _attend_padded_heads(queries, keys, values, attention_mask, dropout)
    return F.scaled_dot_product_attention(queries, keys, values, attention_mask, dropout)


def _attend_padded_heads(
    queries: Tensor, keys: Tensor, values: Tensor, attention_mask: Tensor | None, dropout: float
) -> Tensor:
    """Attention with the width of the heads padded with zeros to a multiple of 8.

    CUDA's fused attention with a mask needs that in half precision (ARMHuBERT-S's heads are 36 wide). Without it PyTorch
    computes whole maps, without a warning.
    """
    width = queries.shape[-1]
    queries, keys, values = (F.pad(x, (0, -width % 8)) for x in (queries, keys, values))
    mixed = F.scaled_dot_product_attention(queries, keys, values, attention_mask, dropout, scale=1 / math.sqrt(width))
    return mixed[..., :width]


class _DropoutAttention(torch.autograd.Function):
    """Attention with dropout on a CPU that computes the maps of a few heads at a time, and again in backward.

    Padded frames are skipped; their outputs are zeros. For two utterances of 8 s, this stores 3.8 MB
    for backward where `torch.nn.functional.scaled_dot_product_attention` with dropout stores 49 MB, and needs 0.9 times its
    CPU time (benchmarks/student/autograd_functions.py).
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, attention_mask: Tensor | None, dropout: float
    ) -> Tensor:
        batch, _, frames, _ = queries.shape
        ctx.real = [frames] * batch if attention_mask is None else attention_mask.sum(-1).flatten().tolist()
        out = torch.zeros_like(values)
        masks = []
        for row, heads, real in _blocks(queries, ctx.real):
            weights = _attention_map(queries[row, heads, :real], keys[row, heads, :real])
            mask, ctx.scale = dropout_mask(weights.shape, dropout)
            weights.mul_(mask)
            out[row, heads, :real] = (weights.to(values.dtype) @ values[row, heads, :real]).mul_(ctx.scale)
            masks.append(mask)
        ctx.save_for_backward(queries, keys, values, *masks)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        queries, keys, values, *masks = ctx.saved_tensors
        grad_queries, grad_keys, grad_values = (torch.zeros_like(x) for x in (queries, keys, values))
        for (row, heads, real), mask in zip(_blocks(queries, ctx.real), masks, strict=True):
            at = (row, heads, slice(real))
            weights = _attention_map(queries[at], keys[at])
            dropout = mask.to(weights.dtype)
            incoming = gradient[at] * ctx.scale
            grad_values[at] = (weights * dropout).to(values.dtype).transpose(1, 2) @ incoming
            grad_weights = (incoming @ values[at].transpose(1, 2)).to(weights.dtype).mul_(dropout)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).to(queries.dtype)
            grad_scores /= math.sqrt(queries.shape[-1])
            grad_queries[at] = grad_scores @ keys[at]
            grad_keys[at] = grad_scores.transpose(1, 2) @ queries[at]
        return grad_queries, grad_keys, grad_values, None, None


def _blocks(queries: Tensor, real: list[int]) -> list[tuple[int, slice, int]]:
    """Return blocks that cover all maps: a row of the batch, a slice of its heads, and its number of real frames."""
    heads = queries.shape[1]
    steps = [max(1, _BLOCK_ENTRIES // frames**2) for frames in real]
    return [
        (row, slice(first, first + step), real[row])
        for row, step in enumerate(steps)
        for first in range(0, heads, step)
    ]


def _attention_map(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the softmaxed map (H, T, T), float32 or wider, of queries and keys (H, T, h)."""
    scores = (queries / math.sqrt(queries.shape[-1])) @ keys.transpose(1, 2)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
