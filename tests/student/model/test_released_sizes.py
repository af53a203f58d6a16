"""Full-size checkpoints in the released format, random weights: every tensor of each of the three architectures."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from ray_distill.pipeline.config import load_config
from ray_distill.pipeline.convert import convert
from ray_distill.student import Student, load_student

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def released(name: str, tensors: dict[str, Tensor], layers: int, convolutions: int) -> dict[str, Tensor]:
    """Return our tensors under the released names, as the published modules define them."""
    there = {
        "student_model.mask_emb": tensors["mask_embedding"],
        "student_model.encoder.pos_conv.0.bias": tensors["position.conv.bias"],
        "student_model.encoder.pos_conv.0.weight_g": tensors["position.conv.parametrizations.weight.original0"],
        "student_model.encoder.pos_conv.0.weight_v": tensors["position.conv.parametrizations.weight.original1"],
    }
    for number in range(convolutions):
        prefix = f"student_model.feature_extractor.conv_layers.{number}"
        there[f"{prefix}.0.weight"] = tensors[f"conv_blocks.{number}.conv.weight"]
    for kind in ("weight", "bias"):
        there[f"student_model.feature_extractor.conv_layers.0.2.{kind}"] = tensors[f"conv_blocks.0.norm.{kind}"]
        there[f"student_model.layer_norm.{kind}"] = tensors[f"feature_norm.{kind}"]
        there[f"student_model.encoder.layer_norm.{kind}"] = tensors[f"encoder_norm.{kind}"]
        for layer in range(layers):
            theirs, ours = f"student_model.encoder.layers.{layer}", f"layers.{layer}"
            for their_name, our_name in (
                ("self_attn.v_proj", "attention.value"),
                ("self_attn.out_proj", "attention.out"),
                ("self_attn_layer_norm", "attention_norm"),
                ("fc1", "up"),
                ("fc2", "down"),
                ("final_layer_norm", "final_norm"),
            ):
                there[f"{theirs}.{their_name}.{kind}"] = tensors[f"{ours}.{our_name}.{kind}"]
            if name == "maskhubert" or layer % 2 == 0:
                there[f"{theirs}.self_attn.q_proj.{kind}"] = tensors[f"{ours}.attention.query.{kind}"]
                there[f"{theirs}.self_attn.k_proj.{kind}"] = tensors[f"{ours}.attention.key.{kind}"]
            there[f"student_model.proj_head.{layer}.lin_proj.{kind}"] = tensors[f"heads.{layer}.{kind}"]
    return there


@pytest.mark.parametrize(
    ("recipe", "width", "inner", "parameters"),
    [
        ("armhubert-960", 480, 864, 26_448_448),
        ("armhubert-s-960", 432, 816, 22_394_080),
        ("maskhubert-960", 480, 640, 26_635_840),
    ],
)
def test_every_tensor_is_read(recipe: str, width: int, inner: int, parameters: int, tmp_path: Path) -> None:
    config = load_config(CONFIGS / f"{recipe}.yaml").resolve_student(12, 768)
    student = Student(config.model_copy(update={"reuse_behaviour": "released"})).eval()
    name = recipe.split("-")[0]
    state = released(name, student.state_dict(), 12, len(config.conv_layers))
    assert sum(tensor.numel() for tensor in state.values()) == parameters
    # Lightning also stores the frozen teacher and its own records.
    teacher = {"teacher_model.model.mask_emb": torch.zeros(768)}
    torch.save(
        {"state_dict": state | teacher, "epoch": 199, "global_step": 1, "lr_schedulers": []}, tmp_path / "m.ckpt"
    )
    distiller = {
        "extractor_mode": "default",
        "conv_feature_layers": f"[(128,10,5)] + [(256,1,1)] + [(256,3,2)] * 4 + [({width},1,1)] + [({width},2,2)] * 2",
        "encoder_layers": 12,
        "encoder_embed_dim": width,
        "encoder_ffn_embed_dim": inner,
        "encoder_attention_heads": 12,
        "layer_grad_scale": name == "armhubert",
        "activation_dropout": 0.1,
        "dropout_input": 0.05,
        "layerwise_proj": True,
        "enable_tr_layer": False,
    }
    if name == "armhubert":
        distiller["reuse_pattern"] = str([True, False] * 6)
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"distiller": distiller}))
    (tmp_path / "ours" / ".unfinished.tmp" / "model.safetensors").mkdir(parents=True)  # What a killed process leaves.
    assert convert(tmp_path / "m.ckpt", tmp_path / "m.yaml", tmp_path / "ours") == parameters
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]
    converted = load_student(tmp_path / "ours")
    assert converted.config.reuses == student.config.reuses  # `none` and `alternate` are equal to their entries.
    assert converted.config == student.config.model_copy(update={"attention_reuse": converted.config.attention_reuse})
    lengths = torch.tensor([8000, 5000])
    waveforms = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.no_grad():
        found, expected = converted(waveforms, lengths), student(waveforms, lengths)
        alone = converted(waveforms[1:, :5000], lengths[1:])
    torch.testing.assert_close(found.projections, expected.projections, rtol=0, atol=0)
    frames = int(alone.num_frames)
    torch.testing.assert_close(alone.projections[0], found.projections[1, :, :frames], rtol=1e-4, atol=1e-4)


def test_a_folder_with_files_is_kept(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "notes.txt").touch()
    with pytest.raises(ValueError, match="ours is not empty; give a new folder"):
        convert(tmp_path / "m.ckpt", tmp_path / "m.yaml", tmp_path / "ours")
    assert [file.name for file in (tmp_path / "ours").iterdir()] == ["notes.txt"]
