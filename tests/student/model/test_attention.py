"""Attention that saves no (T, T) maps, compared with explicit maps."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_distill.student.model import attention
from ray_distill.student.model.attention import attend

from ...fake_gpu import GPU, fake_gpu
from ...tiny import tiny_student

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
@pytest.mark.parametrize(("block", "whole"), [(1, 1024), (450, 1024), (10**6, 1024), (1, 0), (70, 6), (10**6, 7)])
def test_dropout_against_the_explicit_map(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int] | None, block: int, whole: int
) -> None:
    monkeypatch.setattr(attention, "_BLOCK_ENTRIES", block)
    monkeypatch.setattr(attention, "WHOLE_MAP_FRAMES", whole)
    inputs = heads()
    drop = torch.zeros(3, 4, 20, 20, dtype=torch.bool)
    attended = None if lengths is None else (torch.arange(20) < torch.tensor(lengths)[:, None])[:, None, None]
    real = torch.ones(3, 1, 20, 1) if attended is None else attended.transpose(2, 3)
    drawn, dropout_mask = [], attention.dropout_mask

    def remember(shape: torch.Size, rate: float, generator: torch.Generator | None = None) -> tuple[Tensor, float]:
        result = dropout_mask(shape, rate, generator)
        drawn.append(result[0])
        return result

    monkeypatch.setattr(attention, "dropout_mask", remember)
    found = attend(*inputs, attended, 0.3)
    blocks = attention._blocks(inputs[0], lengths or [20] * 3)
    for (row, some, queries, frames), mask in zip(blocks, drawn, strict=True):
        assert frames <= whole or mask.numel() <= max(block, frames)
        drop[row, some, queries, :frames] = ~mask
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


@pytest.mark.parametrize("position", ["relative", "convolution"])
def test_maps_by_chunks_are_the_whole_maps(monkeypatch: pytest.MonkeyPatch, position: str) -> None:
    """Relative positions, and the released weights' second softmax on a reused map."""
    torch.manual_seed(0)
    config = tiny_student(position=position, attention_reuse="alternate", reuse_behaviour="released")
    layers = [attention.Attention(config, reuses).double() for reuses in (False, True)]
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    attended = (torch.arange(9) < torch.tensor([9, 4])[:, None])[:, None, None]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    sizes: list[int] = []
    softmax = Tensor.softmax

    def results(dropout: float) -> list[Tensor]:
        layers[0].dropout = dropout
        first, shared = layers[0](x, attended, None)
        second, _ = layers[1](first, attended, shared)
        loss = (second * x).sum()
        return [first, second, *torch.autograd.grad(loss, parameters)]

    expected = results(0.0)
    with monkeypatch.context() as patched:
        patched.setattr(attention, "WHOLE_MAP_FRAMES", 8)
        patched.setattr(attention, "_CHUNK_ENTRIES", 2 * 2 * 9 * 2)
        patched.setattr(
            Tensor, "softmax", lambda scores, axis: (sizes.append(scores.shape[-2]), softmax(scores, axis))[1]
        )
        for ours, theirs in zip(results(0.0), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert max(sizes) == 2, "a whole map was computed"
        with torch.no_grad():
            torch.testing.assert_close(layers[0](x, attended, None)[0], expected[0])
        if position == "relative":
            # With dropout the output is linear in the values, so their gradient has the forward pass's mask if this holds.
            layers[0].dropout = 0.4
            mixed, shared = layers[0](x, attended, None)
            values = torch.randn(2, 2, 9, 8, dtype=torch.float64, requires_grad=True)
            out = attention._attend_by_chunks(shared, values, attended, 0.4, 1)
            (gradient,) = torch.autograd.grad((out * 3).sum(), values)
            torch.testing.assert_close((gradient * values).sum(), (out * 3).sum())
            assert not torch.allclose(mixed, expected[0])


def test_recomputed_maps_keep_the_random_state_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch keeps it for the devices of the arguments. Without it, backward would have other dropout than forward."""
    devices: list[set[torch.device]] = []

    def recomputed(function: Any, *arguments: Any, use_reentrant: bool) -> Tensor:
        devices.append({argument.device for argument in arguments if isinstance(argument, Tensor)})
        result: Tensor = function(*arguments)
        return result

    monkeypatch.setattr(attention, "checkpoint", recomputed)
    monkeypatch.setattr(attention, "WHOLE_MAP_FRAMES", 8)
    monkeypatch.setattr(attention, "_CHUNK_ENTRIES", 2 * 2 * 9 * 2)
    with fake_gpu() as mode:
        layer = attention.Attention(tiny_student(position="relative"), False).to(GPU).train()
        with mode:
            layer(torch.zeros(2, 9, 16, device=GPU), None, None)
    assert len(devices) == 5 and all(found == {GPU} for found in devices)


def test_dropout_in_half_precision() -> None:
    queries, keys, values = (x.detach().bfloat16() for x in heads())
    torch.manual_seed(1)
    found = attend(queries, keys, values, None, 0.3)
    assert found.dtype == torch.bfloat16
    torch.manual_seed(1)
    expected = attend(queries.float(), keys.float(), values.float(), None, 0.3)
    assert F.mse_loss(found.float(), expected) < 1e-3
