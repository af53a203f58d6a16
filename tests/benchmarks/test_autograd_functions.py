"""The benchmark of autograd functions runs, finds equal gradients, and counts the bytes that are saved."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


def test_quick(tmp_path: Path) -> None:
    output = tmp_path / "functions.json"
    command = [sys.executable, "-m", "benchmarks.training_step.autograd_functions", "--quick", "--output", str(output)]
    subprocess.run(command, capture_output=True, check=True, timeout=120, cwd=REPOSITORY)
    rows = {row["function"]: row for row in json.loads(output.read_text())["rows"]}
    assert rows.keys() == {"convolution", "dropout", "attention", "scale_gradient"}
    for name in ("convolution", "scale_gradient"):
        assert rows[name]["relative_difference"] < 1e-5
    # A mask of one byte per entry, where PyTorch saves a float.
    assert rows["dropout"]["saved_bytes_plain"] == 4 * rows["dropout"]["saved_bytes_ours"] > 0
    assert rows["convolution"]["saved_bytes_ours"] < 0.6 * rows["convolution"]["saved_bytes_plain"]
    assert rows["attention"]["saved_bytes_ours"] < rows["attention"]["saved_bytes_plain"]
