"""Self-attention of a distilled student that can apply the map of an earlier layer. This file is copied into each exported folder.

Shape suffixes: B batch, T frames, d width, H heads, h width of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _apply_rotary(x_BHTh: Tensor) -> Tensor:
    """Apply rotary positions: rotate pairs (k, k + h/2) by the frame's number times a frequency."""
    width = x_BHTh.shape[-1]
    steps = torch.arange(0, width, 2, device=x_BHTh.device, dtype=torch.float32)
    angles = torch.arange(x_BHTh.shape[-2], device=x_BHTh.device, dtype=torch.float32)[:, None] * torch.exp(
        steps * (-math.log(10_000.0) / width)
    )
    cos, sin = angles.cos().to(x_BHTh.dtype), angles.sin().to(x_BHTh.dtype)
    first, second = x_BHTh[..., : width // 2], x_BHTh[..., width // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Attention(nn.Module):
    """Self-attention that computes its own map, or applies the map of an earlier layer to its own values."""

    def __init__(self, config: dict[str, Any], reuses: bool, heads: int) -> None:
        super().__init__()
        width: int = config["encoder_embed_dim"]
        self.heads = heads
        inner = heads * (width // config["encoder_attention_heads"])
        self.reuses = reuses
        self.second_softmax = config["reuse_behaviour"] == "released"
        self.dropout: float = config["attention_dropout"]
        self.rotary = config["position"] == "rotary"
        if not reuses:
            self.query = nn.Linear(width, inner)
            self.key = nn.Linear(width, inner)
        self.value = nn.Linear(width, inner)
        self.out = nn.Linear(inner, width)

    def _split_heads(self, x_BTd: Tensor) -> Tensor:
        return x_BTd.view(x_BTd.shape[0], x_BTd.shape[1], self.heads, -1).transpose(1, 2)

    def forward(
        self,
        x_BTd: Tensor,
        attention_mask: Tensor | None,
        previous_map: tuple[Tensor, ...],
        hold_maps: bool,
        maps: list[Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the output (B, T, d) and the map, for layers that reuse it.

        Args:
            x_BTd: (B, T, d) float.
            attention_mask: (B, 1, 1, T) bool, False at padding; None if nothing is padded.
            previous_map: Last computed map: queries and keys, each (B, H, T, h), or with hold_maps the map (B, H, T, T).
            hold_maps: See `PortableStudent`.
            maps: See `PortableStudent.forward`.
        """
        rate = self.dropout if self.training and not self.reuses else 0.0
        values = self._split_heads(self.value(x_BTd))
        if not self.reuses:
            previous_map = self._split_heads(self.query(x_BTd)), self._split_heads(self.key(x_BTd))
            if self.rotary:
                previous_map = _apply_rotary(previous_map[0]), _apply_rotary(previous_map[1])
        fused = hasattr(F, "scaled_dot_product_attention")  # From PyTorch 2.0 on.
        if fused and not hold_maps and maps is None and not (self.reuses and self.second_softmax):
            mixed = F.scaled_dot_product_attention(previous_map[0], previous_map[1], values, attention_mask, rate)
            return self.out(mixed.transpose(1, 2).flatten(2)), previous_map
        weights = (
            previous_map[0]
            if len(previous_map) == 1
            else _softmax(_scores(previous_map[0], previous_map[1]), attention_mask)
        )
        if hold_maps or not fused:
            previous_map = (weights,)
        if self.reuses and self.second_softmax:
            weights = _softmax(weights, attention_mask)
        if maps is not None:
            maps.append(weights)
        mixed = _product(F.dropout(weights, rate, training=rate > 0), values)
        return self.out(mixed.transpose(1, 2).flatten(2)), previous_map


def _product(x: Tensor, y: Tensor) -> Tensor:
    # `torch.export` can't trace the product of single heads for all lengths.
    return (x.squeeze(1) @ y.squeeze(1)).unsqueeze(1) if x.shape[1] == 1 else x @ y


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    return _product(queries / math.sqrt(keys.shape[-1]), keys.transpose(-1, -2))


def _softmax(scores: Tensor, attention_mask: Tensor | None) -> Tensor:
    return (scores if attention_mask is None else scores.masked_fill(~attention_mask, float("-inf"))).softmax(-1)
