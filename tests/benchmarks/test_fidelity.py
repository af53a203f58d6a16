"""The published update that the benchmark compares with, and its mask ramp."""

from typing import Any

import pytest
import torch

from benchmarks.student.fidelity import ramp
from ray_distill.student.training.optimizer import PublishedUpdate


def trained(make: Any, steps: int) -> torch.Tensor:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(20))
    optimizer = make([weight])
    for _ in range(steps):
        optimizer.zero_grad()
        ((weight - 0.3) ** 4).sum().backward()
        optimizer.param_groups[0]["lr"] = 0.01
        optimizer.step()
    return weight.detach()


def test_without_eps_and_decay_the_published_update_is_adam() -> None:
    def published(decay: float, eps: float) -> Any:
        return lambda weights: PublishedUpdate([{"params": weights, "weight_decay": decay}], (0.9, 0.98), eps)

    adam = trained(lambda weights: torch.optim.AdamW(weights, betas=(0.9, 0.98), eps=0.0, weight_decay=0.0), 30)
    torch.testing.assert_close(trained(published(0.0, 0.0), 30), adam, rtol=1e-5, atol=1e-6)
    assert (trained(published(0.0, 1e-2), 30) - adam).abs().max() > 1e-3
    # The first step's decay is scaled by the bias correction, sqrt(1 - 0.98) / (1 - 0.9).
    start = trained(published(0.0, 0.0), 0)
    decay = trained(published(0.0, 0.0), 1) - trained(published(0.5, 0.0), 1)
    torch.testing.assert_close(decay, 0.01 * 0.5 * start * 0.02**0.5 / 0.1, rtol=1e-4, atol=1e-7)


def test_levels_of_the_mask_ramp() -> None:
    found = ramp(0.4, 0.8, 200)
    assert found["largest_difference"] == pytest.approx(0.1)
    assert 0 < found["mean_difference"] < 0.1
