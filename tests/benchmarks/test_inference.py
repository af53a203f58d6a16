"""The inference benchmark measures every candidate, and its file agrees with what it prints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

for package in ("transformers", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason=f"needs {package} (the dev extra has it)")

REPOSITORY = Path(__file__).resolve().parents[2]


def test_quick(tmp_path: Path) -> None:
    output = tmp_path / "inference.json"
    printed = subprocess.run(
        [sys.executable, "-m", "benchmarks.student.inference", "--quick", "--output", str(output)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    record = json.loads(output.read_text())
    names = {row["candidate"] for row in record["rows"]}
    assert len(names) + len(record["not_run"]) == 9 and names >= {"student", "student, ONNX", "student, ONNX int8"}
    assert all(row["peak_bytes"] > 2**16 for row in record["rows"][-2:])
    for row in record["rows"]:
        assert row["latency_seconds"] > 0 and row["bytes_of_weights"] > 2**10
        assert row["real_time_factor"] == row["latency_seconds"] / 0.5
        assert row["candidate"] in printed
        if row["candidate"] == "HuBERT Base, transformers":
            assert row["throughput_over_hubert_base"] == 1
