"""The benchmark of a training step checks that both implementations agree, and its file agrees with what it prints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


def test_quick(tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.training_step.student_step",
        "--quick",
        "--device",
        "cpu",
        "--output",
        str(output),
    ]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, cwd=REPOSITORY).stdout
    record = json.loads(output.read_text())
    assert record["machine"]["cores"] >= 1 and record["versions"]["torch"]
    assert "--quick" in record["command"] and record["commit"]
    assert max(record["relative_differences"].values()) < 1e-4
    (row,) = record["rows"]
    assert (row["device"], row["precision"], row["seconds"]) == ("cpu", "fp32", 0.5)
    for name in ("published", "ours"):
        assert row[f"forward_seconds_{name}"] > 0
        assert row[f"step_seconds_{name}"] > row[f"forward_seconds_{name}"]
        # Weight gradients and activations take at least this much; a tiny student must not take more.
        assert 2**18 < row[f"peak_bytes_{name}"] < 2**29
    assert row["memory_ratio"] == row["peak_bytes_ours"] / row["peak_bytes_published"]
    assert f"{row['step_speedup']:.2f}x" in printed
