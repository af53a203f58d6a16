"""The benchmark of a device runs on a CPU without Ray, and its checks hold there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


def test_quick(tmp_path: Path) -> None:
    output = tmp_path / "device.json"
    code = (
        "import sys; from pathlib import Path; from benchmarks.device import main; "
        f"main('cpu', True, Path({str(output)!r})); assert 'ray' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240, cwd=REPOSITORY
    )
    record = json.loads(output.read_text())
    assert record["device"] == "cpu" and record["commit"]
    assert [row["targets"] for row in record["steps"]] == ["resident", "cached", "online"]
    assert all(row["audio_seconds_per_second"] > 0 for row in record["steps"] + record["reader"] + record["inference"])
    assert [row["codec"] for row in record["codecs"]] == ["pca", "layer-pca", "int8", "fp16"]
    assert record["build"][0]["relative_to_bare_teacher"] > 0
    assert record["per_step"]["kernels"] > 100
    assert record["auto"] == [], "a CPU has no memory of a GPU"
    assert len(record["checks"]) >= 10
    assert all(row["passed"] for row in record["checks"])
