"""Checkpoints of the published code's other architectures: their tensors, as its modules define them, and their results."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from ray_distill.student import Student, load_student

from ..tiny import tiny_student

DISTILLER: dict[str, Any] = {
    "conv_feature_layers": "[(8,10,5)] + [(8,3,2)] * 4 + [(8,2,2)] * 2",
    "encoder_layers": 3,
    "encoder_embed_dim": 8,
    "encoder_ffn_embed_dim": 12,
    "encoder_attention_heads": 2,
    "conv_pos": 6,
    "conv_pos_groups": 2,
    "pred_head_final_dim": 16,
    "reuse_pattern": "[True, False, True]",
    "layerwise_proj": True,
    "enable_tr_layer": False,
}
WAVEFORM, LENGTH = torch.randn(1, 6720, generator=torch.Generator().manual_seed(0)), torch.tensor([6720])  # 20 frames


def common(student: Student) -> dict[str, Tensor]:
    """Return the tensors that all architectures share, under the published names."""
    tensors = student.state_dict()
    there = {"mask_emb": tensors["mask_embedding"]}
    for number in range(7):
        there[f"feature_extractor.conv_layers.{number}.0.weight"] = tensors[f"conv_blocks.{number}.conv.weight"]
    for kind in ("weight", "bias"):
        there[f"feature_extractor.conv_layers.0.2.{kind}"] = tensors[f"conv_blocks.0.norm.{kind}"]
        there[f"layer_norm.{kind}"] = tensors[f"feature_norm.{kind}"]
        there[f"encoder.layer_norm.{kind}"] = tensors[f"encoder_norm.{kind}"]
    if "position.conv.bias" in tensors:
        there["encoder.pos_conv.0.bias"] = tensors["position.conv.bias"]
        there["encoder.pos_conv.0.weight_g"] = tensors["position.conv.parametrizations.weight.original0"]
        there["encoder.pos_conv.0.weight_v"] = tensors["position.conv.parametrizations.weight.original1"]
    return there


def layer(student: Student, number: int, there: int) -> dict[str, Tensor]:
    """Return the tensors of layer ``number``, which is number ``there`` in the published module list."""
    names = {
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.out_proj": "attention.out",
        "self_attn_layer_norm": "attention_norm",
        "fc1": "up",
        "fc2": "down",
        "final_layer_norm": "final_norm",
    }
    tensors = student.state_dict()
    return {
        f"encoder.layers.{there}.{theirs}.{kind}": tensors[f"layers.{number}.{ours}.{kind}"]
        for theirs, ours in names.items()
        for kind in ("weight", "bias")
        if f"layers.{number}.{ours}.{kind}" in tensors
    }


def write(folder: Path, state: dict[str, Tensor], **options: Any) -> tuple[Path, Path]:
    torch.save({"state_dict": {f"student_model.{name}": value for name, value in state.items()}}, folder / "m.ckpt")
    (folder / "m.yaml").write_text(yaml.safe_dump({"distiller": DISTILLER | options}))
    return folder / "m.ckpt", folder / "m.yaml"


def student(**options: Any) -> Student:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "encoder_layers": 3,
        "encoder_embed_dim": 8,
        "encoder_ffn_embed_dim": 12,
        "conv_pos": 6,
        "target_dim": 16,
        "attention_reuse": (False, True, False),
        "reuse_behaviour": "released",
    }
    return Student(tiny_student(**config | options)).eval()


def assert_same(found: Student, expected: Student) -> None:
    assert found.config.time_reduction == expected.config.time_reduction
    with torch.no_grad():
        ours, theirs = found(WAVEFORM, LENGTH), expected(WAVEFORM, LENGTH)
    assert torch.equal(ours.hidden_states, theirs.hidden_states)
    assert torch.equal(ours.projections, theirs.projections)


@pytest.mark.parametrize("kind", ["conv1d", "fc1"])
def test_a_time_reduction_stands_among_the_published_layers(tmp_path: Path, kind: str) -> None:
    made = student(time_reduction=kind)
    state = common(made)
    for number in range(3):
        state |= layer(made, number, number + 1)
    for name in ("weight", "bias"):
        state[f"encoder.layers.0.{name}"] = made.state_dict()[f"reduction.reduce.{name}"]
        state[f"upsampler.{name}"] = torch.zeros(1)  # Every such checkpoint has it, but only split heads use it.
        for number in range(3):
            state[f"proj_head.{number}.lin_proj.{name}"] = made.state_dict()[f"heads.{number}.{name}"]
            state[f"proj_head.{number}.upsampler.{name}"] = made.state_dict()[f"upsamplers.{number}.expand.{name}"]
    assert_same(load_student(*write(tmp_path, state, enable_tr_layer=True, tr_layer_type=kind)), made)


@pytest.mark.parametrize("tasks", [1, 2])
def test_split_heads_are_distilhuberts(tmp_path: Path, tasks: int) -> None:
    made = student()
    state = common(made)
    for number in range(3):
        state |= layer(made, number, number)
    inner = 5
    state["proj_head.0.weight"], state["proj_head.0.bias"] = torch.randn(tasks * inner, 8), torch.randn(tasks * inner)
    weight, bias = torch.randn(tasks, inner, 16), torch.randn(1, 1, tasks, 16)
    if tasks == 1:
        state["proj_head.2.layer.weight"], state["proj_head.2.layer.bias"] = weight[0].t(), bias[0, 0, 0]
    else:
        state["proj_head.2.weight"], state["proj_head.2.bias"] = weight, bias
    options = {"layerwise_proj": False, "pred_layer_id": str([4, 11][:tasks]), "pred_head_inter_dim": inner}
    loaded = load_student(*write(tmp_path, state, **options))
    with torch.no_grad():
        out = loaded(WAVEFORM, LENGTH)
        # The published SplitLinear.
        wide = F.gelu(F.linear(out.hidden_states[:, -1], state["proj_head.0.weight"], state["proj_head.0.bias"]))
        wide = wide.reshape(1, 20, tasks, 1, inner)
        expected = torch.einsum("...klm,kmn->...kln", wide, weight).squeeze(3) + bias
    torch.testing.assert_close(out.projections, expected.permute(0, 2, 1, 3))


def test_a_deep_position_convolution(tmp_path: Path) -> None:
    made = student(conv_pos_depth=2)
    state = common(made)
    for number in range(3):
        state |= layer(made, number, number)
        for name in ("weight", "bias"):
            state[f"proj_head.{number}.lin_proj.{name}"] = made.state_dict()[f"heads.{number}.{name}"]
    for number in range(2):
        for name in ("weight", "bias"):
            state[f"encoder.pos_conv.{number}.0.{name}"] = made.state_dict()[f"position.convs.{number}.{name}"]
    assert_same(load_student(*write(tmp_path, state, pos_conv_depth=2)), made)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"layer_type": "conformer"}, "can neither build Conformer layers with reuse nor run them without reuse"),
        ({"layer_norm_first": True}, "does not normalise the last layer's output"),
        ({"enable_tr_layer": True, "tr_layer_type": "fc2"}, "does not run fc2"),
        ({"enable_tr_layer": True, "tr_layer_index": 2}, "return frames of two lengths"),
    ],
)
def test_what_the_published_code_itself_cant_run_is_refused(tmp_path: Path, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        load_student(*write(tmp_path, {}, **options))
