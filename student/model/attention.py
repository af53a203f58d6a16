"""Self-attention with map reuse, never holding a (T, T) map for backward.

Shape suffixes: B batch, T frames, d student width, H heads, h width of a head.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ray_distill.student.model.dropout import kept
from ray_distill.student.model.position_encoding import by_distance, relative_table, rotate
from ray_distill.student.model.student_config import StudentConfig

_BLOCK = 500_000
"""Entries of attention maps computed at a time on a CPU under dropout, so that they stay in its caches."""


class AttentionMap(NamedTuple):
    """What decides a softmaxed attention map, without the (T, T) map itself: queries and keys, each (B, H, T, h).

    Relative positions add a bias to the scores, (B, H, T, T), which has to be held.
    """

    queries: Tensor
    keys: Tensor
    bias: Tensor | None = None


class Attention(nn.Module):
    """Self-attention that computes its own map, or applies an earlier layer's to its own values.

    A reused map is softmax(QK^T) of an earlier layer, so calling attention again with that layer's Q and K and this
    layer's V gives the same numbers. Dropout applies only where the map is computed.
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

    def _split(self, x_BTd: Tensor) -> Tensor:
        return x_BTd.view(*x_BTd.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(
        self, x_BTd: Tensor, attended: Tensor | None, shared: AttentionMap | None
    ) -> tuple[Tensor, AttentionMap]:
        """``attended``: (B, 1, 1, T) bool, False at padding, or None. Returns (B, T, d) and the map for later layers."""
        if not self.reuses:
            shared = self._map(x_BTd)
        assert shared is not None
        values = self._split(self.value(x_BTd))
        if self.reuses and self.second_softmax:
            scores = _scores(shared)
            for _ in range(2):
                if attended is not None:
                    scores = scores.masked_fill(~attended, float("-inf"))
                scores = scores.softmax(-1)
            mixed = scores @ values
        else:
            rate = self.dropout if self.training and not self.reuses else 0.0
            if shared.bias is None:
                mixed = attend(shared.queries, shared.keys, values, attended, rate)
            else:
                scores = _scores(shared)
                if attended is not None:
                    scores = scores.masked_fill(~attended, float("-inf"))
                mixed = F.dropout(scores.softmax(-1), rate) @ values
        return self.out(mixed.transpose(1, 2).flatten(2)), shared

    def _map(self, x_BTd: Tensor) -> AttentionMap:
        queries, keys = self._split(self.query(x_BTd)), self._split(self.key(x_BTd))
        if self.positions == "rotary":
            return AttentionMap(rotate(queries), rotate(keys))
        if self.positions == "relative":
            frames, width = x_BTd.shape[1:]
            distances = self._split(self.distance(relative_table(frames, width, x_BTd))[None])
            scores = (queries + self.distance_bias) @ distances.transpose(-1, -2) / math.sqrt(queries.shape[-1])
            return AttentionMap(queries + self.content_bias, keys, by_distance(scores))
        return AttentionMap(queries, keys)


def _scores(shared: AttentionMap) -> Tensor:
    """(B, H, T, T), before softmax."""
    scores = shared.queries @ shared.keys.transpose(-1, -2) / math.sqrt(shared.keys.shape[-1])
    return scores if shared.bias is None else scores + shared.bias


def attend(queries: Tensor, keys: Tensor, values: Tensor, attended: Tensor | None, dropout: float) -> Tensor:
    """``dropout(softmax(QK^T / sqrt(h))) V``, each (B, H, T, h), by whichever way holds no (T, T) map for backward.

    Args:
        queries, keys, values: (B, H, T, h).
        attended: (B, 1, 1, T) bool, False at padding, which stands after what is real; or None.
        dropout: probability of dropping an entry of the map.
    """
    if dropout and queries.device.type == "cpu":
        # PyTorch's fused attention for CPUs has no dropout.
        mixed: Tensor = _DropoutAttention.apply(queries, keys, values, attended, dropout)  # type: ignore[no-untyped-call]
        return mixed
    if queries.is_cuda and queries.element_size() == 2 and attended is not None:
        return _attend_padded_heads(queries, keys, values, attended, dropout)
    return F.scaled_dot_product_attention(queries, keys, values, attended, dropout)


def _attend_padded_heads(
    queries: Tensor, keys: Tensor, values: Tensor, attended: Tensor | None, dropout: float
) -> Tensor:
    """The same, with heads widened by zeros to a multiple of 8.

    CUDA's fused attention with a mask demands that in half precision (ARMHuBERT-S's heads are 36 wide); else PyTorch quietly
    computes whole maps.
    """
    width = queries.shape[-1]
    queries, keys, values = (F.pad(x, (0, -width % 8)) for x in (queries, keys, values))
    mixed = F.scaled_dot_product_attention(queries, keys, values, attended, dropout, scale=1 / math.sqrt(width))
    return mixed[..., :width]


class _DropoutAttention(torch.autograd.Function):
    """Attention under dropout, a few heads' maps at a time; backward computes them again.

    Padded frames are left out altogether: zeros there.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, attended: Tensor | None, dropout: float
    ) -> Tensor:
        batch, _, frames, _ = queries.shape
        ctx.real = [frames] * batch if attended is None else attended.sum(-1).flatten().tolist()
        out = torch.zeros_like(values)
        keeps = []
        for row, heads, real in _blocks(queries, ctx.real):
            weights = _map(queries[row, heads, :real], keys[row, heads, :real])
            keep, ctx.scale = kept(weights.shape, dropout)
            weights.mul_(keep)
            out[row, heads, :real] = (weights.to(values.dtype) @ values[row, heads, :real]).mul_(ctx.scale)
            keeps.append(keep)
        ctx.save_for_backward(queries, keys, values, *keeps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        queries, keys, values, *keeps = ctx.saved_tensors
        grad_queries, grad_keys, grad_values = (torch.zeros_like(x) for x in (queries, keys, values))
        for (row, heads, real), keep in zip(_blocks(queries, ctx.real), keeps, strict=True):
            at = (row, heads, slice(real))
            weights = _map(queries[at], keys[at])
            dropout = keep.to(weights.dtype)
            incoming = gradient[at] * ctx.scale
            grad_values[at] = (weights * dropout).to(values.dtype).transpose(1, 2) @ incoming
            grad_weights = (incoming @ values[at].transpose(1, 2)).to(weights.dtype).mul_(dropout)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).to(queries.dtype)
            grad_scores /= math.sqrt(queries.shape[-1])
            grad_queries[at] = grad_scores @ keys[at]
            grad_keys[at] = grad_scores.transpose(1, 2) @ queries[at]
        return grad_queries, grad_keys, grad_values, None, None


def _blocks(queries: Tensor, real: list[int]) -> list[tuple[int, slice, int]]:
    """(row, some of its heads, its real frames), in turn."""
    heads = queries.shape[1]
    steps = [max(1, _BLOCK // frames**2) for frames in real]
    return [
        (row, slice(first, first + step), real[row])
        for row, step in enumerate(steps)
        for first in range(0, heads, step)
    ]


def _map(queries: Tensor, keys: Tensor) -> Tensor:
    """(H, T, h) each, to the softmaxed map (H, T, T), at least in float32."""
    scores = (queries / math.sqrt(queries.shape[-1])) @ keys.transpose(1, 2)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
