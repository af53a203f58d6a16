"""Gates: their counts are those of what is removed, and a student without what they closed computes the same."""

from typing import Any

import pydantic
import pytest
import torch
from torch import Tensor

from ray_distill.student.model import student as student_module
from ray_distill.student.model.student import Student
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.pruning.gates import Gates
from ray_distill.student.pruning.prune_settings import PruneSettings
from ray_distill.student.pruning.removal import prune
from tests.tiny import sharpen_attention, tiny_student

ALL = ("channels", "heads", "units", "blocks")
LAYERS = {"attention_reuse": "none", "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_embed_dim": 40}
KINDS: dict[str, dict[str, Any]] = {
    "post-norm": {},
    "pre-norm, biases": {"layer_norm_first": True, "conv_bias": True},
    "relative": {"position": "relative"},
    "split heads": {"heads": "split", "time_reduction": "fc1"},
}


def lively(**changes: Any) -> Student:
    """Return a student in which every parameter matters."""
    torch.manual_seed(0)
    student = sharpen_attention(Student(tiny_student(**LAYERS | changes))).eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.3 * torch.randn_like(parameter)
    return student


def gates_of(config: StudentConfig, spread: float = 2.0, **changes: Any) -> Gates:
    """Return gates in eval mode, after the sparsity has risen, with log alphas that differ."""
    values = {"sparsity": 0.4, "steps": 10, "rise_steps": 5, "remove": ALL, "warmup_steps": 1} | changes
    gates = Gates(config, PruneSettings.model_validate(values), 3).eval()
    gates.step = 9
    with torch.no_grad():
        gates.log_alpha += spread * torch.randn(len(gates.log_alpha), generator=torch.Generator().manual_seed(1))
    return gates


def audio() -> tuple[Tensor, list[int]]:
    waveforms = 0.2 * torch.randn(2, 4000, generator=torch.Generator().manual_seed(2))
    return waveforms, [4000, 2500]


def parameters(student: Student) -> int:
    return sum(parameter.numel() for parameter in student.without_heads().parameters())


@pytest.mark.parametrize("parts", [ALL, ("channels",), ("heads",), ("units",), ("blocks",), ("heads", "units")])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_pruned_student_computes_what_the_gated_one_does(kind: str, parts: tuple[str, ...]) -> None:
    student = lively(**KINDS[kind])
    gates = gates_of(student.config, remove=parts, sparsity=0.09 if parts == ("channels",) else 0.25)
    gates.set_gates(student)
    gated = student(*audio())
    pruned = prune(student, gates)
    found = pruned(*audio())
    for row, frames in enumerate(found.num_frames.tolist()):
        for ours, theirs in zip(found[:2], gated[:2], strict=True):
            torch.testing.assert_close(ours[row, :, :frames], theirs[row, :, :frames], rtol=1e-5, atol=1e-5)
    counted = gates.count_parameters((gates.hard_values() > 0).double())
    assert parameters(pruned) == round(float(counted)) < gates.total == parameters(student)


@pytest.mark.parametrize("sparsity", [0.1, 0.4, 0.7, 0.8])
def test_hard_gates_meet_the_sparsity(sparsity: float) -> None:
    student = lively(encoder_ffn_embed_dim=200)
    for spread in (0.0, 5.0):
        gates = gates_of(student.config, spread, sparsity=sparsity, remove=("channels", "heads", "units"))
        pruned = prune(student, gates)
        assert 1 - parameters(pruned) / gates.total == pytest.approx(sparsity, abs=0.02)


def test_everything_can_go_but_a_channel_of_each_convolution() -> None:
    student = lively()
    with pytest.raises(ValueError, match="the highest sparsity is 0.8") as refused:
        gates_of(student.config, sparsity=0.99)
    assert "\n" not in str(refused.value)
    gates = gates_of(student.config, sparsity=float(str(refused.value).split("highest sparsity is ")[1].split(";")[0]))
    pruned = prune(student, gates)
    assert [channels for channels, _, _ in pruned.config.conv_layers] == [1] * 6 + [8]
    assert pruned.config.layer_heads == pruned.config.layer_ffn_dims == (0, 0, 0)
    assert pruned(*audio()).hidden_states.isfinite().all()


def test_the_expected_number_is_the_mean_over_draws() -> None:
    gates = gates_of(lively().config).train()
    with torch.no_grad():
        expected = float(gates.count_parameters(gates.open_probabilities()))
        counts = []
        for gates.step in range(3000):
            counts.append(float(gates.count_parameters((gates.values() > 0).double())))
    error = torch.tensor(counts).std() / len(counts) ** 0.5
    assert abs(sum(counts) / len(counts) - expected) < 4 * float(error)
    assert float(gates.expected_sparsity().detach()) == pytest.approx(1 - expected / gates.total)


def test_draws_follow_from_seed_and_step() -> None:
    config = lively().config
    one, two = gates_of(config).train(), gates_of(config).train()
    torch.rand(5)  # Another state of the global generator, as on another rank.
    assert torch.equal(one.values(), two.values())
    with torch.no_grad():
        assert float(one.values().min()) >= 0 and float(one.values().max()) <= 1
    two.step = 8
    assert not torch.equal(one.values(), two.values())
    assert torch.equal(one.eval().values(), one.values())


def test_the_target_rises_and_multipliers_rise_with_the_gap() -> None:
    gates = gates_of(lively().config, sparsity=0.4, steps=100, rise_steps=10)
    found = []
    for gates.step in (0, 5, 10, 99):
        found.append(gates.target())
    assert found == pytest.approx([0.0, 0.2, 0.4, 0.4])
    gap = float(gates.expected_sparsity().detach()) - 0.4
    assert gap < 0
    gates.penalty().backward()
    assert gates.multipliers.grad is not None
    # An optimiser goes against the gradient, so the multipliers rise in the direction of the gap.
    assert gates.multipliers.grad.tolist() == pytest.approx([-gap, -(gap**2)])


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_the_expected_sparsity_reaches_the_target_against_another_loss(sparsity: float) -> None:
    gates = gates_of(lively().config, 0.0, sparsity=sparsity, steps=600, rise_steps=100).train()
    groups = [{"params": list(gates.parameters()), "lr": 0.05}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for gates.step in range(600):
        optimizer.zero_grad()
        # A loss that opens gates, as distillation does, and some more than others.
        worth = torch.linspace(0.5, 1.5, len(gates.log_alpha))
        (gates.penalty() - 0.5 * (worth * gates.open_probabilities()).mean()).backward()
        optimizer.step()
    assert float(gates.expected_sparsity().detach()) == pytest.approx(sparsity, abs=0.02)


def test_gradients_reach_gates_and_weights() -> None:
    student = lively().train()
    gates = gates_of(student.config).train()
    gates.set_gates(student)
    student(*audio()).projections.square().sum().backward()
    assert gates.log_alpha.grad is not None
    # A draw that is cut off at 0 or 1 has no gradient; the others do, in every group.
    for part in gates.log_alpha.grad.split(gates.sizes):
        assert part.isfinite().all()
    assert (gates.log_alpha.grad != 0).float().mean() > 0.1


def test_checkpointed_activations_see_the_same_gates() -> None:
    found = []
    still = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "dropout_input": 0.0}
    for wanted in (False, True):
        student = lively(**still).train()
        student.checkpoint_activations = wanted
        gates = gates_of(student.config).train()
        gates.set_gates(student)
        student(*audio()).projections.square().sum().backward()
        found.append([gates.log_alpha.grad, *(p.grad for n, p in student.named_parameters() if n != "mask_embedding")])
    for plain, other in zip(*found, strict=True):
        assert torch.equal(plain, other)


def test_compiled_layers_use_the_gates_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = torch.compile(student_module._run_layer, dynamic=True, backend="eager")
    monkeypatch.setattr(student_module, "compiled_layer", lambda: traced)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    still = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "dropout_input": 0.0}
    student = lively(**still).train()
    gates = gates_of(student.config).train()
    for gates.step in (3, 4, 5):
        gates.set_gates(student)
        student.compile_layers = False
        plain = student(*audio()).hidden_states
        student.compile_layers = True
        torch.testing.assert_close(student(*audio()).hidden_states, plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(
    ("student", "settings", "message"),
    [
        ({}, {"sparsity": 1.0}, "less than 1"),
        ({}, {"sparsity": 0.0}, "greater than 0"),
        ({}, {"rise_steps": 11}, "rise_steps 11 is more than train.prune.steps 10"),
        ({}, {"warmup_steps": 11}, "warmup_steps 11 is more than train.prune.steps 10, so the learning rate would not"),
        ({}, {"remove": ("heads", "heads")}, "names a part twice"),
        ({}, {"remove": ()}, "at least 1 item"),
        ({"layer_type": "conformer"}, {}, "student.layer_type conformer can't be pruned"),
        ({"attention_reuse": "alternate"}, {}, "remove heads does not go with student.attention_reuse"),
        ({"attention_reuse": "alternate"}, {"remove": ("blocks",)}, "remove blocks does not go with"),
        ({"conv_norm": "layer_norm"}, {}, "channels needs student.conv_norm group_norm"),
    ],
)
def test_what_cant_be_pruned_is_refused(student: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, pydantic.ValidationError), match=message):
        gates_of(tiny_student(**LAYERS | student), **settings)


def test_hidden_units_of_layers_with_reused_maps() -> None:
    student = lively(attention_reuse="alternate")
    gates = gates_of(student.config, remove=("units", "channels"), sparsity=0.3)
    pruned = prune(student, gates)
    assert pruned.config.reuses == student.config.reuses
    assert parameters(pruned) == round(float(gates.count_parameters((gates.hard_values() > 0).double())))
