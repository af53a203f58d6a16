"""The benchmarks that need real speech run and write their results."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


def run(shared: Path, output: Path, module: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--output", str(output)]
    subprocess.run(command, check=True, timeout=300, cwd=REPOSITORY, env=os.environ | {"SHARED_DATA": str(shared)})
    record: dict[str, Any] = json.loads(output.read_text())
    assert record["machine"]["cores"] >= 1
    return record


def test_codecs(tmp_path: Path, shared: Path) -> None:
    arguments = ["--seconds", "40", "--steps", "2", "--seeds", "2", "--codecs", "fp32,pca:1", "--untrained", "int8"]
    record = run(shared, tmp_path / "a.json", "cache.codec_rate_distortion", "measure", *arguments)
    exact, ours, int8 = record["rows"]
    assert exact["error"] == [0.0] * 6
    assert exact["bytes_per_frame"] == 6 * 192 * 4
    assert 0.05 < max(ours["error"]) < 0.4 and max(int8["error"]) < 0.05
    assert len(ours["losses"]) == 2 and int8["losses"] == []
    assert ours["loss_change"] == pytest.approx(sum(ours["loss_change_of_seeds"]) / 2)


def test_bytes_beside_the_audio(tmp_path: Path, shared: Path) -> None:
    arguments = ["beside", "--seconds", "30", "--codecs", "mvq:2,fp16"]
    audio, two, floats = run(shared, tmp_path / "a.json", "cache.codec_rate_distortion", *arguments)["rows"]
    assert 12_000 < audio["bytes_per_second"] < 24_000 and floats["bytes_per_second"] > 0.98 * 50 * 192 * 2
    # Two bytes a frame, and about a kilobyte for the records of each utterance.
    assert 100 < two["bytes_per_second"] < 400 and two["fixed_bytes"] > 2 * 2 * 256 * 192 * 4


def test_parity(tmp_path: Path, shared: Path) -> None:
    record = run(shared, tmp_path / "a.json", "student.parity", "measure", "--quick")
    assert [row["targets"] for row in record["rows"]] == ["online", "1 draw", "2 draws"]
    starts = {row["validation"][0][1] for row in record["rows"]}
    assert len(starts) == 1, "all start from the same student"


def test_reader_and_build(tmp_path: Path, shared: Path) -> None:
    record = run(shared, tmp_path / "a.json", "cache.reader", "speed", "--quick")
    assert {row["way"] for row in record["rows"]} == {"cached, pca", "resident", "online"}
    assert record["reading_alone"][0]["megabytes_per_second"] > 0
    record = run(shared, tmp_path / "b.json", "cache.cache_build", "--quick")
    assert [row["way"] for row in record["rows"]] == ["bare teacher", "build without Ray", "usual way"]
    assert record["rows"][0]["share_of_bare"] == 1.0


def test_order(tmp_path: Path) -> None:
    output = tmp_path / "order.json"
    command = [sys.executable, "-m", "benchmarks.cache.reader", "order", "--count", "3000", "--epochs", "3"]
    subprocess.run([*command, "--output", str(output)], check=True, timeout=120, cwd=REPOSITORY)
    ours, _, shuffled, bucketed = json.loads(output.read_text())["rows"]
    assert ours["padding_waste"] < 0.05 < shuffled["padding_waste"]
    assert shuffled["meet_again"] < ours["meet_again"] < bucketed["meet_again"]
    assert abs(ours["position_correlation"]) < 0.1
