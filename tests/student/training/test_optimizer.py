"""The optimisers and their schedules, compared with references by hand."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ray_distill.student.training.optimizer import PublishedUpdate, learning_rate, make_optimizer, schedule_factor
from ray_distill.student.training.train_settings import TrainSettings

Settings = Callable[..., TrainSettings]


def test_the_learning_rate_of_a_step_follows_the_chosen_schedule(settings: Settings) -> None:
    peak = 5e-3
    adamw, published = (
        settings(optimizer=name, learning_rate=peak, warmup_fraction=0.1) for name in ("adamw", "published")
    )
    rates = [learning_rate(adamw, step, 40) for step in range(41)]
    assert rates[:6] == pytest.approx([0, peak / 4, peak / 2, 3 * peak / 4, peak, peak * 35 / 36])
    assert [learning_rate(published, step, 40) for step in range(40)] == rates[1:]
    assert schedule_factor(3, 39, 0.1) == 1, "3.9 steps of warm-up are three"
    assert [schedule_factor(step, 2, 0.0) for step in range(3)] == [1, 0.5, 0]
    assert [schedule_factor(step, 2, 1.0) for step in range(3)] == [0, 0.5, 0]


@pytest.mark.parametrize("kind", ["adamw", "published"])
def test_two_updates_by_hand(settings: Settings, kind: str) -> None:
    first, second, eps, decay, rate = 0.8, 0.9, 0.05, 0.2, 0.1
    chosen = settings(optimizer=kind, betas=(first, second), eps=eps, weight_decay=decay, learning_rate=rate)
    layer = nn.Linear(1, 1)
    optimizer = make_optimizer(layer, chosen)
    values = [layer.weight.item(), layer.bias.item()]
    moments = [[0.0, 0.0], [0.0, 0.0]]
    for step, gradients in enumerate([(0.3, -0.02), (-0.1, 0.4)], 1):
        for group, parameter, gradient in zip(
            optimizer.param_groups, (layer.weight, layer.bias), gradients, strict=True
        ):
            group["lr"] = rate
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        for n, gradient in enumerate(gradients):
            mean, square = moments[n]
            moments[n] = [first * mean + (1 - first) * gradient, second * square + (1 - second) * gradient**2]
            mean, square = moments[n]
            weight_decay = 0 if n else decay  # The bias has none.
            scale = (1 - first**step, math.sqrt(1 - second**step))
            if kind == "adamw":
                values[n] -= rate * (weight_decay * values[n] + mean / scale[0] / (math.sqrt(square) / scale[1] + eps))
            else:
                update = mean / (math.sqrt(square) + eps) + weight_decay * values[n]
                values[n] -= rate * scale[1] / scale[0] * update
        assert [layer.weight.item(), layer.bias.item()] == pytest.approx(values, rel=1e-5)
    assert isinstance(optimizer, PublishedUpdate) == (kind == "published")


def test_parameters_are_decayed_unless_their_name_ends_with_bias(settings: Settings) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.log_variance_bias = nn.Parameter(torch.zeros(2))
            self.bias_scale = nn.Parameter(torch.zeros(2))
            self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)

    model = Model()

    def ids(*parameters: Any) -> set[int]:
        return {id(parameter) for parameter in parameters}

    for kind in ("adamw", "published"):
        decayed, spared = make_optimizer(model, settings(optimizer=kind)).param_groups
        assert ids(*decayed["params"]) == ids(model.layer.weight, model.bias_scale)
        assert ids(*spared["params"]) == ids(model.layer.bias, model.log_variance_bias)
        assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
