"""Attention that saves no (T, T) maps, compared with explicit maps."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_distill.student.model import attention
from ray_distill.student.model.attention import attend

WIDTH = 6


def heads(frames: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    queries, keys, values = (torch.randn(3, 4, frames, WIDTH, dtype=torch.float64) * 2 for _ in range(3))
    return queries.requires_grad_(), keys.requires_grad_(), values.requires_grad_()


def explicit(
    queries: Tensor, keys: Tensor, values: Tensor, attended: Tensor | None, drop: Tensor | None = None, scale: float = 1
) -> Tensor:
    """Apply the softmaxed map to the values, after dropping entries if ``drop`` is given."""
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    if attended is not None:
        scores = scores.masked_fill(~attended, float("-inf"))
    weights = scores.softmax(-1)
    return (weights if drop is None else weights.masked_fill(drop, 0) * scale) @ values


def same_gradients(found: Tensor, expected: Tensor, inputs: tuple[Tensor, ...], real: Tensor) -> None:
    torch.testing.assert_close(found * real, expected * real)
    gradient = torch.randn_like(expected) * real
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("lengths", [None, [20, 7, 1]])
@pytest.mark.parametrize("block", [1, 450, 10**6])
def test_dropout_against_the_explicit_map(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int] | None, block: int
) -> None:
    monkeypatch.setattr(attention, "_BLOCK_ENTRIES", block)
    inputs = heads()
    drop = torch.zeros(3, 4, 20, 20, dtype=torch.bool)
    attended = None if lengths is None else (torch.arange(20) < torch.tensor(lengths)[:, None])[:, None, None]
    real = torch.ones(3, 1, 20, 1) if attended is None else attended.transpose(2, 3)
    drawn, dropout_mask = [], attention.dropout_mask

    def remember(shape: torch.Size, rate: float) -> tuple[Tensor, float]:
        result = dropout_mask(shape, rate)
        drawn.append(result[0])
        return result

    monkeypatch.setattr(attention, "dropout_mask", remember)
    found = attend(*inputs, attended, 0.3)
    blocks = attention._blocks(inputs[0], lengths or [20] * 3)
    for (row, some, frames), mask in zip(blocks, drawn, strict=True):
        drop[row, some, :frames, :frames] = ~mask
    assert 0.6 < float(torch.cat([mask.flatten() for mask in drawn]).double().mean()) < 0.8
    _, scale = dropout_mask(torch.Size((1,)), 0.3)
    same_gradients(found, explicit(*inputs, attended, drop, scale), inputs, real)


def test_heads_widened_for_fused_attention_give_the_same() -> None:
    inputs = heads()
    attended = (torch.arange(20) < torch.tensor([20, 7, 1])[:, None])[:, None, None]
    found = attention._attend_padded_heads(*inputs, attended, 0.0)
    assert found.shape == inputs[2].shape
    same_gradients(found, explicit(*inputs, attended), inputs, attended.transpose(2, 3))


def test_without_dropout_against_the_explicit_map() -> None:
    inputs = heads()
    attended = (torch.arange(20) < torch.tensor([20, 7, 1])[:, None])[:, None, None]
    same_gradients(attend(*inputs, attended, 0.0), explicit(*inputs, attended), inputs, attended.transpose(2, 3))


def test_dropout_in_half_precision() -> None:
    queries, keys, values = (x.detach().bfloat16() for x in heads())
    torch.manual_seed(1)
    found = attend(queries, keys, values, None, 0.3)
    assert found.dtype == torch.bfloat16
    torch.manual_seed(1)
    expected = attend(queries.float(), keys.float(), values.float(), None, 0.3)
    assert F.mse_loss(found.float(), expected) < 1e-3
