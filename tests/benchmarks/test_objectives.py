"""The comparison of objectives runs and writes its results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_objective_is_trained_and_probed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.student.objectives", "--steps", "2", "--minutes", "1", "--epochs", "1"]
    subprocess.run([*command, "--output", str(tmp_path / "a.json")], check=True, timeout=300, cwd=REPOSITORY)
    record = json.loads((tmp_path / "a.json").read_text())
    layers, *discrete = record["rows"]
    assert len(record["outcomes"]) == len(record["rows"]) + 3
    assert all(row["bytes_per_frame"] < layers["bytes_per_frame"] / 50 for row in discrete)
