"""The portable model returns the student's features in every variant, and unsupported options are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ray_distill.pipeline.config import load_config
from ray_distill.student import Student, StudentConfig
from ray_distill.student.exporters.portable import default_features, portable_config, portable_student
from ray_distill.student.exporters.portable_model import PortableStudent, PositionConv, pad
from ray_distill.teacher_cache.audio import load_audio

from ...tiny import CONFIGS, tiny_student

NO_REUSE = {"attention_reuse": "none"}
VARIANTS: dict[str, dict[str, object]] = {
    "paper": {},
    "released": {"reuse_behaviour": "released"},
    "twice in a row": {"attention_reuse": (False, True, True, False)},
    "twice in a row, released": {"attention_reuse": (False, True, True, False), "reuse_behaviour": "released"},
    "no reuse": NO_REUSE,
    "no feature norm": {"feature_norm": False},
    "layer norm": {"conv_norm": "layer_norm", "conv_bias": True},
    "norm first": {"layer_norm_first": True, "heads": "none"},
    "deep position": {"conv_pos_depth": 3, "heads": "split"},
    "rotary": {"position": "rotary"},
    "pruned": {"attention_reuse": "none", "layer_heads": (1, 4, 0, 2), "layer_ffn_dims": (24, 0, 3, 7)},
    "pruned, pre-norm": {
        "attention_reuse": "none",
        "layer_heads": (0, 3, 4, 0),
        "layer_ffn_dims": (0, 24, 0, 5),
        "layer_norm_first": True,
    },
    "fc1": {"time_reduction": "fc1"},
    "fc2 in the middle": {"time_reduction": "fc2", "time_reduction_index": 2, "time_reduction_factor": 3},
    "conv1d, released": {"time_reduction": "conv1d", "reuse_behaviour": "released"},
    "projection": {"encoder_embed_dim": 24, "conv_pos": 9, "conv_pos_groups": 3, "encoder_attention_heads": 3},
}


def student_of(variant: str) -> Student:
    torch.manual_seed(0)
    base = {
        "conv_layers": ((8, 10, 5), (12, 1, 1), *((12, 3, 2),) * 4, *((16, 2, 2),) * 2),
        "encoder_layers": 4,
        "encoder_attention_heads": 4,
        "conv_pos": 16,
        "conv_pos_groups": 4,
    }
    student = Student(tiny_student(**base | VARIANTS[variant])).eval()
    for (
        name,
        parameter,
    ) in student.named_parameters():  # After initialisation attention is nearly uniform and norms are identities.
        if "query" in name or "key" in name:
            parameter.data *= 15
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return student


def noise(seconds: list[float]) -> list[torch.Tensor]:
    return [torch.randn(int(16_000 * s), generator=torch.Generator().manual_seed(7)) * 0.1 for s in seconds]


@torch.no_grad()
def assert_same(student: Student, waves: list[torch.Tensor], *, hold_maps: bool, atol: float = 1e-5) -> None:
    model = portable_student(student)
    model.hold_maps = hold_maps
    padded, lengths = pad(waves)
    real = torch.tensor([len(wave) for wave in waves])
    ours, frames = student.encode(padded, real)
    theirs = torch.stack(model(padded, lengths)[1:], 1)
    assert theirs.shape == ours.shape
    assert torch.equal(model.num_frames(real), frames)
    for row, count in enumerate(frames.tolist()):
        torch.testing.assert_close(theirs[row, :, :count], ours[row, :, :count], rtol=1e-5, atol=atol)


@pytest.mark.parametrize("hold_maps", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_gives_the_students_features(variant: str, hold_maps: bool) -> None:
    student = student_of(variant)
    assert_same(student, noise([1.0]), hold_maps=hold_maps)
    assert_same(student, noise([0.025, 1.3, 0.6]), hold_maps=hold_maps)


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_fused_attention(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student = student_of(variant)
    model = portable_student(student)
    waves, lengths = pad(noise([1.0, 0.4]))
    with torch.no_grad():
        fused = model(waves, lengths)
        monkeypatch.delattr(torch.nn.functional, "scaled_dot_product_attention")
        plain = model(waves, lengths)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-5)


def test_the_two_behaviours_differ() -> None:
    paper, released = (student_of(variant) for variant in ("paper", "released"))
    released.load_state_dict(paper.state_dict())
    wave = noise([1.0])[0][None]
    with torch.no_grad():
        a, b = (portable_student(student)(wave)[-1] for student in (paper, released))
    assert (a - b).abs().max() > 1e-2


@pytest.mark.slow
def test_real_speech(shared: Path) -> None:
    paths = sorted((shared / "speech/LibriSpeech/heldout-clean-5").rglob("*.flac"))[:3]
    waves = [torch.from_numpy(np.asarray(load_audio(path))) for path in paths]
    torch.manual_seed(0)
    assert_same(Student(StudentConfig()).eval(), waves, hold_maps=False, atol=5e-5)


def test_a_published_checkpoint_keeps_its_second_softmax(shared: Path) -> None:
    from ray_distill.student import load_student

    golden = shared / "golden"
    student = load_student(golden / "armhubert_mini.ckpt", golden / "armhubert_mini.yaml")
    assert portable_config(student.config)["reuse_behaviour"] == "released"
    assert_same(student, noise([1.0, 0.5]), hold_maps=False)


def test_dropout_acts_in_training_only() -> None:
    model = portable_student(student_of("paper"))
    wave = noise([1.0])[0][None]
    model.train()
    assert not torch.equal(model(wave)[-1], model(wave)[-1])
    model.eval()
    assert torch.equal(model(wave)[-1], model(wave)[-1])


def test_unknown_options_and_weights_are_refused() -> None:
    class Wider(StudentConfig):
        gates: int = 1

    base = student_of("paper").config.model_dump()
    assert "gates" not in portable_config(Wider.model_validate(base))
    with pytest.raises(ValueError, match="gates=2"):
        portable_config(Wider.model_validate(base | {"gates": 2}))
    for option in ({"layer_type": "conformer"}, {"position": "relative"}):
        with pytest.raises(
            ValueError, match=f"{next(iter(option))}='{next(iter(option.values()))}', which exports do not"
        ):
            portable_config(StudentConfig.model_validate(base | option))
    student = student_of("paper")
    student.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="weights that exports do not support"):
        portable_student(student)


def test_other_arithmetic_is_refused() -> None:
    class Louder(Student):
        def layer_outputs(self, *given, **options):  # type: ignore[no-untyped-def]
            layers, heads, frames = super().layer_outputs(*given, **options)
            return [2 * layer for layer in layers], heads, frames

    with pytest.raises(ValueError, match="features of the exported model differ"):
        portable_student(Louder(student_of("paper").config))


def test_positions_in_bfloat16_are_right_on_cpus_with_amx() -> None:
    torch.manual_seed(0)
    positions, x = PositionConv(16, 8, 2), torch.randn(3, 19, 16)
    expected = positions(x, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(positions(x, None), expected)
    found = positions.bfloat16()(x.bfloat16(), None)
    assert found.dtype == torch.bfloat16 and (found - expected).norm() < 0.01 * expected.norm()


def test_it_knows_its_frames() -> None:
    model = PortableStudent(portable_config(StudentConfig()))
    assert (model.stride, model.receptive_field) == (320, 400)


@pytest.mark.parametrize("student", ["armhubert", "maskhubert"])
@torch.no_grad()
def test_heads_give_the_published_projections(shared: Path, student: str) -> None:
    from ray_distill.student import load_student

    golden = load_file(shared / "golden" / "golden.safetensors")
    loaded = load_student(shared / f"golden/{student}_mini.ckpt", shared / f"golden/{student}_mini.yaml")
    assert default_features(loaded.config) == "heads"
    model = portable_student(loaded, "heads")
    for number, samples in enumerate((16_000, 11_200, 8_000)):
        found = model(golden["wav"][number, None, :samples])
        expected = golden[f"{student}_single_{number}_projections"]
        torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=2e-6)


HEADS: dict[str, dict[str, object]] = {
    "layerwise": {},
    "plain": {"target_dim": 16},
    "reduced": {"time_reduction": "conv1d", "layer_norm_first": True},
    "reduced in the middle": {"time_reduction": "fc1", "time_reduction_index": 2, "time_reduction_factor": 3},
    "split": {"heads": "split", "split_heads": 3, "split_dim": 20},
    "split, reduced": {"heads": "split", "split_heads": 2, "time_reduction": "fc1"},
}
SPARSE: dict[str, object] = {"head_layers": (2, 4), "head_dim": 5}


@pytest.mark.parametrize("variant", HEADS)
@torch.no_grad()
def test_it_gives_the_heads_predictions(variant: str) -> None:
    torch.manual_seed(0)
    student = Student(tiny_student(encoder_layers=4, **HEADS[variant])).eval()
    model = portable_student(student, "heads")
    waves, lengths = pad(noise([0.9, 0.3]))
    expected, found = student(waves, lengths), model(waves, lengths)
    assert (len(found), model.width) == (model.num_features, student.config.target_dim)
    for row, count in enumerate(expected.num_frames.tolist()):
        for layer, x in enumerate(found):
            torch.testing.assert_close(x[row, :count], expected.projections[row, layer, :count], rtol=0, atol=1e-5)
    assert len(portable_student(student)(waves, lengths)) == 5


@torch.no_grad()
def test_heads_on_some_layers_are_left_out() -> None:
    torch.manual_seed(0)
    student = Student(tiny_student(encoder_layers=4, **SPARSE)).eval()
    waves, lengths = pad(noise([0.9, 0.3]))
    states = student(waves, lengths).hidden_states
    for layer, x in enumerate(portable_student(student)(waves, lengths)[1:]):
        torch.testing.assert_close(x[0], states[0, layer], rtol=0, atol=1e-5)


def test_default_features_are_those_that_the_authors_evaluate() -> None:
    for recipe, features in (
        ("armhubert-960", "heads"),
        ("maskhubert-960", "heads"),
        ("fithubert-960", "layers"),
        ("distilhubert-960", "layers"),
        ("starhubert", "layers"),
    ):
        config = load_config(CONFIGS / f"{recipe}.yaml", [])
        layers = len(config.teacher.layers or range(12))
        assert default_features(config.resolve_student(layers, 768)) == features
    assert default_features(tiny_student(layer_ffn_dims=(3, 4))) == "layers"
    sparse = tiny_student(head_layers=(2,))
    assert default_features(sparse) == "layers"
    with pytest.raises(
        ValueError, match="has head_layers or head_dim, and exports support one linear head on each layer"
    ):
        portable_config(sparse, "heads")
    bare = tiny_student(heads="none")
    assert default_features(bare) == "layers"
    with pytest.raises(ValueError, match="has no heads, so features heads can't be exported; choose features layers"):
        portable_config(bare, "heads")
