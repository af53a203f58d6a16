"""``ray-distill push``, against a small hub on this machine."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from ray_distill.command_line import application
from ray_distill.pipeline.publishing.public_origin import public_origin
from ray_distill.student import Student, save_student
from ray_distill.teacher_cache.teachers import load_teacher
from tests.hub_server import TOKEN, HubServer, running_hub, use_hub
from tests.tiny import tiny_student, tiny_tree

NAME = "owner/student"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running_hub() as server:
        use_hub(server, tmp_path / "hub-cache", monkeypatch)
        server.uploads = tmp_path / "uploads"
        yield server


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Folder of a run with a teacher on the hub, whose configuration names folders of this machine."""
    torch.manual_seed(0)
    folder = tmp_path / "runs" / "tiny"
    save_student(Student(tiny_student()), folder / "export")
    sections = {
        "corpus": {"path": str(tmp_path / "secret-place" / "speech")},
        "teacher": {"checkpoint": "owner/teacher"},
        "cache": {"path": "s3://secret-bucket/cache"},
        "runs": str(tmp_path / "runs"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tiny_tree(**sections)))
    summary = {"teacher": "owner/teacher@abc", "teacher_source": f"hf://owner/teacher@{'a' * 40}", "hours": 1.5}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def push(run: Path, *options: str) -> Result:
    return CliRunner().invoke(application, ["push", str(run), NAME, "--license", "apache-2.0", *options])


def test_a_pushed_student_has_a_card_and_no_path_of_this_machine(
    run: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = push(run, "--language", "en", "--dataset", "openslr/librispeech_asr", "--private")
    assert done.exit_code == 0 and f"{hub.endpoint}/{NAME}/commit/" in done.output, done.output
    repository = hub.repositories[NAME]
    assert repository.access == "private"
    folder = [*repository.commits.values()][-1]
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) | {"tags": None} == {
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
        "license": "apache-2.0",
        "language": ["en"],
        "datasets": ["openslr/librispeech_asr"],
        "base_model": ["owner/teacher"],
        "tags": None,
    }
    assert f'AutoModel.from_pretrained("{NAME}", trust_remote_code=True)' in text and "1.5" in text
    assert f"teacher on the hub: hf://owner/teacher@{'a' * 40}" in text
    for file in folder.rglob("*"):
        content = file.read_bytes()
        assert str(tmp_path).encode() not in content and b"secret" not in content, file
    assert json.loads((folder / "config.json").read_text())["origin"]["configuration"]["corpus"]["path"] == "speech"
    assert load_teacher(NAME).num_layers == 2, "the student teaches the next one from the hub"


def test_refusals(run: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, *options: str) -> None:
        done = push(run, *options)
        assert done.exit_code == 2 and message in done.output and done.output.count("\n") == 1, done.output

    refused("needs a token that may write there; set HF_TOKEN")
    done = CliRunner().invoke(application, ["push", str(run), "nope", "--license", "mit"])
    assert (
        done.exit_code == 2 and "'nope' is not the name of a repository on the hub; write OWNER/NAME\n" in done.output
    )
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    refused("which answers 403; use a token that may write there")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    old = tmp_path / "old"
    old.mkdir()
    (old / "pytorch_model.bin").write_bytes(b"old")
    hub.add(NAME, old)
    refused("already has 1 files, such as pytorch_model.bin; choose another name, or replace them with --force")
    assert len(hub.repositories[NAME].commits) == 1
    assert push(run, "--force").exit_code == 0
    last = [*hub.repositories[NAME].commits.values()][-1]
    assert (last / "model.safetensors").is_file() and not (last / "pytorch_model.bin").exists()


def test_places_of_files_are_left_out() -> None:
    places = ["/data/speech", "~/cache/", "s3://bucket/a/cache", "mean-mask:/models/x.pt", "from /a/b to /c/d"]
    kept = ["owner/name", "hf://owner/name@c", "a/b", "random:2x32", "1/2"]
    found = public_origin({"a": {"b": [*places, *kept, 3, None]}})["a"]["b"]
    assert found == ["speech", "cache", "cache", "mean-mask:x.pt", "from b to d", *kept, 3, None]
