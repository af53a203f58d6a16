"""The demo at a reduced size: every stage, the service, and a second run that reuses the work of the first."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from ray_distill.command_line import application
from ray_distill.teacher_cache.maintenance.verify import verify_cache

REPOSITORY = Path(__file__).resolve().parents[3]
SMALL = [
    "cache.shard_minutes=0.2",
    "train.max_steps=6",
    "train.validate_every=3",
    "train.log_every=1",
    "train.batch_seconds=8",
]


def run(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"COLUMNS": "200", "RAY_USAGE_STATS_ENABLED": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=1000,
    )


def invoke(*arguments: str, **environment: str) -> Result:
    """Run a command in this process and in the current folder, which saves the seconds of importing PyTorch and Ray."""
    return CliRunner().invoke(application, arguments, env={"COLUMNS": "200"} | environment)


@pytest.mark.ray
def test_demo_runs_and_reuses(tmp_path: Path, speech_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (speech_folder / "train-tones" / "broken.flac").write_bytes(b"this is not audio")
    demo = [str(REPOSITORY / "pipeline" / "run.py"), "demo", "teacher.checkpoint=random:2x32", *SMALL]
    first = run(demo, tmp_path, CORPUS=str(speech_folder))
    assert first.returncode == 0, first.stdout + first.stderr
    assert "RANDOM weights" in first.stdout
    assert re.search(r"features over HTTP\W+\(\d+, 56\) float32", first.stdout)
    assert "no phone errors are measured, since the corpus has no phones.csv" in first.stdout
    run_folder = tmp_path / "runs" / "demo-corpus"
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["utterances"] == 12
    assert summary["skipped_files"] == 1
    assert "broken.flac" in (run_folder / "corpus" / "skipped.csv").read_text()
    assert verify_cache(tmp_path / "caches" / "demo-corpus") == []
    rows = [json.loads(row) for row in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if row["kind"] == "validation"] == [0, 3, 6]
    for name in (
        "config.yaml",
        "report.html",
        "export/model.safetensors",
        "export/config.json",
        "checkpoints/best",
        "checkpoints/last",
        "tensorboard",
    ):
        assert (run_folder / name).exists(), name

    second = run(demo, tmp_path, CORPUS=str(speech_folder))
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("reused") == 3, second.stdout

    monkeypatch.chdir(tmp_path)
    other = invoke(*demo[1:], "train.seed=7", CORPUS=str(speech_folder))
    assert other.exit_code == 2
    assert "another configuration (train." in other.stderr
    codec = invoke(*demo[1:], "cache.codec=fp32", "name=second", CORPUS=str(speech_folder))
    assert codec.exit_code == 2
    assert "codec: 'pca' -> 'fp32'" in codec.stderr


@pytest.mark.ray
def test_online_targets_need_no_cache(tmp_path: Path, speech_folder: Path) -> None:
    command = [
        *(str(REPOSITORY / "pipeline" / "run.py"), "--config", str(REPOSITORY / "configs" / "demo.yaml")),
        *(
            "teacher.checkpoint=random:2x32",
            f"corpus.path={speech_folder}",
            "train.targets=online",
            "train.workers=1",
            *SMALL,
        ),
    ]
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "caches").exists()
    assert json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())["targets"] == "online"


@pytest.mark.ray
def test_two_teachers_in_one_run(tmp_path: Path, speech_folder: Path) -> None:
    teachers = [{"name": "a", "checkpoint": "random:2x32"}, {"name": "b", "checkpoint": "random:2x48", "weight": 0.5}]
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"base": "demo", "name": "two", "teachers": teachers}))
    command = [str(REPOSITORY / "pipeline" / "run.py"), "--config", "two.yaml", f"corpus.path={speech_folder}", *SMALL]
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in "ab":
        assert re.search(rf"cache +{name}: \d+ shards? written", done.stdout), done.stdout
    summary = json.loads((tmp_path / "runs" / "two" / "summary.json").read_text())
    assert [one["name"] for one in summary["teachers"]] == ["a", "b"] and summary["training"]["steps"] == 6
    assert all(one["last_validation_loss"] > 0 for one in summary["teachers"])
    assert set(summary["training"]["cache_fingerprint"]) == {"a", "b"}


def test_a_corrected_command_is_not_refused(
    tmp_path: Path, speech_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["--config", str(REPOSITORY / "configs" / "demo.yaml"), "--stages", "index"]
    wrong = invoke(*command, "corpus.path=/nowhere")
    assert wrong.exit_code == 2
    right = invoke(*command, f"corpus.path={speech_folder}")
    assert right.exit_code == 0, right.output
    assert "12 utterances" in right.stdout
    more_actors = invoke(*command, f"corpus.path={speech_folder}", "cache.actors=2")
    assert more_actors.exit_code == 0, more_actors.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.epoch=3"], "train.epoch: unknown key; did you mean train.epochs?"),
        (["--stages", "bake"], "unknown stage 'bake'; stages are index, plan, cache, train, export, report"),
        (["corpus.path=/nowhere/at/all"], "/nowhere/at/all"),
        (["--stages", "plan"], "has no complete corpus index; run the index stage first"),
        (["teacher.checkpoint=/nowhere.pt", "--stages", "plan"], "there is no teacher '/nowhere.pt'"),
        (["--stages", "export"], "no finished training to export"),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("--config", str(REPOSITORY / "configs" / "demo.yaml"), *arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert "Traceback" not in done.output
