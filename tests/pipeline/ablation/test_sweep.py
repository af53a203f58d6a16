"""A whole ablation: runs share one cache, a failed run does not stop the others, and finished work is reused."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from ray_distill.command_line import application

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).resolve().parents[3]


def ablate(path: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "pipeline" / "run.py"), "ablate", "--config", str(path)],
        cwd=folder,
        env=os.environ | {"COLUMNS": "200", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1000,
    )


def test_an_ablation_from_end_to_end(tmp_path: Path, speech_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = ["path,label,split"]
    for n, file in enumerate(sorted(speech_folder.rglob("*.flac"))):
        labels.append(f"{file},{'low' if n % 2 else 'high'},{'test' if n > 7 else 'train'}")
    (tmp_path / "pitch.csv").write_text("\n".join(labels))
    demo = yaml.safe_load((REPOSITORY / "configs" / "demo.yaml").read_text())
    del demo["train"]["hint_weight"]  # The objective of the variant "star" has no such key.
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(demo))
    tree = {
        "name": "small",
        "base": str(tmp_path / "base.yaml"),
        "set": {
            "corpus.path": str(speech_folder),
            "teacher.checkpoint": "random:2x32",
            "cache.shard_minutes": 0.2,
            "cache.path": str(tmp_path / "cache"),
            "train.workers": 1,
            "train.max_steps": 3,
            "train.validate_every": 3,
            "train.batch_seconds": 8,
            "train.max_skipped_steps": 1,
        },
        "variants": {
            "layer-2": {"teacher.layers": [2]},
            "draws-1": {"masks.draws": 1},
            "star": {"train.objective": "star", "student.heads": "none"},
            "diverges": {"train.learning_rate": 1e30, "train.warmup_fraction": 0},
        },
        "seeds": [0],
        "cpus_per_worker": 1,
        "probe": {"manifest": "pitch.csv", "epochs": 1},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    done = ablate(path, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    output = " ".join(done.stdout.split())
    assert "diverges-seed0 failed: " in output and "not finite in 1 steps in a row" in output
    assert "1 of 4 runs failed; run the same command to try them again" in output
    runs = tmp_path / "runs" / "small"
    for name in ("layer-2-seed0", "draws-1-seed0", "star-seed0"):
        for file in ("config.yaml", "train.json", "report.html", "summary.json", "export/model.safetensors"):
            assert (runs / name / file).is_file(), f"{name}/{file}"
        assert "pitch" in (runs / name / "report.html").read_text(), "the probe is in the run's report"
    table = {row["variant"]: row for row in csv.DictReader((runs / "table.csv").open())}
    assert table["diverges"]["seeds"] == "0" and table["draws-1"]["seeds"] == "1"
    for name in ("draws-1", "star"):
        assert 0 <= float(table[name]["pitch, accuracy: mean"]) <= 1
    assert "validation loss: mean" not in table["star"], "losses of two objectives are not compared"
    page = (runs / "report.html").read_text()
    assert "Teacher time" in page and "teacher seconds per second of audio" in page and "diverges-seed0 failed" in page
    spec = json.loads((tmp_path / "cache" / "cache.json").read_text())["spec"]
    assert spec["layers"] == [1, 2] and spec["masks"]["draws"] == 2, "one cache serves all runs"

    built = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.parquet")}
    trained = {file: file.stat().st_mtime_ns for file in runs.glob("*/train.json")}
    tree["variants"]["diverges"] = {"train.learning_rate": 1e-4}
    path.write_text(yaml.safe_dump(tree))
    # Neither command starts Ray, so they run in this process.
    monkeypatch.chdir(tmp_path)
    other = CliRunner().invoke(application, ["ablate", "--config", str(path)], env={"COLUMNS": "200"})
    assert other.exit_code == 2 and "another configuration (train." in other.stderr
    del tree["variants"]["diverges"]
    path.write_text(yaml.safe_dump(tree))
    again = CliRunner().invoke(application, ["ablate", "--config", str(path)], env={"COLUMNS": "200"})
    assert again.exit_code == 0, again.output
    assert "all 3 runs are finished, reused" in again.stdout
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.parquet")} == built
    assert {file: file.stat().st_mtime_ns for file in runs.glob("*/train.json")} == trained
