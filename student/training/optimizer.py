"""PyTorch's AdamW with the published hyper-parameters, and its schedule.

The published optimiser is S3PRL's Lamb with ``adam=True``, which is Adam without the trust ratio. It differs in three details
(docs/fidelity.md):

- Its schedule counts from step 1, so its first update has a learning rate above 0 and its last one 0.
- It adds eps to the root of the second moment before the bias correction, so eps counts more in the first steps.
- It adds the weight decay to the update before the bias correction scales both, so the decay is scaled too.
"""

import torch
from torch import Tensor, nn

from ray_distill.student.training.train_settings import TrainSettings


def schedule_factor(step: int, total_steps: int, warmup_fraction: float) -> float:
    """Return the learning-rate factor of a 0-based optimiser step: linear warm-up from 0, then linear decay to 0.

    Step 0 has factor 0, as in transformers' ``get_linear_schedule_with_warmup``. The published schedule (S3PRL's
    ``WarmupLinearSchedule``) has the factor of step + 1 here, up to rounding of the number of warm-up steps.
    """
    warmup = int(total_steps * warmup_fraction)
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup))


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """Return AdamW, fused on a GPU, with weight decay on all parameters but biases, as in the published parameter groups."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for n, p in named if not n.endswith("bias")], "weight_decay": settings.weight_decay},
            {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=next(model.parameters()).is_cuda,
    )


def step_if_finite(optimizer: torch.optim.AdamW, norm: Tensor) -> None:
    """Take a step of a fused optimiser unless a gradient norm is not finite. The device decides, and the host does not wait.

    Args:
        optimizer: The optimiser, with ``fused``. A step that is not taken changes nothing, as with PyTorch's loss scaling.
        norm: () float, norm of the gradients.
    """
    optimizer.found_inf = 1 - norm.isfinite().float()  # type: ignore[attr-defined]
    optimizer.step()
