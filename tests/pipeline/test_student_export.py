"""The export of a student: its inputs, its record of origin, its formats, and mistakes."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from ray_distill.command_line import application
from ray_distill.pipeline import student_export
from ray_distill.pipeline.student_export import open_student
from ray_distill.student import Student, save_student
from ray_distill.teacher_cache.storage.cache import Cache

from ..tiny import TEACHER, tiny_student

TINY = tiny_student()


@pytest.fixture
def run_folder(tmp_path: Path, make_cache) -> Path:  # type: ignore[no-untyped-def]
    """Return the folder of a run with the files that an export reads."""
    make_cache(tmp_path / "cache")
    run = tmp_path / "runs" / "tiny"
    torch.manual_seed(0)
    save_student(Student(TINY), run / "export", {"step": 12, "validation_loss": 0.5})
    config = {
        "name": "tiny",
        "teacher": {"checkpoint": TEACHER},
        "cache": {"path": str(tmp_path / "cache")},
        "train": {"targets": "cached", "loss": "mse"},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    summary = {
        "hours": 0.5,
        "teacher": TEACHER,
        "teacher_is_random": True,
        "cache": str(tmp_path / "cache"),
        "training": {"steps": 12, "last_loss": 0.4},
    }
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def test_an_installed_package_has_no_commit_of_a_clone_around_it(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student_export, "_REPOSITORY", Path(__file__).parent)
    assert open_student(run_folder)[1]["commit"] is None


def test_origin_of_a_run(run_folder: Path) -> None:
    _, origin = open_student(run_folder)
    assert origin["run"] == "tiny" and "RANDOM" in origin["teacher"]
    assert origin["cache_fingerprint"] == Cache.open(run_folder.parent.parent / "cache").fingerprint
    assert origin["metrics"] == {"step": 12, "validation_loss": 0.5, "steps": 12, "last_loss": 0.4}
    assert origin["configuration"]["train"]["loss"] == "mse" and origin["student"]["encoder_layers"] == 2
    assert origin["commit"]
    # The exported folder gives the same origin; a copy outside the run does not know its run.
    assert open_student(run_folder / "export")[1] == origin
    moved = run_folder.parent.parent / "elsewhere" / "deep" / "student"
    moved.parent.mkdir(parents=True)
    (run_folder / "export").rename(moved)
    assert "run" not in open_student(moved)[1]


def test_a_removed_cache_has_no_fingerprint(run_folder: Path) -> None:
    (run_folder.parent.parent / "cache" / "cache.json").unlink()
    assert open_student(run_folder)[1]["cache_fingerprint"] is None


def test_the_fingerprint_belongs_to_the_training_cache(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # A relative path in the configuration now leads to no cache, or to another one.
    text = (run_folder / "config.yaml").read_text()
    (run_folder / "config.yaml").write_text(text.replace(str(tmp_path / "cache"), "caches/relative"))
    assert open_student(run_folder)[1]["cache_fingerprint"] == Cache.open(tmp_path / "cache").fingerprint
    # The fingerprint before the cache grew.
    (run_folder / "train.json").write_text(json.dumps({"steps": 12, "cache_fingerprint": "f00"}))
    origin = open_student(run_folder)[1]
    assert origin["cache_fingerprint"] == "f00" and origin["metrics"]["steps"] == 12


@pytest.mark.parametrize("text", ["lr: 3\n", "- a\n", "name: other\nteacher: big\ntrain: {}\n", ""])
def test_a_config_yaml_of_another_program_is_not_a_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    for place in ("export", "student", "checkpoints/best"):
        save_student(Student(TINY), tmp_path / place)
        assert "run" not in open_student(tmp_path / place)[1]


def test_only_exports_and_checkpoints_belong_to_a_run(run_folder: Path) -> None:
    for place, of_run in (("checkpoints/best", True), ("student", False), ("a/b", False)):
        save_student(Student(TINY), run_folder / place)
        assert ("run" in open_student(run_folder / place)[1]) == of_run, place


def test_a_published_checkpoint_belongs_to_no_run(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_distill.pipeline.student_export.load_student", lambda *_: Student(TINY))
    (run_folder / "export" / "student.ckpt").write_bytes(b"")
    assert "run" not in open_student(run_folder / "export" / "student.ckpt", run_folder / "published.yaml")[1]


@pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
def test_a_damaged_record_is_one_sentence(run_folder: Path, tmp_path: Path, name: str) -> None:
    (run_folder / name).write_text("name: [")
    result = CliRunner().invoke(
        application, ["export", str(run_folder), "--format", "s3prl", "--output", str(tmp_path / "x")]
    )
    assert result.exit_code == 2 and name in result.output and result.output.count("\n") == 1


@pytest.mark.slow
def test_formats(run_folder: Path, tmp_path: Path) -> None:
    for form, output, file in (
        ("s3prl", "my_student", "my_student/expert.py"),
        ("huggingface", "hf", "hf/model.safetensors"),
        ("torch", "student.pt2", "student.pt2"),
    ):
        result = CliRunner().invoke(
            application, ["export", str(run_folder), "--format", form, "--output", str(tmp_path / output)]
        )
        assert result.exit_code == 0, result.output
        assert result.output == f"export  {tmp_path / output} (features: heads)\n", "and no messages of PyTorch"
        assert (tmp_path / file).is_file()


@pytest.mark.parametrize(("chosen", "features"), [([], "heads"), (["--features", "layers"], "layers")])
def test_features_are_in_the_origin(run_folder: Path, tmp_path: Path, chosen: list[str], features: str) -> None:
    arguments = ["export", str(run_folder), "--format", "s3prl", "--output", str(tmp_path / "mine"), *chosen]
    result = CliRunner().invoke(application, arguments)
    assert result.exit_code == 0 and f"(features: {features})" in result.output
    record = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert record["origin"]["features"] == record["model"]["features"] == features
    assert f"- features: {features}" in (tmp_path / "mine" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--format", "s3prl", "--output", "x"], "is not a student"),
        (["MODEL", "--format", "s3prl", "--output", "my-student"], "Python identifier"),
        (["BARE", "--format", "s3prl", "--features", "heads", "--output", "x"], "has no heads"),
        (["MODEL", "--format", "s3prl", "--int8", "--output", "x"], "--int8"),
        (["RUN", "--format", "s3prl", "--output", "x"], "has no exported student"),
        (["MODEL", "--format", "torch", "--output", "x.bin"], r"must end in .pt2"),
        (["MODEL", "--format", "onnx", "--output", "x"], "folders; name it x.onnx"),
    ],
)
def test_mistakes(run_folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    model = run_folder / "export"
    if arguments[0] == "RUN":
        model.rename(tmp_path / "moved")
    save_student(Student(TINY).without_heads(), tmp_path / "bare")
    places = {"MODEL": str(model), "RUN": str(run_folder), "BARE": str(tmp_path / "bare")}
    result = CliRunner().invoke(application, ["export", *(places.get(a, a) for a in arguments)])
    assert result.exit_code == 2
    assert message in result.output and result.output.count("\n") == 1
