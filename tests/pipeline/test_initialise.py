"""Initial weights from the teacher: the tensors that are copied, and students that they do not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ray_distill.pipeline.config import ConfigError, load_config
from ray_distill.pipeline.initialise import initial_tensors, tensors_of_student, write_initial
from ray_distill.pipeline.stages import Run
from ray_distill.pipeline.stages.train import prepare_training
from ray_distill.student import Student, StudentConfig
from ray_distill.student.checkpoints import save_student
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.weights import load_tensors
from ray_distill.teacher_cache.patch_geometry import PatchGeometry
from ray_distill.teacher_cache.teachers import Teacher, load_teacher

from ..tiny import demo_config, tiny_student

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
HUBERT_CONV = ((512, 10, 5), *((512, 3, 2),) * 4, *((512, 2, 2),) * 2)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher("random:3x48")


def like(teacher: Teacher, **changes: Any) -> StudentConfig:
    """A student with the teacher's shapes."""
    weights = teacher.weights
    convolutions = tuple(
        (
            weights[f"feature_extractor.conv_layers.{n}.conv.weight"].shape[0],
            kernel,
            stride,
        )
        for n, (_, kernel, stride) in enumerate(HUBERT_CONV)
    )
    position = weights["encoder.transformer.pos_conv_embed.conv.parametrizations.weight.original1"]
    config: dict[str, Any] = {
        "conv_layers": convolutions,
        "encoder_layers": 3,
        "encoder_embed_dim": 48,
        "encoder_ffn_embed_dim": weights["encoder.transformer.layers.0.feed_forward.intermediate_dense.bias"].numel(),
        "encoder_attention_heads": teacher._layers[0].attention.num_heads,
        "attention_reuse": "none",
        "conv_pos": position.shape[2],
        "conv_pos_groups": 48 // position.shape[1],
        "target_dim": 48,
        "layer_grad_scale": False,
    }
    return StudentConfig.model_validate(config | changes)


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(batch_size=1, **changes)


def test_with_everything_from_the_teacher_the_student_is_the_teacher(teacher: Teacher, tmp_path: Any) -> None:
    config = like(teacher)
    wanted = settings(init_front_end=True, init_encoder_layers=3, mask_embedding="teacher")
    write_initial(tmp_path / "initial.safetensors", initial_tensors(teacher, config, wanted))
    student = Student(config).eval()
    student.load_state_dict(load_tensors(tmp_path / "initial.safetensors"), strict=True)
    waveforms, lengths = torch.randn(2, 8000), torch.tensor([8000, 5000])
    mask = torch.rand(2, 24) < 0.3
    for frame_mask in (None, mask):
        with torch.no_grad():
            ours = student(waveforms, lengths, frame_mask).hidden_states
        theirs = teacher.hidden_states(waveforms, lengths, frame_mask)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours[1, :, :14], theirs[1, :, :14], rtol=1e-4, atol=1e-4)


def test_only_what_was_asked_for(teacher: Teacher) -> None:
    config = like(teacher, attention_reuse=(False, True, False))
    names = initial_tensors(teacher, config, settings(init_front_end=True)).keys()
    assert {name.split(".")[0] for name in names} == {"conv_blocks", "feature_norm", "projection"}
    bare = config.model_copy(update={"feature_norm": False})
    names = initial_tensors(teacher, bare, settings(init_front_end=True)).keys()
    assert {name.split(".")[0] for name in names} == {"conv_blocks", "projection"}
    names = initial_tensors(teacher, config, settings(init_encoder_layers=1)).keys()
    assert {name.split(".")[0] for name in names} == {"position", "encoder_norm", "layers"}
    assert {name.split(".")[1] for name in names if name.startswith("layers")} == {"0"}


@pytest.mark.parametrize(
    ("student", "train", "message"),
    [
        ({"conv_bias": True, "conv_norm": "layer_norm"}, {"init_encoder_layers": 4}, "4 is more than the student's 3"),
        ({"conv_layers": (*HUBERT_CONV[:6], (9, 2, 2))}, {"init_front_end": True}, r"give student\.conv_layers"),
        (
            {"encoder_ffn_embed_dim": 7},
            {"init_encoder_layers": 1},
            r"layers\.0\.up\.weight has the shape .* student's has \(7, 48\)",
        ),
        ({"attention_reuse": "alternate"}, {"init_encoder_layers": 2}, "compute their own attention maps"),
        ({"layer_type": "conformer"}, {"init_encoder_layers": 1}, "must be Transformer layers"),
        (
            {"encoder_embed_dim": 96},
            {"mask_embedding": "teacher"},
            r"the teacher's mask_embedding has the shape \(48,\)",
        ),
        ({"encoder_attention_heads": 2}, {"init_encoder_layers": 1}, "encoder_attention_heads is 2, .* must be 4"),
        ({"layer_norm_first": True}, {"init_encoder_layers": 1}, "layer_norm_first is True, .* must be False"),
        ({"position": "rotary"}, {"init_encoder_layers": 1}, "student.position is rotary, .* must be convolution"),
        ({"conv_pos_depth": 2}, {"init_encoder_layers": 1}, "position.conv.* but the student has none"),
        (
            {"conv_norm": "layer_norm"},
            {"init_front_end": True},
            r"has conv_blocks\.1\.norm\.weight, but the teacher does not",
        ),
        (
            {"conv_bias": True},
            {"init_front_end": True},
            r"has conv_blocks\.0\.conv\.bias, but the teacher does not",
        ),
        ({"patches": PatchGeometry()}, {"init_front_end": True}, "but the student has none"),
    ],
)
def test_what_does_not_fit_is_named(
    teacher: Teacher, student: dict[str, Any], train: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        initial_tensors(teacher, like(teacher, **student), settings(**train))


def test_a_substitute_for_the_mask_embedding_is_not_copied(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "_mask_embedding", None)
    with pytest.raises(ConfigError, match="has no mask embedding that a student could copy; set it to learned"):
        initial_tensors(teacher, like(teacher), settings(mask_embedding="teacher"))


def test_other_strides_are_other_convolutions(teacher: Teacher) -> None:
    convolutions = [list(layer) for layer in like(teacher).conv_layers]
    convolutions[0][2], convolutions[1][2] = convolutions[1][2], convolutions[0][2]
    with pytest.raises(ConfigError, match=r"have strides \[5, 2, .*, the student's \[2, 5, .* student.conv_layers"):
        initial_tensors(teacher, like(teacher, conv_layers=convolutions), settings(init_front_end=True))


def test_the_distilhubert_recipe_fits_a_hubert_base() -> None:
    config = load_config(CONFIGS / "distilhubert-960.yaml")
    assert config.train.starts_from_teacher
    base = load_teacher("random:2x768")  # The shapes of HuBERT Base, with fewer layers.
    tensors = initial_tensors(base, config.resolve_student(3, 768), config.train)
    assert {name.partition(".")[0] for name in tensors} >= {"conv_blocks", "projection", "position", "layers"}


def test_first_weights_that_nothing_was_trained_from_do_not_hold_a_run(tmp_path: Path) -> None:
    for more in ("train.seed=1", "train.seed=2"):
        config = demo_config(tmp_path, "train.mask_embedding=teacher", "student.encoder_embed_dim=64", more)
        run = Run(config, Console(quiet=True))
        with run.folder.begin(config):
            prepare_training(run, 1)
    written = load_tensors(tmp_path / "runs" / "demo" / "initial.safetensors")
    assert written.keys() == {"mask_embedding"}
    assert torch.equal(written["mask_embedding"], run.teacher.weights["mask_embedding"])


def test_a_student_starts_from_another(tmp_path: Path) -> None:
    first = Student(tiny_student())
    save_student(first, tmp_path / "first")
    taken = tensors_of_student(str(tmp_path / "first"), tiny_student())
    assert taken.keys() == first.state_dict().keys()
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in taken.items())
    other_teacher = tensors_of_student(str(tmp_path / "first"), tiny_student(target_dim=48))
    assert taken.keys() - other_teacher.keys() == {name for name in taken if name.startswith("heads.")}
    heads_of_another_kind = tensors_of_student(str(tmp_path / "first"), tiny_student(heads="split", split_heads=2))
    assert heads_of_another_kind.keys() == other_teacher.keys()
    save_student(Student(tiny_student(heads="split", split_heads=2)), tmp_path / "split")
    assert tensors_of_student(str(tmp_path / "split"), tiny_student()).keys() == other_teacher.keys()
    more = tensors_of_student(str(tmp_path / "split"), tiny_student(heads="split", split_heads=3))
    assert more.keys() == other_teacher.keys(), "the heads of another split layer"
    sparse = tiny_student(head_layers=(2,))
    assert tensors_of_student(str(tmp_path / "first"), sparse).keys() == other_teacher.keys(), "heads on other layers"
    with pytest.raises(
        ConfigError, match=r"train\.init_from: .*has the shape \(.*\) in .*first, but \(.*\) in this student"
    ):
        tensors_of_student(str(tmp_path / "first"), tiny_student(encoder_ffn_embed_dim=32))
    with pytest.raises(ConfigError, match=r"has the shape none in .*, but \(16, 16\) in this student"):
        tensors_of_student(str(tmp_path / "first"), tiny_student(encoder_layers=3))
    with pytest.raises(ConfigError, match=r"train\.init_from: .*nothing is not a student"):
        tensors_of_student(str(tmp_path / "nothing"), tiny_student())
    with pytest.raises(ValueError, match=r"train\.init_from gives all weights of the encoder"):
        settings(init_from="x", init_encoder_layers=1)


def test_the_training_gets_the_other_students_weights(tmp_path: Path) -> None:
    config = demo_config(
        tmp_path, "student.target_dim=teacher", f"train.init_from={tmp_path / 'first'}", "corpus.path=/nowhere"
    )
    first = Student(config.resolve_student(2, 64))
    save_student(first, tmp_path / "first")
    said: list[str] = []
    run = Run(config, Console(quiet=True))
    run.say = said.append  # type: ignore[method-assign]
    prepare_training(run, 1)
    assert said[-1:] == [f"train   the student starts from {tmp_path / 'first'} ({len(first.state_dict())} tensors)"]
    written = load_tensors(run.folder.initial_weights)
    assert all(torch.equal(written[name], value) for name, value in first.state_dict().items())
