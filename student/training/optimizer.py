"""PyTorch's AdamW with the published hyper-parameters, the published variant of it, and their schedules.

The published optimiser (``train.optimizer: published``) is S3PRL's Lamb with ``adam=True``, which is Adam without the trust ratio. It
differs from AdamW in three details (docs/fidelity.md):

- Its schedule counts from step 1, so its first update has a learning rate above 0 and its last one 0.
- It adds eps to the root of the second moment before the bias correction, so eps counts more in the first steps.
- It adds the weight decay to the update before the bias correction scales both, so the decay is scaled too.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ray_distill.student.training.train_settings import TrainSettings


def schedule_factor(step: int, total_steps: int, warmup_fraction: float, *, published: bool = False) -> float:
    """Return the learning-rate factor of a 0-based optimiser step: linear warm-up from 0, then linear decay to 0.

    Step 0 has factor 0, as in transformers' ``get_linear_schedule_with_warmup``. The published schedule (S3PRL's
    ``WarmupLinearSchedule``) has the factor of step + 1 here, up to rounding of the number of warm-up steps.

    Args:
        step: 0-based step.
        total_steps: Number of steps.
        warmup_fraction: Share of the steps in which the factor rises.
        published: Whether to return the factor of the published schedule. Default False.
    """
    step += published
    warmup = int(total_steps * warmup_fraction)
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup))


class PublishedUpdate(torch.optim.Optimizer):
    """The update of S3PRL's Lamb with ``adam=True`` and ``correct_bias=True``, at the learning rates of its groups."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps, "lr": 0.0, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters with gradients."""
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"], state["mean"], state["square"] = (
                        0,
                        torch.zeros_like(parameter),
                        torch.zeros_like(parameter),
                    )
                state["step"] += 1
                state["mean"].lerp_(parameter.grad, 1 - first)
                state["square"].lerp_(parameter.grad.square(), 1 - second)
                update = state["mean"] / (state["square"].sqrt() + group["eps"]) + group["weight_decay"] * parameter
                correction = math.sqrt(1 - second ** state["step"]) / (1 - first ** state["step"])
                parameter -= group["lr"] * correction * update


def learning_rate(settings: TrainSettings, step: int, total_steps: int) -> float:
    """Return the learning rate of a 0-based optimiser step."""
    published = settings.optimizer == "published"
    return settings.learning_rate * schedule_factor(step, total_steps, settings.warmup_fraction, published=published)


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Return the optimiser with weight decay on all parameters but biases and gates, as in the published parameter groups.

    AdamW is fused. The group of the gates has the key ``lr_scale``, the factor on its learning rate.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    gates = [parameter for name, parameter in named if name.startswith("gates.")]
    named = [(name, parameter) for name, parameter in named if not name.startswith("gates.")]
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named if not n.endswith("bias")], "weight_decay": settings.weight_decay},
        {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0},
    ]
    if settings.prune is not None:
        scale = settings.prune.gate_learning_rate / settings.learning_rate
        groups.append({"params": gates, "weight_decay": 0.0, "lr_scale": scale})
    if settings.optimizer == "published":
        return PublishedUpdate(groups, settings.betas, settings.eps)
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


def step_if_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Take a step of a fused optimiser unless a gradient norm is not finite. The device decides, and the host does not wait.

    Args:
        optimizer: The optimiser, with ``fused``. A step that is not taken changes nothing, as with PyTorch's loss scaling.
        norm: () float, norm of the gradients.
    """
    optimizer.found_inf = 1 - norm.isfinite().float()  # type: ignore[attr-defined]
    optimizer.step()
