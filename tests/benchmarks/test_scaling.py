"""The benchmark of the simulation runs, and its plots are drawn from its result file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


def test_quick(tmp_path: Path, shared: Path) -> None:
    output = tmp_path / "scaling.json"
    command = [sys.executable, "-m", "benchmarks.cluster.scaling"]
    subprocess.run([*command, "measure", "--quick", "--output", str(output)], check=True, timeout=250, cwd=REPOSITORY)
    record = json.loads(output.read_text())
    assert record["worker"]["audio_per_second"] > 0
    assert 8_000 < record["audio_bytes_per_second"] < 32_000
    (build,) = record["builds"]
    assert len(build["finished"]) == len(build["shards"])
    slow = [row for row in record["reads"] if row["share_of_need"] == 0.5]
    fast = [row for row in record["reads"] if row["share_of_need"] == 4]
    assert slow[0]["seconds"] > fast[0]["seconds"]
    arguments = ["plot", "--source", str(output), "--output", str(tmp_path), "--shards", "100"]
    subprocess.run([*command, *arguments], check=True, timeout=120, cwd=REPOSITORY)
    assert {path.name for path in tmp_path.glob("*.svg")} == {"scaling-build.svg", "scaling-train.svg"}
