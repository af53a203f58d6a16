"""Counts of parameters and MACs compared with explicit formulas and with the published ratios."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ray_distill.command_line import application
from ray_distill.pipeline.config import load_config
from ray_distill.pipeline.model_profile import HUBERT_BASE, Profile, profile_student, profile_teacher
from ray_distill.student import Student, StudentConfig, save_student
from ray_distill.teacher_cache.frames import conv_output_length, num_frames
from ray_distill.teacher_cache.teachers import load_teacher

from ..tiny import tiny_student

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SECONDS = 10.0


def by_hand(config: StudentConfig, seconds: float) -> dict[str, int]:
    """Return the MACs according to the counting rule, calculated from the configuration."""
    length, channels, convolutions = int(16_000 * seconds), 1, 0
    for outputs, kernel, stride in config.conv_layers:
        length = conv_output_length(length, [(kernel, stride)])
        convolutions += channels * outputs * kernel * length
        channels = outputs
    d, frames = config.encoder_embed_dim, length
    # The position convolution has an even kernel, so it computes one more frame, which is cut off.
    position = config.conv_pos * d * d // config.conv_pos_groups * (frames + 1 - config.conv_pos % 2)
    own = sum(not reuses for reuses in config.reuses)
    count = config.encoder_layers
    attention = (2 * count + 2 * own) * frames * d * d + (count + own) * frames * frames * d
    return {
        "convolutions": convolutions,
        "position": position,
        "attention": attention,
        "feed-forward": 2 * count * frames * d * config.encoder_ffn_embed_dim,
        "heads": count * frames * d * config.target_dim,
        "other": 0 if channels == d else frames * channels * d,
    }


@pytest.mark.parametrize("behaviour", ["paper", "released"])
@pytest.mark.parametrize("pattern", ["alternate", "none", (False, True, True, False)])
def test_students_by_hand(behaviour: str, pattern: object) -> None:
    config = StudentConfig.model_validate(
        {
            "conv_layers": ((8, 10, 5), (12, 1, 1), *((12, 3, 2),) * 4, *((20, 2, 2),) * 2),
            "encoder_layers": 4,
            "encoder_embed_dim": 16,
            "encoder_ffn_embed_dim": 24,
            "encoder_attention_heads": 4,
            "conv_pos": 16,
            "conv_pos_groups": 4,
            "target_dim": 32,
            "attention_reuse": pattern,
            "reuse_behaviour": behaviour,
        }
    )
    student = Student(config)
    profile = profile_student(student, 2.0)
    assert profile.macs == by_hand(config, 2.0)
    assert profile.total_parameters == sum(p.numel() for p in student.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())


def test_teacher_by_hand() -> None:
    teacher = load_teacher("random:2x32")
    profile = profile_teacher(teacher, 2.0)
    frames = num_frames(32_000)
    assert profile.macs["attention"] == 2 * (4 * frames * 32 * 32 + 2 * frames * frames * 32)
    assert profile.macs["feed-forward"] == 2 * 2 * frames * 32 * 128
    assert profile.macs["other"] == frames * 21 * 32
    assert profile.total_parameters == teacher.num_parameters


@pytest.fixture(scope="module")
def hubert_base() -> Profile:
    return profile_teacher(load_teacher(HUBERT_BASE), SECONDS)


@pytest.mark.slow
def test_the_published_shares_of_hubert_base(hubert_base: Profile) -> None:
    armhubert = Student(load_config(REPOSITORY / "configs/armhubert-960.yaml").resolve_student(12, 768))
    profile = profile_student(armhubert, SECONDS)
    assert profile.macs == by_hand(armhubert.config, SECONDS)
    assert profile.total_parameters == 26_448_448
    assert round(100 * profile.total_parameters / hubert_base.total_parameters) == 28
    assert round(100 * profile.total_macs / hubert_base.total_macs) == 30


def test_command(tmp_path: Path) -> None:
    config = REPOSITORY / "configs" / "demo.yaml"
    result = CliRunner().invoke(
        application, ["profile", str(config), "--seconds", "1", "--output", str(tmp_path / "counts.json")]
    )
    assert result.exit_code == 0, result.output
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["teacher_name"] == "builtin:phone-hubert"
    share = counts["student"]["total_macs"] / counts["teacher"]["total_macs"]
    assert f"{share:.1%}" in result.output
    result = CliRunner().invoke(application, ["profile", str(tmp_path / "nothing")])
    assert result.exit_code == 2 and "is not a student" in result.output
    result = CliRunner().invoke(application, ["profile", str(config), "--seconds", "0.01"])
    assert result.exit_code == 2 and "one frame" in result.output


def test_a_run_is_compared_with_its_own_teacher(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    save_student(Student(tiny_student(encoder_layers=1)), run / "export")
    (run / "config.yaml").write_text("name: one\nteacher: {checkpoint: 'random:2x32'}\ntrain: {}\n")
    for model in (run, run / "export"):
        output = tmp_path / "new" / f"{model.name}.json"
        result = CliRunner().invoke(application, ["profile", str(model), "--seconds", "1", "--output", str(output)])
        assert result.exit_code == 0, result.output
        assert json.loads(output.read_text())["teacher_name"] == "random:2x32"


def test_an_unusable_output_is_reported_before_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("counting has started")

    monkeypatch.setattr("ray_distill.pipeline.model_profile.profile_student", never)
    (tmp_path / "file").write_text("mine")
    for output, message in (
        (tmp_path / "file" / "counts.json", "nothing can be written"),
        (tmp_path, "is a folder"),
        (tmp_path / "file", "exists already; choose another --output"),
    ):
        result = CliRunner().invoke(
            application, ["profile", str(REPOSITORY / "configs" / "demo.yaml"), "--output", str(output)]
        )
        assert result.exit_code == 2 and message in result.output and result.output.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"
