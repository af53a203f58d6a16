"""Each option of the architecture, compared with an independent computation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_distill.student import Student
from ray_distill.student.model.attention import Attention, AttentionMap
from ray_distill.student.model.position_encoding import apply_rotary, relative_shift, relative_table
from ray_distill.student.model.time_reduction import TimeReduction

from ...tiny import sharpen_attention, tiny_student

WIDTH = 12
BASE: dict[str, Any] = {
    "encoder_layers": 4,
    "encoder_embed_dim": WIDTH,
    "encoder_ffn_embed_dim": 20,
    "attention_reuse": "none",
    "target_dim": 16,
}
LENGTHS = torch.tensor([6400, 4321])
WAVEFORMS = torch.randn(2, 6400, generator=torch.Generator().manual_seed(0)) * 0.3


def student(**options: Any) -> Student:
    torch.manual_seed(0)
    return sharpen_attention(Student(tiny_student(**BASE | options)).eval(), 0.4)


@pytest.mark.parametrize("kind", ["fc1", "fc2", "conv1d"])
def test_time_reduction_sees_each_group_of_frames_and_nothing_else(kind: Any) -> None:
    torch.manual_seed(0)
    reduction = TimeReduction(WIDTH, kind, 3)
    x = torch.randn(1, 7, WIDTH)
    reduced = reduction(x, None)
    assert reduced.shape == (1, 3, WIDTH)
    for group in range(3):
        changed = x.clone()
        changed[:, 3 * group : 3 * group + 3] += 1
        moved = (reduction(changed, None) - reduced).abs().amax(-1)[0] > 1e-6
        assert moved.tolist() == [number == group for number in range(3)]
    # The last group is padded with zeros, and so are padded frames.
    padded = F.pad(x, (0, 0, 0, 4), value=9.0)
    found = reduction(padded, (torch.arange(11) >= 7)[None, :, None])
    torch.testing.assert_close(found[:, :3], reduced)
    assert reduction.num_frames(torch.tensor([1, 3, 4, 7])).tolist() == [1, 1, 2, 3]


def test_conv1d_and_fc1_are_one_map() -> None:
    convolution, linear = TimeReduction(WIDTH, "conv1d", 2), TimeReduction(WIDTH, "fc1", 2)
    weight = convolution.reduce.weight.detach()
    linear.load_state_dict(
        {"reduce.weight": weight.transpose(1, 2).flatten(1), "reduce.bias": convolution.reduce.bias.detach()}
    )
    x = torch.randn(2, 9, WIDTH)
    torch.testing.assert_close(convolution(x, None), linear(x, None))


def test_layers_after_the_reduction_run_on_fewer_frames_and_heads_bring_them_back() -> None:
    made = student(time_reduction="fc1", time_reduction_index=2)
    frames = []
    for layer in made.layers:
        layer.register_forward_hook(lambda _m, given, _o: frames.append(given[0].shape[1]))
    with torch.no_grad():
        out = made(WAVEFORMS, LENGTHS)
    assert frames == [19, 19, 10, 10]
    assert out.hidden_states.shape == (2, 4, 19, WIDTH) and out.projections.shape == (2, 4, 19, 16)
    # A reduced frame is repeated for both of its frames; the head's frames differ.
    late = out.hidden_states[0, 3]
    torch.testing.assert_close(late[0:18:2], late[1:19:2], rtol=0, atol=0)
    assert (out.hidden_states[0, 1, 0:18:2] - out.hidden_states[0, 1, 1:19:2]).abs().max() > 0.1
    assert (out.projections[0, 3, 0:18:2] - out.projections[0, 3, 1:19:2]).abs().max() > 0.01
    expand = made.upsamplers["3"].expand
    expected = F.linear(
        F.conv_transpose1d(late[::2].t()[None], expand.weight, expand.bias, stride=2)[0].t()[:19],
        made.heads[3].weight,
        made.heads[3].bias,
    )
    torch.testing.assert_close(out.projections[0, 3], expected)


def test_split_heads_predict_several_layers_from_the_last() -> None:
    made = student(heads="split", split_heads=3, split_dim=5)
    with torch.no_grad():
        out = made(WAVEFORMS, LENGTHS)
        inner = F.gelu(made.split(out.hidden_states[:, -1])).unflatten(-1, (3, 5))
        expected = torch.stack([head(inner[..., number, :]) for number, head in enumerate(made.heads)], 1)
    assert out.projections.shape == (2, 3, 19, 16)
    torch.testing.assert_close(out.projections, expected)
    assert made.config.num_predictions == 3


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_heads_on_some_layers_and_of_two_layers(activation: str) -> None:
    made = student(head_layers=(2, 4), head_dim=7, head_activation=activation)
    with torch.no_grad():
        out = made(WAVEFORMS, LENGTHS)
        expected = torch.stack(
            [
                made.heads[k](getattr(F, activation)(made.inner_heads[k](out.hidden_states[:, layer - 1])))
                for k, layer in enumerate((2, 4))
            ],
            1,
        )
        _, lower, _ = made.layer_outputs(WAVEFORMS, LENGTHS, num_layers=3)
    torch.testing.assert_close(out.projections, expected)
    assert (made.config.num_predictions, made.config.layers_with_heads) == (2, (2, 4))
    assert [x.shape[-1] for x in lower] == [7], "with fewer layers there are inputs of their heads only"
    linear = student(head_layers=(1, 4))
    with torch.no_grad():
        out = linear(WAVEFORMS, LENGTHS)
    torch.testing.assert_close(out.projections[:, 0], linear.heads[0](out.hidden_states[:, 0]))
    reduced = student(head_layers=(2, 4), time_reduction="fc1", time_reduction_index=2)
    assert list(reduced.upsamplers) == ["3"] and reduced(WAVEFORMS, LENGTHS).projections.shape == (2, 2, 19, 16)
    bare = made.without_heads()
    assert (bare.config.head_layers, bare.config.head_dim, bare.config.head_activation) == (None, None, "gelu")
    assert not [name for name in bare.state_dict() if name.startswith(("heads", "inner_heads"))]


@pytest.mark.parametrize("layers", [(), (1, 3), (4, 2), (2, 2, 4), (2, 5)])
def test_numbers_of_layers_with_heads_are_checked(layers: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match="give ascending numbers of layers that end with the last one, 4, since nothing"
    ):
        student(head_layers=layers)
    with pytest.raises(ValueError, match="head_layers and head_dim are for heads layerwise, not split; remove them"):
        student(head_layers=(2, 4), heads="split")
    with pytest.raises(ValueError, match="head_activation relu does nothing without head_dim; set head_dim, or remove"):
        student(head_activation="relu")


def test_without_heads_keeps_hidden_states_and_forgets_projections() -> None:
    made = student(heads="split", time_reduction="conv1d")
    bare = made.without_heads()
    with torch.no_grad():
        ours, theirs = bare(WAVEFORMS, LENGTHS), made(WAVEFORMS, LENGTHS)
    assert torch.equal(ours.hidden_states, theirs.hidden_states)
    assert ours.projections.shape == (2, 0, 19, 16)
    assert not bare.training
    assert not [name for name in bare.state_dict() if name.startswith(("heads", "split", "upsamplers"))]


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_layer_drop_passes_the_input_on_in_training_only(rate: float) -> None:
    made = student(layer_drop=rate, dropout=0, attention_dropout=0, activation_dropout=0, dropout_input=0)
    with torch.no_grad():
        expected = made(WAVEFORMS, LENGTHS).hidden_states
        made.train()
        torch.manual_seed(1)
        dropped = 0
        for _ in range(40):
            states = made(WAVEFORMS, LENGTHS).hidden_states
            dropped += sum(torch.equal(states[:, layer], states[:, layer - 1]) for layer in (1, 2, 3))
            if not rate:
                torch.testing.assert_close(states, expected)
    assert abs(dropped / 120 - rate) < 0.15


def test_norm_first_is_the_pre_norm_transformer() -> None:
    made = student(layer_norm_first=True)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 20, 0.0, "gelu", batch_first=True, norm_first=True).eval()
    ours = made.layers[1]
    attention = ours.attention
    layer.load_state_dict(
        {
            "self_attn.in_proj_weight": torch.cat([getattr(attention, n).weight for n in ("query", "key", "value")]),
            "self_attn.in_proj_bias": torch.cat([getattr(attention, n).bias for n in ("query", "key", "value")]),
            **{f"self_attn.out_proj.{k}": v for k, v in attention.out.state_dict().items()},
            **{f"linear1.{k}": v for k, v in ours.up.state_dict().items()},
            **{f"linear2.{k}": v for k, v in ours.down.state_dict().items()},
            **{f"norm1.{k}": v for k, v in ours.attention_norm.state_dict().items()},
            **{f"norm2.{k}": v for k, v in ours.final_norm.state_dict().items()},
        }
    )
    with torch.no_grad():
        states = made(WAVEFORMS[:1], LENGTHS[:1]).hidden_states[0]
        torch.testing.assert_close(layer(states[:1])[0], states[1], rtol=1e-4, atol=1e-5)
    # The last layer's output is normalised by the encoder's norm.
    torch.testing.assert_close(states[3].mean(-1), torch.zeros(19), atol=1e-5, rtol=0)
    assert states[2].mean(-1).abs().max() > 0.01


def attention_of(position: str) -> Attention:
    torch.manual_seed(0)
    return Attention(tiny_student(**BASE, position=position), reuses=False).eval()


def test_relative_attention_by_hand() -> None:
    attention = attention_of("relative")
    x = torch.randn(1, 5, WIDTH)
    with torch.no_grad():
        mixed, shared = attention(x, None, None)
        table = relative_table(5, WIDTH, x)
        heads = [m(x)[0].view(5, 2, 6) for m in (attention.query, attention.key, attention.value)]
        expected = torch.zeros(5, 2, 6)
        for head in range(2):
            query, key, value = (part[:, head] for part in heads)
            content, distance = attention.content_bias[head, 0], attention.distance_bias[head, 0]
            for i in range(5):
                scores = []
                for j in range(5):
                    encoded = attention.distance(table[4 - (i - j)])[6 * head : 6 * head + 6]
                    scores.append(((query[i] + content) @ key[j] + (query[i] + distance) @ encoded) / 6**0.5)
                expected[i, head] = torch.stack(scores).softmax(0) @ value
        torch.testing.assert_close(mixed[0], attention.out(expected.flatten(1)))
    assert shared.bias is not None
    # The sinusoids of distance 0 are 0 and 1.
    assert table[4].tolist() == [0.0, 1.0] * 6
    numbers = torch.arange(9.0).expand(1, 1, 5, 9)  # Column c holds distance 4 - c.
    assert relative_shift(numbers)[0, 0].tolist() == [[4.0 - i + j for j in range(5)] for i in range(5)]


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    query, key = torch.randn(2, 1, 1, 1, 6)
    turned = [apply_rotary(x.expand(1, 1, 9, 6))[0, 0] for x in (query, key)]
    scores = turned[0] @ turned[1].t()
    for distance in (-3, 0, 5):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand(len(diagonal)), rtol=1e-4, atol=1e-5)
    assert scores[0].std() > 0.01
    torch.testing.assert_close(turned[0].norm(dim=-1), query.norm().expand(9))


@pytest.mark.parametrize("position", ["relative", "rotary"])
@pytest.mark.parametrize("layer_type", ["transformer", "conformer"])
def test_a_reused_map_holds_the_positions(position: str, layer_type: str) -> None:
    made = student(position=position, layer_type=layer_type, attention_reuse="alternate", depthwise_kernel=3)
    given: list[tuple[Any, ...]] = []
    given_maps: list[AttentionMap] = []
    made.layers[1].attention.register_forward_hook(lambda _m, args, _o: given.append(args))
    made.layers[0].attention.register_forward_hook(lambda _m, _a, out: given_maps.append(out[1]))
    with torch.no_grad():
        out = made(WAVEFORMS[:1], LENGTHS[:1])
        shared = given_maps[0]
        scores = shared.queries @ shared.keys.transpose(-1, -2) / 6**0.5
        if shared.bias is not None:
            scores = scores + shared.bias
        attention = made.layers[1].attention
        values = attention.value(given[0][0]).view(1, 19, 2, 6).transpose(1, 2)
        expected = attention.out((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(attention(*given[0])[0], expected, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(out.projections).all()
    assert not hasattr(made.layers[1].attention, "query")


def test_conformer_layer_is_torchaudios_but_for_the_norm_inside_the_convolution() -> None:
    from torchaudio.models.conformer import ConformerLayer as Theirs

    made = student(layer_type="conformer", depthwise_kernel=5)
    ours = made.layers[1]
    theirs = Theirs(WIDTH, 20, 2, 5, use_group_norm=True).eval()
    # Replace torchaudio's norm over time by ours: per frame, over channels.
    norm = ours.convolution.depthwise_norm
    theirs.conv_module.sequential[3] = PerFrame(norm)
    attention, convolution = ours.attention, ours.convolution
    weights = {
        "self_attn.in_proj_weight": torch.cat([getattr(attention, n).weight for n in ("query", "key", "value")]),
        "self_attn.in_proj_bias": torch.cat([getattr(attention, n).bias for n in ("query", "key", "value")]),
        "conv_module.sequential.0.weight": convolution.gate.weight[..., None],
        "conv_module.sequential.0.bias": convolution.gate.bias,
        "conv_module.sequential.2.weight": convolution.depthwise.weight,
        "conv_module.sequential.2.bias": torch.zeros(WIDTH),
        "conv_module.sequential.5.weight": convolution.out.weight[..., None],
        "conv_module.sequential.5.bias": convolution.out.bias,
        **{f"self_attn.out_proj.{k}": v for k, v in attention.out.state_dict().items()},
        **{f"conv_module.layer_norm.{k}": v for k, v in convolution.norm.state_dict().items()},
        **{f"conv_module.sequential.3.norm.{k}": v for k, v in norm.state_dict().items()},
        **{f"self_attn_layer_norm.{k}": v for k, v in ours.attention_norm.state_dict().items()},
        **{f"final_layer_norm.{k}": v for k, v in ours.final_norm.state_dict().items()},
    }
    for name, part in (("ffn1", ours.first), ("ffn2", ours.second)):
        for number, module in ((0, part.norm), (1, part.up), (4, part.down)):
            weights |= {f"{name}.sequential.{number}.{k}": v for k, v in module.state_dict().items()}
    theirs.load_state_dict(weights)
    x = torch.randn(7, 1, WIDTH)
    with torch.no_grad():
        expected = theirs(x, None)
        found, _ = ours(x.transpose(0, 1), None, None)
    torch.testing.assert_close(found.transpose(0, 1), expected, rtol=1e-4, atol=1e-5)


class PerFrame(nn.Module):
    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return out


def test_relative_positions_take_the_place_of_the_convolution() -> None:
    made = student(position="relative")
    assert made.position is None
    assert not any(name.startswith("position") for name in made.state_dict())


def test_deep_position_convolution_is_a_stack_with_norms() -> None:
    made = student(conv_pos=9, conv_pos_depth=3)
    x = torch.randn(1, 10, WIDTH)
    y = x.transpose(1, 2)
    with torch.no_grad():
        for conv in made.position.convs:
            assert conv.kernel_size == (3,)
            y = conv(y)
            y = F.gelu(F.layer_norm(y.transpose(1, 2), (WIDTH,)).transpose(1, 2))
        torch.testing.assert_close(made.position(x), y.transpose(1, 2))


@pytest.mark.parametrize("factor", [0.0, 0.25])
def test_feature_grad_mult_scales_the_front_ends_gradient(factor: float) -> None:
    gradients = []
    for value in (1.0, factor):
        made = student(feature_grad_mult=value)
        made(WAVEFORMS, LENGTHS).projections.square().sum().backward()
        gradients.append(made.conv_blocks[0].conv.weight.grad)
    if factor:
        torch.testing.assert_close(gradients[1], gradients[0] * factor, rtol=1e-4, atol=1e-6)
    else:
        assert gradients[1] is None
