"""The student: reuse, padding, masking, gradient scaling, initialisation, and refused configurations and inputs."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from ray_distill.student import Student, StudentConfig, StudentOutput
from ray_distill.student.model import student as student_module
from ray_distill.student.model.scaled_gradient import scale_gradient

from ...tiny import sharpen_attention, tiny_student

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
TINY = tiny_student(
    conv_layers=((8, 10, 5), (16, 1, 1), *((16, 3, 2),) * 4, (24, 1, 1), *((24, 2, 2),) * 2),
    encoder_layers=4,
    encoder_embed_dim=24,
    encoder_ffn_embed_dim=40,
    encoder_attention_heads=4,
    conv_pos=16,
    conv_pos_groups=4,
    target_dim=48,
)
PRUNED = {"attention_reuse": "none", "layer_heads": (3, 0, 1, 0), "layer_ffn_dims": (40, 9, 0, 0)}
KINDS = {
    "paper": TINY,
    "released": TINY.model_copy(update={"reuse_behaviour": "released"}),
    "none": TINY.model_copy(update={"attention_reuse": "none"}),
    "layer_norm": TINY.model_copy(update={"conv_norm": "layer_norm", "conv_bias": True}),
    "norm_first": TINY.model_copy(update={"layer_norm_first": True}),
    "deep_position": TINY.model_copy(update={"conv_pos_depth": 3}),
    "rotary": TINY.model_copy(update={"position": "rotary"}),
    "pruned": TINY.model_copy(update=PRUNED),
    "pruned, pre-norm": TINY.model_copy(update=PRUNED | {"layer_norm_first": True}),
    "pruned, relative": TINY.model_copy(update=PRUNED | {"position": "relative"}),
    "conformer": TINY.model_copy(update={"layer_type": "conformer", "depthwise_kernel": 5, "position": "relative"}),
    "fc1": TINY.model_copy(update={"time_reduction": "fc1"}),
    "fc2": TINY.model_copy(update={"time_reduction": "fc2", "time_reduction_index": 2, "time_reduction_factor": 3}),
    "conv1d": TINY.model_copy(update={"time_reduction": "conv1d", "heads": "split", "split_dim": 7}),
    "no_heads": TINY.model_copy(update={"time_reduction": "conv1d", "heads": "none"}),
}


def lively(config: StudentConfig) -> Student:
    """Return a student in eval mode whose attention is far from uniform, so that confused maps or rows are noticed."""
    torch.manual_seed(0)
    return sharpen_attention(Student(config).eval())


def batch(lengths: list[int], width: int, filling: float = 0.0) -> Tensor:
    """Return loud and quiet utterances, one fixed waveform for each length."""
    waveforms = torch.full((len(lengths), width), filling)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(length)
        waveforms[row, :length] = torch.randn(length, generator=generator) * (0.02 if length % 2 else 0.5)
    return waveforms


@pytest.mark.parametrize("kind", KINDS)
def test_an_utterance_gives_the_same_alone_padded_and_reordered(kind: str) -> None:
    student = lively(KINDS[kind])
    lengths = [1600, 16_000, 400, 7_777, 320_000 // 8 + 1]
    width = max(lengths) + 1234
    order = [3, 0, 4, 2, 1]
    with torch.no_grad():
        together = student(batch(lengths, width), torch.tensor(lengths))
        reordered = student(batch([lengths[i] for i in order], width), torch.tensor([lengths[i] for i in order]))
        noisy = student(batch(lengths, width, filling=0.7), torch.tensor(lengths))
        for row, length in enumerate(lengths):
            alone = student(batch([length], length), torch.tensor([length]))
            frames = int(alone.num_frames)
            assert frames == (length - 400) // 320 + 1 == int(together.num_frames[row])
            for name in ("hidden_states", "projections"):
                expected = getattr(alone, name)[0]
                if not expected.numel():  # The student has no heads.
                    continue
                for other, at in ((together, row), (reordered, order.index(row)), (noisy, row)):
                    found = getattr(other, name)[at, :, :frames]
                    assert (found - expected).norm() / expected.norm() < 1e-4
        assert all(torch.isfinite(values).all() for values in noisy)


@pytest.mark.parametrize("kind", ["paper", "released", "none"])
def test_gradients_do_not_depend_on_padding(kind: str) -> None:
    # In float64, because the keys' biases do not change the softmax: their gradients are rounding errors around zero.
    student = lively(KINDS[kind]).double()
    gradients = []
    for width in (4000, 9000):
        student.zero_grad()
        mask = torch.zeros(1, (width - 80) // 320, dtype=torch.bool)
        out = student(batch([4000], width, filling=0.3).double(), torch.tensor([4000]), mask)
        out.projections[:, :, :12].square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in student.named_parameters()})
    for name, expected in gradients[0].items():
        largest = float(expected.abs().max())
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=1e-4 * largest + 1e-10)


def explicit_layers(student: Student, waveforms: Tensor, softmaxes_of_a_reused_map: int) -> list[Tensor]:
    """Return the outputs for an unpadded batch with explicit (T, T) maps, from the layers' definitions alone."""
    config = student.config
    x = waveforms[:, None]
    for number, block in enumerate(student.conv_blocks):
        x = block.conv(x)
        if number == 0:
            x = F.group_norm(x, x.shape[1], block.norm.weight, block.norm.bias)
        x = F.gelu(x)
    x = student.feature_norm(x.transpose(1, 2))
    x = student.encoder_norm(x + student.position(x))
    heads, layers, weights = config.encoder_attention_heads, [], None
    split = lambda y: y.unflatten(-1, (heads, -1)).transpose(1, 2)  # noqa: E731
    for layer, reuses in zip(student.layers, config.reuses, strict=True):
        attention = layer.attention
        if not reuses:
            q, k = split(attention.query(x)), split(attention.key(x))
            weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        applied = weights
        for _ in range(softmaxes_of_a_reused_map - 1 if reuses else 0):
            applied = applied.softmax(-1)
        x = layer.attention_norm(x + attention.out((applied @ split(attention.value(x))).transpose(1, 2).flatten(2)))
        x = layer.final_norm(x + layer.down(F.gelu(layer.up(x))))
        layers.append(x)
    return layers


@pytest.mark.parametrize(("kind", "softmaxes"), [("paper", 1), ("released", 2), ("none", 1)])
def test_reuse_against_explicit_maps(kind: str, softmaxes: int) -> None:
    # In float64: these weights amplify float32's rounding errors.
    student = lively(KINDS[kind].model_copy(update={"layer_grad_scale": False})).double()
    waveforms = torch.randn(3, 6000, dtype=torch.float64)
    found = student(waveforms, torch.full((3,), 6000)).hidden_states
    expected = torch.stack(explicit_layers(student, waveforms, softmaxes), 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    used = [parameter for name, parameter in student.named_parameters() if not name.startswith(("heads", "mask"))]
    gradient = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, used, gradient), torch.autograd.grad(expected, used, gradient), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_a_pattern_reuses_the_last_computed_map() -> None:
    student = lively(TINY.model_copy(update={"attention_reuse": (False, True, True, False)}))
    assert [hasattr(layer.attention, "query") for layer in student.layers] == [True, False, False, True]
    student, waveforms = student.double(), torch.randn(2, 6000, dtype=torch.float64)
    with torch.no_grad():
        found = student(waveforms, torch.full((2,), 6000)).hidden_states
        expected = torch.stack(explicit_layers(student, waveforms, 1), 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.slow
def test_compiled_layers_change_no_number_and_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor would take minutes, so the programs that the compiler traces are run by PyTorch."""
    compiled: list[Any] = []

    def trace(function: Any, *, dynamic: bool) -> Any:
        compiled.append(function)
        return real_compile(function, dynamic=dynamic, backend="eager")

    real_compile = torch.compile
    monkeypatch.setattr(torch, "compile", trace)
    monkeypatch.setattr(student_module, "compiled_layer", cache(student_module.compiled_layer.__wrapped__))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = tiny_student(encoder_layers=6, attention_reuse="alternate", attention_dropout=0.0, dropout=0.0)
    student = sharpen_attention(Student(config.model_copy(update={"activation_dropout": 0.0, "dropout_input": 0.0})))
    names = list(student.state_dict())
    student.train().checkpoint_activations = True
    found = []
    for wanted in (False, True):
        student.compile_layers = wanted
        student.zero_grad()
        outputs = [student(batch(sizes, max(sizes)), sizes).projections for sizes in ([4000, 2500], [6000, 3000, 5000])]
        sum(out.square().sum() for out in outputs).backward()
        found.append([*outputs, *(p.grad for n, p in student.named_parameters() if n != "mask_embedding")])
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(plain, other)
    assert compiled == [student_module._run_layer]
    # Six layers of two kinds and two sizes of batches; the first layer has another input.
    assert 2 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    assert not torch._dynamo.utils.counters["graph_break"]
    assert list(student.state_dict()) == names
    traced = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    student.eval()(batch([4000], 4000))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == traced, "validation is not compiled"
    student.train().layers[1].dropout.rate = student.layers[0].attention.dropout = 0.5
    student.checkpoint_activations = False
    dropped = [student(batch([4000, 2500], 4000), [4000, 2500]).projections for _ in range(2)]
    assert not torch.equal(*dropped)
    assert not torch._dynamo.utils.counters["graph_break"], "dropout can be traced"


def test_layers_of_all_widths_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own limit is eight programs; after that, layers would silently run uncompiled."""
    traced = cache(lambda: torch.compile(student_module._run_layer, dynamic=True, backend="eager"))
    student_module.compiled_layer()  # Raises the limit.
    monkeypatch.setattr(student_module, "compiled_layer", traced)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    widths = tuple(range(10, 20))
    still = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "dropout_input": 0.0}
    config = tiny_student(encoder_layers=10, attention_reuse="none", layer_ffn_dims=widths, **still)
    student = Student(config).train()
    plain = student(batch([4000], 4000)).hidden_states
    student.compile_layers = True
    torch.testing.assert_close(student(batch([4000], 4000)).hidden_states, plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 10


def test_a_pruned_layer_is_one_whose_missing_parts_give_nothing() -> None:
    torch.manual_seed(0)
    pruned, whole = (
        Student(TINY.model_copy(update=PRUNED)),
        Student(TINY.model_copy(update={"attention_reuse": "none"})),
    )
    sharpen_attention(pruned)
    weights = whole.state_dict()
    for name, tensor in weights.items():
        if ".attention.out." in name or ".down." in name:
            tensor.zero_()
    for name, tensor in pruned.state_dict().items():
        weights[name][tuple(map(slice, tensor.shape))] = tensor
    whole.load_state_dict(weights)
    waveforms, lengths = batch([4000, 2500], 4000), [4000, 2500]
    with torch.no_grad():
        found, expected = (student.eval()(waveforms, lengths).hidden_states for student in (pruned, whole))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1, :, :7], expected[1, :, :7])


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_activations_change_no_number(kind: str) -> None:
    student = lively(KINDS[kind]).train()
    waveforms, lengths = batch([4000, 2500], 4000), torch.tensor([4000, 2500])
    found, kept = [], []
    for wanted in (False, True):
        student.checkpoint_activations = wanted
        student.zero_grad()
        torch.manual_seed(0)  # The same units are dropped.
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1], lambda x: x
        ):
            out = student(waveforms, lengths)
        kept.append(sum(sizes))
        (out.projections.square().sum() + out.hidden_states.square().sum()).backward()
        found.append([out.projections, *(p.grad for n, p in student.named_parameters() if n != "mask_embedding")])
    for plain, checkpointed in zip(*found, strict=True):
        assert torch.equal(plain, checkpointed)
    assert kept[1] < (0.9 if kind.startswith("pruned") else 0.8) * kept[0]
    assert "checkpoint_activations" not in str(student.state_dict().keys())


@pytest.mark.parametrize("kind", ["paper", "released"])
def test_dropout_spares_a_reused_map_and_what_is_reused(kind: str) -> None:
    still = {"dropout": 0.0, "activation_dropout": 0.0, "dropout_input": 0.0, "attention_dropout": 0.5}
    student = lively(KINDS[kind].model_copy(update=still))
    inputs = torch.randn(2, 6000), torch.full((2,), 6000)
    first, second = student.layers[0].attention, student.layers[1].attention
    x = torch.randn(2, 9, TINY.encoder_embed_dim)
    with torch.no_grad():
        evaluated, shared = first(x, None, None)
        applied = second(x, None, shared)[0]
        student.train()
        dropped, shared = first(x, None, None)
        assert (dropped - evaluated).abs().max() > 1e-2
        torch.testing.assert_close(second(x, None, shared)[0], applied)
        assert not torch.equal(student(*inputs).hidden_states, student(*inputs).hidden_states)


def test_scale_gradient() -> None:
    x = torch.randn(3, requires_grad=True)
    y = scale_gradient(x, 0.25)
    torch.testing.assert_close(y, x)
    (y * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.25, 0.5, 0.75]))


def test_layer_gradient_scaling_follows_the_rule() -> None:
    # g_i = (N-i)/(N-i+1) on what layer i passes down, and a further 1 - g_i on what its head passes down.
    # Without reuse: a reused map also sends gradients to an earlier layer's queries and keys, past the layers between.
    plain = lively(TINY.model_copy(update={"attention_reuse": "none", "layer_grad_scale": False}))
    scaled = lively(TINY.model_copy(update={"attention_reuse": "none"}))
    count = TINY.encoder_layers
    g = [(count - i) / (count - i + 1) for i in range(count)]
    waveforms, lengths = torch.randn(1, 4000), torch.tensor([4000])
    for head in range(count):
        gradients = []
        for student in (plain, scaled):
            student.zero_grad()
            student(waveforms, lengths).projections[:, head].square().sum().backward()
            gradients.append([layer.attention.value.weight.grad for layer in student.layers])
        for layer in range(head + 1):
            factor = (1 - g[head]) * math.prod(g[layer : head + 1])
            torch.testing.assert_close(gradients[1][layer], factor * gradients[0][layer], rtol=1e-4, atol=1e-6)
        assert not any(gradient.any() for gradient in gradients[1][head + 1 :])
    # Values are not scaled.
    torch.testing.assert_close(plain(waveforms, lengths).projections, scaled(waveforms, lengths).projections)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_used(kind: str) -> None:
    # DistributedDataParallel needs gradients of all parameters, even for a batch without masked frames.
    student = Student(KINDS[kind])
    out = student(torch.randn(2, 4000), torch.tensor([4000, 3000]), torch.zeros(2, 12, dtype=torch.bool))
    (out.projections.sum() + out.hidden_states.sum()).backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == []


def test_the_mask_replaces_frames_and_spares_the_rest_of_the_batch() -> None:
    student = lively(TINY)
    waveforms, lengths = batch([4000, 4000], 4000), torch.tensor([4000, 4000])
    waveforms[1] *= -0.3
    everything = torch.tensor([[True], [False]]).expand(2, 12)
    with torch.no_grad():
        masked, plain = student(waveforms, lengths, everything), student(waveforms, lengths)
        other = student(waveforms.roll(700, 1), lengths, everything)
    torch.testing.assert_close(masked.hidden_states[1], plain.hidden_states[1])
    # With all frames masked, the output does not depend on the waveform.
    torch.testing.assert_close(masked.hidden_states[0], other.hidden_states[0])


def test_encode_gives_the_hidden_states_without_heads() -> None:
    student = lively(TINY)
    waveforms, lengths = torch.randn(2, 4000), torch.tensor([4000, 2000])
    with torch.no_grad():
        hidden_states, num_frames = student.encode(waveforms, lengths)
        out = student(waveforms, lengths)
    assert torch.equal(hidden_states, out.hidden_states)
    assert torch.equal(num_frames, out.num_frames)
    assert out.projections.shape == (2, 4, 12, 48)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_layers_alone_are_bit_equal(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student = lively(KINDS[kind])
    waveforms, lengths = batch([4000, 2100], 4000), torch.tensor([4000, 2100])
    with torch.no_grad():
        layers, heads, _ = student.layer_outputs(waveforms, lengths)
        monkeypatch.setattr(student.layers[3], "forward", lambda *_: 1 / 0)  # Never called.
        first, first_heads, _ = student.layer_outputs(waveforms, lengths, num_layers=3)
    assert len(first) == 3 and all(torch.equal(a, b) for a, b in zip(first, layers[:3], strict=True))
    if KINDS[kind].heads == "split":
        assert first_heads == []
    else:
        assert all(torch.equal(a, b) for a, b in zip(first_heads, heads[:3], strict=True))
    for number in (0, 5):
        with pytest.raises(ValueError, match=f"num_layers must be from 1 to 4, not {number}"):
            student.encode(waveforms, lengths, num_layers=number)


def test_a_teacher_as_wide_as_the_student_needs_no_heads() -> None:
    student = Student(TINY.model_copy(update={"target_dim": 24})).eval()
    out = student(torch.randn(1, 4000), torch.tensor([4000]))
    assert torch.equal(out.projections, out.hidden_states)
    assert not any(name.startswith("heads") for name, _ in student.named_parameters())


def test_initialisation_as_published() -> None:
    torch.manual_seed(0)
    config = TINY.model_copy(update={"encoder_embed_dim": 96, "encoder_ffn_embed_dim": 128, "conv_pos": 64})
    student = Student(config)
    for layer in student.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
                assert abs(float(module.weight.detach().mean())) < 1e-3
                assert not module.bias.any()
    for block in student.conv_blocks[2:]:
        fan_in = block.conv.weight[0].numel()
        assert float(block.conv.weight.detach().std()) == pytest.approx(math.sqrt(2 / fan_in), rel=0.1)
    assert float(student.position.conv.weight.detach().std()) == pytest.approx(math.sqrt(4 / (64 * 96)), rel=0.05)
    assert student.position.conv.parametrizations.weight.original0.shape == (1, 1, 64)
    assert not student.position.conv.bias.any()
    # PyTorch's default: uniform within 1 / sqrt(inputs).
    for linear, inputs in ((student.projection, 24), *((head, 96) for head in student.heads)):
        assert float(linear.weight.detach().abs().max()) == pytest.approx(inputs**-0.5, rel=0.02)
        assert linear.bias.any()
    embedding = student.mask_embedding.detach()
    assert 0 <= float(embedding.min()) < 0.1
    assert 0.9 < float(embedding.max()) < 1


def test_projection_only_where_widths_differ() -> None:
    assert not any(name.startswith("projection") for name, _ in Student(TINY).named_parameters())
    wider = TINY.model_copy(update={"encoder_embed_dim": 32})
    assert Student(wider).projection.weight.shape == (32, 24)


def test_defaults_are_armhubert_s() -> None:
    described = yaml.safe_load((CONFIGS / "armhubert-s-100.yaml").read_text())
    assert StudentConfig.model_validate(described["student"]) == StudentConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoder_attention_heads": 5}, "432 is not a multiple of encoder_attention_heads 5"),
        ({"conv_pos_groups": 7}, "432 is not a multiple of conv_pos_groups 7"),
        ({"attention_reuse": (False, True)}, "attention_reuse has 2 entries, but encoder_layers is 12"),
        ({"attention_reuse": (True,) * 12}, "first layer has no attention map to reuse"),
        ({"conv_layers": ()}, "conv_layers needs at least one layer"),
        ({"conv_layers": ((8, 0, 5),)}, "all numbers must be positive"),
        ({"dropout": 1.0}, "dropout"),
        ({"attention_heads": 12}, "attention_heads"),
        ({"reuse_behaviour": "both"}, "'paper' or 'released'"),
        ({"position": "rotary", "encoder_attention_heads": 48}, "heads of even width, not 9"),
        ({"layer_type": "conformer", "depthwise_kernel": 4}, "depthwise_kernel must be odd, not 4"),
        ({"layer_type": "conformer", "layer_norm_first": True}, "layer_norm_first applies to Transformer layers only"),
        (
            {"time_reduction": "fc1", "time_reduction_index": 12},
            "leaves no layer after the reduction; it must be below encoder_layers, 12",
        ),
        ({"time_reduction": "fc1", "time_reduction_index": 1}, "layer 2 follows the time reduction"),
        ({"layer_heads": (1, 2), "attention_reuse": "none"}, "layer_heads has 2 entries, but encoder_layers is 12"),
        ({"layer_ffn_dims": (1, -2)}, "greater than or equal to 0"),
        ({"layer_heads": (1,) * 12}, "layer_heads does not go with attention_reuse"),
        ({"layer_ffn_dims": (1,) * 12, "layer_type": "conformer"}, "layer_ffn_dims applies to Transformer layers only"),
        ({"layer_ffn_dims": (10**9,) * 12}, "the limits are 10,000,000,000 parameters"),
    ],
)
def test_impossible_students_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        StudentConfig.model_validate(values)


@pytest.mark.parametrize(
    ("waveforms", "lengths", "mask", "message"),
    [
        (
            torch.zeros(1, 4000).numpy(),
            None,
            None,
            "a float tensor .* not of the type ndarray; torch.from_numpy makes one",
        ),
        ([[0.0] * 4000], None, None, "not of the type list"),
        (torch.zeros(4000), torch.tensor([4000]), None, r"waveforms must be \(B, S\)"),
        (torch.zeros(2, 4000), torch.tensor([4000]), None, r"lengths \(B,\)"),
        (torch.zeros(1, 4000), torch.tensor([4000.0]), None, "lengths int"),
        (torch.zeros(1, 4000).short(), torch.tensor([4000]), None, "waveforms must be float"),
        (torch.zeros(2, 4000), torch.tensor([4000, 399]), None, r"from 400 samples \(one frame\) to the batch's 4000"),
        (torch.zeros(1, 4000), torch.tensor([4001]), None, "to the batch's 4000"),
        (torch.zeros(0, 4000), torch.zeros(0, dtype=torch.int64), None, "has no waveforms"),
        (torch.zeros(1, 4000), torch.tensor([4000]), torch.zeros(1, 13).bool(), r"shape \(1, 12\)"),
        (torch.zeros(1, 4000), torch.tensor([4000]), torch.zeros(1, 12), "frame_mask must be bool"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    waveforms: Any, lengths: Tensor | None, mask: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Student(TINY)(waveforms, lengths, mask)


def test_the_shortest_waveform_follows_the_front_end() -> None:
    config = TINY.model_copy(update={"conv_layers": ((24, 10, 5), (24, 3, 2))})
    assert TINY.receptive_field == 400
    assert config.receptive_field == 20
    assert Student(config)(torch.zeros(1, 20), torch.tensor([20])).num_frames.tolist() == [1]
    with pytest.raises(ValueError, match="from 20 samples"):
        Student(config)(torch.zeros(1, 20), torch.tensor([19]))


def test_lengths_may_be_left_out() -> None:
    student, waveforms = Student(StudentConfig(encoder_layers=2)).eval(), torch.randn(2, 4000)
    with torch.no_grad():
        found, expected = student(waveforms), student(waveforms, torch.tensor([4000, 4000]))
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(student.encode(waveforms)[0], expected.hidden_states)
    with pytest.raises(ValueError, match=r"waveforms must be \(B, S\) and lengths \(B,\), not \(4000,\) and None"):
        student(waveforms[0])


def test_layers_are_numbered_from_one() -> None:
    out = StudentOutput(torch.arange(6.0).view(1, 2, 3, 1), torch.zeros(1, 0, 3, 4), torch.tensor([3]))
    assert out.layer(2).flatten().tolist() == [3, 4, 5]
    for number in (0, 3, -1):
        with pytest.raises(ValueError, match=f"layers 1 to 2, not {number}"):
            out.layer(number)


def test_representations_say_what_differs() -> None:
    config = StudentConfig(encoder_layers=2, heads="none")
    assert repr(config) == "StudentConfig(encoder_layers=2, heads='none')"
    assert eval(repr(config)) == config
    shown = repr(Student(config)).splitlines()[1]
    assert "9 convolutions, 2 transformer layers of width 432 (1 reuse attention maps), 0 heads of width 768" in shown
    assert f"{sum(p.numel() for p in Student(config).parameters()):,} parameters" in shown
