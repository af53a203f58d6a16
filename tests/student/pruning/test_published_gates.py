"""Numbers of DPHuBERT's own code (github.com/pyf98/DPHuBERT at commit c18093fe), in which its last convolution had no gates.

There a model of these sizes has 4,472 parameters and here 4,480: its encoder has 8 fixed scales, and a student a mask embedding of 16
values. So the numbers of removed parameters are compared.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.objectives.layer_loss import CosineTerm, distillation_loss
from ray_distill.student.pruning import gates as gates_module
from ray_distill.student.pruning.gates import Gates
from ray_distill.student.pruning.prune_settings import PruneSettings
from ray_distill.student.training.optimizer import schedule_factor

CONFIG = StudentConfig(
    conv_layers=((6, 10, 5), (6, 3, 2), (5, 3, 2), (6, 3, 2), (6, 3, 2), (5, 2, 2), (8, 2, 2)),
    encoder_layers=2,
    encoder_embed_dim=16,
    encoder_ffn_embed_dim=12,
    encoder_attention_heads=4,
    attention_reuse="none",
    conv_pos=8,
    conv_pos_groups=4,
    target_dim=16,
)


def gates(spread: float, *parts: str, **changes: float) -> Gates:
    """Return gates with log alpha 2 + spread x sin(0, 1, 2, ...), in the order convolutions, then heads and units of each layer."""
    settings = {"sparsity": 0.5, "steps": 20, "rise_steps": 8, "warmup_steps": 5, "remove": parts} | changes
    made = Gates(CONFIG, PruneSettings.model_validate(settings), 0)
    with torch.no_grad():
        made.log_alpha.copy_(2 + spread * torch.arange(len(made.log_alpha)).float().sin())
    return made


@pytest.mark.parametrize(
    ("parts", "open_gates", "removed"),
    [
        (("channels", "heads", "units"), 59.78388977, 352.72265625),
        (("channels", "heads", "units", "blocks"), 63.16718292, 802.83935546875),
    ],
)
def test_expected_numbers_of_gates_and_parameters(parts: tuple[str, ...], open_gates: float, removed: float) -> None:
    made = gates(3.0, *parts)
    assert made.total == 4480
    assert float(made.open_probabilities().sum().detach()) == pytest.approx(open_gates, rel=1e-6)
    expected = made.total - float(made.count_parameters(made.open_probabilities().double()).detach())
    # The last bias of a part without heads or units is removed here, with the probability that all of them are closed.
    assert expected == pytest.approx(removed, abs=0.05)


def test_hard_gates_and_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    # At the sparsity that the gates expect anyway, the groups need hardly a shift. The published code rounds each on its own, so it
    # closes the sixth gate of the first group too.
    made = gates(3.0, "channels", "heads", "units", sparsity=352.7 / 4480).eval()
    made.step = 20
    hard = made.values().split(made.sizes)
    torch.testing.assert_close(
        hard[0][:5], torch.tensor([0.916827, 0.995633, 0.996576, 0.948242, 0.419582]), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(hard[6], torch.tensor([0.986675, 0.702356, 0, 0.520804]), atol=1e-6, rtol=0)
    alphas, uniform = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 2.0, 4.0]), torch.linspace(0.05, 0.95, 7)
    made = gates(3.0, "channels", "heads", "units").train()
    made.log_alpha = nn.Parameter(alphas)
    monkeypatch.setattr(gates_module.torch, "rand", lambda *_, **__: uniform.clone())
    drawn = made.values().detach()
    torch.testing.assert_close(drawn, torch.tensor([0, 0, 0.2399, 0.7150, 1, 1, 1]), atol=1e-4, rtol=0)


def test_the_multipliers_and_gates_move_as_published() -> None:
    """Twenty steps of the sparsity's loss alone. There the multipliers have a negative learning rate, here a reversed gradient."""
    made = gates(1.0, "channels", "heads", "units", sparsity=0.75).train()
    optimizer = torch.optim.AdamW([made.log_alpha, made.multipliers], weight_decay=0.0)
    losses = []
    for made.step in range(20):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * schedule_factor(made.step, 20, 5 / 20, published=True)
        optimizer.zero_grad()
        loss = made.penalty()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert losses[0] == 0
    assert [losses[10], losses[19]] == pytest.approx([0.14271504, 0.21845490], rel=1e-4)
    assert made.multipliers.tolist() == pytest.approx([-0.17619790, 0.17864233], rel=1e-5)
    assert float(made.expected_sparsity().detach()) == pytest.approx(0.03234577, rel=1e-4)
    first = [float(part[0]) for part in made.log_alpha.detach().split(made.sizes)]
    assert [first[0], first[6], first[7]] == pytest.approx([1.85722375, 2.38631535, 2.15361166], rel=1e-5)


@pytest.mark.parametrize(
    ("term", "weight", "value"), [("plain", 1.0, 0.7280), ("log_sigmoid", 1.0, 1.5098), ("plain", 0.0, 0.7836)]
)
def test_loss_and_gradient(term: CosineTerm, weight: float, value: float) -> None:
    """L1 minus the cosine, or plus -log sigmoid of it, averaged over layers and frames; here the plain term is 1 - cos."""
    numbers = torch.arange(2 * 3 * 5 * 4).float()
    x, y = (0.7 * numbers).sin().view(2, 3, 5, 4).requires_grad_(), (0.31 * numbers).cos().view(2, 3, 5, 4)
    found = distillation_loss(
        x,
        y,
        torch.tensor([5, 5]),
        kind="l1",
        cosine_weight=weight,
        cosine_term=term,
        hint_weight=1 / 3,
        final_weight=1 / 3,
    ).total
    assert float(found.detach()) - weight * (term == "plain") == pytest.approx(value, abs=1e-4)
    if term == "plain" and weight:
        found.backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad[0, 0, 0], Tensor([-0.0217, -0.0133, 0.0094, 0.0108]), atol=1e-4, rtol=0)
        torch.testing.assert_close(x.grad[1, 2, 4], Tensor([-0.0116, 0.0080, 0.0096, 0.0059]), atol=1e-4, rtol=0)


def test_the_learning_rate_rises_and_falls_as_published_one_step_later() -> None:
    published = [1 / 3, 2 / 3, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7, 0]
    assert [schedule_factor(step, 10, 3 / 10, published=True) for step in range(10)] == pytest.approx(published)
    assert [schedule_factor(step, 10, 3 / 10) for step in range(1, 10)] == pytest.approx(published[:-1])
    assert math.isclose(gates_module._SHIFT, 1.598596848532247)
