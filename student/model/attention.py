"""Self-attention with reuse of attention maps, without saving a (T, T) map for backward.

Long utterances never need a whole map: where PyTorch's fused attention can't be used, a map is computed for some queries at a time,
in forward and again in backward.

Shape suffixes: B batch, T frames, d student width, H heads, h width of a head.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ray_distill.student.model.dropout import dropout_mask
from ray_distill.student.model.gated_linear import GatedLinear
from ray_distill.student.model.position_encoding import apply_rotary, relative_shift, relative_table
from ray_distill.student.model.student_config import StudentConfig

_BLOCK_ENTRIES = 500_000
"""Number of entries of attention maps that are computed at a time on a CPU with dropout, so that they fit into its caches."""
WHOLE_MAP_FRAMES = 1024
"""Longest utterance, in frames, whose maps and dropout masks are held whole, which takes less time."""
_CHUNK_ENTRIES = 2**25
"""Number of entries of the maps of a longer utterance that are held at a time where fused attention can't be used."""


class AttentionMap(NamedTuple):
    """Queries, keys and positions of an attention map, not the map itself, which is computed from them again.

    Attributes:
        queries, keys: (B, H, T, h) float.
        bias: (B, H, T, T) float, added to the scores by relative positions; None otherwise, and for long utterances.
        distance_queries: (B, H, T, h) float, from which the bias of some queries is computed; None unless it is needed.
        distances: (1, H, 2T - 1, h) float, keys of the distances in the order of `relative_table`; None unless they are needed.
    """

    queries: Tensor
    keys: Tensor
    bias: Tensor | None = None
    distance_queries: Tensor | None = None
    distances: Tensor | None = None


class Attention(nn.Module):
    """Self-attention that computes its own map, or applies the map of an earlier layer to its own values.

    A reused map is softmax(QK^T) of an earlier layer, so attention with that layer's Q and K and this layer's V gives the
    same result. Dropout applies only where a map is computed.

    Args:
        config: Architecture of the student.
        reuses: Whether this layer reuses a map.
        heads: Number of heads. Default None: ``config.encoder_attention_heads``.
    """

    def __init__(self, config: StudentConfig, reuses: bool, heads: int | None = None) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.heads = config.encoder_attention_heads if heads is None else heads
        inner = self.heads * config.head_width
        self.reuses = reuses
        self.second_softmax = config.reuse_behaviour == "released"
        self.dropout = config.attention_dropout
        self.positions = config.position
        if not reuses:
            self.query = nn.Linear(width, inner)
            self.key = nn.Linear(width, inner)
            if self.positions == "relative":
                self.distance = nn.Linear(width, inner, bias=False)
                biases = (
                    nn.init.xavier_uniform_(torch.empty(self.heads, config.head_width))[:, None] for _ in range(2)
                )
                self.content_bias, self.distance_bias = map(nn.Parameter, biases)
        self.value = nn.Linear(width, inner)
        self.out = GatedLinear(inner, width)

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
        rate = self.dropout if self.training and not self.reuses else 0.0
        softmaxes = 2 if self.reuses and self.second_softmax else 1
        if softmaxes == 2 or self.positions == "relative":
            mixed = _attend_by_chunks(previous_map, values, attention_mask, rate, softmaxes)
        else:
            mixed = attend(previous_map.queries, previous_map.keys, values, attention_mask, rate)
        return self.out(mixed.transpose(1, 2).flatten(2)), previous_map

    def _compute_map(self, x_BTd: Tensor) -> AttentionMap:
        queries, keys = self._split_heads(self.query(x_BTd)), self._split_heads(self.key(x_BTd))
        if self.positions == "rotary":
            return AttentionMap(apply_rotary(queries), apply_rotary(keys))
        if self.positions == "relative":
            frames, width = x_BTd.shape[1:]
            distances = self._split_heads(self.distance(relative_table(frames, width, x_BTd))[None])
            distance_queries = queries + self.distance_bias
            if frames > WHOLE_MAP_FRAMES:
                return AttentionMap(queries + self.content_bias, keys, None, distance_queries, distances)
            return AttentionMap(queries + self.content_bias, keys, _relative_bias(distance_queries, distances, 0))
        return AttentionMap(queries, keys)


def _relative_bias(queries: Tensor, distances: Tensor, first: int) -> Tensor:
    """Return the bias (B, H, R, T) of R neighbouring queries (B, H, R, h), of which the first is query ``first`` of T."""
    frames, count = (distances.shape[2] + 1) // 2, queries.shape[2]
    near = distances[:, :, frames - first - count : 2 * frames - 1 - first]
    return relative_shift(queries @ near.transpose(-1, -2) / math.sqrt(queries.shape[-1]))


def _attend_by_chunks(
    factors: AttentionMap, values: Tensor, attention_mask: Tensor | None, dropout: float, softmaxes: int
) -> Tensor:
    """Attention with maps that fused attention can't compute, (B, H, T, h).

    The maps of a long utterance are computed for some queries at a time, and again in backward.

    Args:
        factors: The map.
        values: (B, H, T, h) float.
        attention_mask: (B, 1, 1, T) bool, False at padding; None if nothing is padded.
        dropout: Probability of dropping an entry of the map.
        softmaxes: Number of softmaxes, 1 or 2.
    """

    def attend_rows(values: Tensor, first: int, last: int) -> Tensor:
        scores = factors.queries[:, :, first:last] @ factors.keys.transpose(-1, -2) / math.sqrt(factors.keys.shape[-1])
        if factors.bias is not None:
            scores = scores + factors.bias[:, :, first:last]
        elif factors.distance_queries is not None and factors.distances is not None:
            scores = scores + _relative_bias(factors.distance_queries[:, :, first:last], factors.distances, first)
        for _ in range(softmaxes):
            if attention_mask is not None:
                scores = scores.masked_fill(~attention_mask, float("-inf"))
            scores = scores.softmax(-1)
        return F.dropout(scores, dropout) @ values

    batch, heads, frames, _ = values.shape
    if frames <= WHOLE_MAP_FRAMES:
        return attend_rows(values, 0, frames)
    step = max(1, _CHUNK_ENTRIES // (batch * heads * frames))
    chunks = [(first, min(first + step, frames)) for first in range(0, frames, step)]
    if not torch.is_grad_enabled():
        return torch.cat([attend_rows(values, *chunk) for chunk in chunks], 2)
    # Backward draws the same dropout, because PyTorch keeps the random states of the devices of the arguments. A GPU has its own.
    return torch.cat([checkpoint(attend_rows, values, *chunk, use_reentrant=False) for chunk in chunks], 2)


def attend(queries: Tensor, keys: Tensor, values: Tensor, attention_mask: Tensor | None, dropout: float) -> Tensor:
    """Return ``dropout(softmax(QK^T / sqrt(h))) V``, (B, H, T, h), without saving a (T, T) map for backward.

    Args:
        queries, keys, values: (B, H, T, h) float.
        attention_mask: (B, 1, 1, T) bool, False at padding, which follows the real frames; None if nothing is padded.
        dropout: Probability of dropping an entry of the map.
    """
    # PyTorch's fused attention for CPUs has no dropout. The compiler can't trace the hand-written one.
    if dropout and queries.device.type == "cpu" and not torch.compiler.is_compiling():
        mixed: Tensor = _DropoutAttention.apply(queries, keys, values, attention_mask, dropout)  # type: ignore[no-untyped-call]
        return mixed
    if queries.is_cuda and (attention_mask is not None or queries.element_size() > 2):
        return _attend_padded_heads(queries, keys, values, attention_mask, dropout)
    return F.scaled_dot_product_attention(queries, keys, values, attention_mask, dropout)


def _attend_padded_heads(
    queries: Tensor, keys: Tensor, values: Tensor, attention_mask: Tensor | None, dropout: float
) -> Tensor:
    """Attention with the width of the heads padded with zeros to a multiple of 16 bytes.

    CUDA's fused attention with a mask, or in float32, needs that (ARMHuBERT-S's heads are 36 wide, which is 72 bytes in half
    precision). Without it PyTorch computes whole maps, without a warning.
    """
    width = queries.shape[-1]
    if surplus := -width % (16 // queries.element_size()):
        queries, keys, values = (F.pad(x, (0, surplus)) for x in (queries, keys, values))
    mixed = F.scaled_dot_product_attention(queries, keys, values, attention_mask, dropout, scale=1 / math.sqrt(width))
    return mixed[..., :width]


class _DropoutAttention(torch.autograd.Function):
    """Attention with dropout on a CPU that computes the maps of a few heads or queries at a time, and again in backward.

    Padded frames are skipped; their outputs are zeros. The dropout masks of long utterances are drawn again in backward. For two
    utterances of 8 s, this stores 3.8 MB for backward where `torch.nn.functional.scaled_dot_product_attention` with dropout stores
    49 MB, and needs 0.9 times its CPU time (benchmarks/training_step/autograd_functions.py).
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, attention_mask: Tensor | None, dropout: float
    ) -> Tensor:
        batch, _, frames, _ = queries.shape
        ctx.real = [frames] * batch if attention_mask is None else attention_mask.sum(-1).flatten().tolist()
        ctx.dropout = dropout
        out = torch.zeros_like(values)
        masks = []
        ctx.seeds = []
        for row, heads, some, real in _blocks(queries, ctx.real):
            weights = _attention_map(queries[row, heads, some], keys[row, heads, :real])
            if real <= WHOLE_MAP_FRAMES:
                mask, ctx.scale = dropout_mask(weights.shape, dropout)
                masks.append(mask)
            else:
                ctx.seeds.append(int(torch.empty((), dtype=torch.int64).random_()))
                mask, ctx.scale = _seeded_mask(weights.shape, dropout, ctx.seeds[-1])
            weights.mul_(mask)
            out[row, heads, some] = (weights.to(values.dtype) @ values[row, heads, :real]).mul_(ctx.scale)
        ctx.save_for_backward(queries, keys, values, *masks)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        queries, keys, values, *masks = ctx.saved_tensors
        grad_queries = torch.zeros_like(queries)
        # Sums over the blocks of a long utterance.
        grad_keys, grad_values = (
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (keys, values)
        )
        kept, seeds = iter(masks), iter(ctx.seeds)
        for row, heads, some, real in _blocks(queries, ctx.real):
            at, seen = (row, heads, some), (row, heads, slice(real))
            weights = _attention_map(queries[at], keys[seen])
            if real <= WHOLE_MAP_FRAMES:
                dropout = next(kept).to(weights.dtype)
            else:
                dropout = _seeded_mask(weights.shape, ctx.dropout, next(seeds))[0].to(weights.dtype)
            incoming = gradient[at] * ctx.scale
            put = Tensor.add_ if some.start else Tensor.copy_  # The first queries of a head come first.
            put(grad_values[seen], (weights * dropout).to(values.dtype).transpose(1, 2) @ incoming)
            grad_weights = (incoming @ values[seen].transpose(1, 2)).to(weights.dtype).mul_(dropout)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).to(queries.dtype)
            grad_scores /= math.sqrt(queries.shape[-1])
            grad_queries[at] = grad_scores @ keys[seen]
            put(grad_keys[seen], grad_scores.transpose(1, 2) @ queries[at])
        return grad_queries, grad_keys.to(keys.dtype), grad_values.to(values.dtype), None, None


def _seeded_mask(shape: torch.Size, rate: float, seed: int) -> tuple[Tensor, float]:
    """Return `dropout_mask` of a seed."""
    return dropout_mask(shape, rate, torch.Generator().manual_seed(seed))


def _blocks(queries: Tensor, real: list[int]) -> list[tuple[int, slice, slice, int]]:
    """Return blocks that cover all maps: a row of the batch, slices of its heads and queries, and its number of real frames."""
    heads = queries.shape[1]
    blocks = []
    for row, frames in enumerate(real):
        several = max(1, _BLOCK_ENTRIES // frames**2)
        step = frames if frames <= WHOLE_MAP_FRAMES else max(1, _BLOCK_ENTRIES // frames)
        for head in range(0, heads, several):
            for first in range(0, frames, step):
                blocks.append((row, slice(head, head + several), slice(first, min(first + step, frames)), frames))
    return blocks


def _attention_map(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the softmaxed map (H, T, T), float32 or wider, of queries and keys (H, T, h)."""
    scores = (queries / math.sqrt(queries.shape[-1])) @ keys.transpose(1, 2)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
