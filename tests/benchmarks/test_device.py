"""The benchmark of a device runs on a CPU without Ray, and its checks hold there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from benchmarks import device as benchmark
from benchmarks.device import QUICK, Bench, large_batches, measure_auto_build
from ray_distill.teacher_cache.build import build_cache, shard_writer
from ray_distill.teacher_cache.build.pass_memory import PassMemory
from ray_distill.teacher_cache.teachers import load_teacher

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
    assert record["auto"] == record["auto_build"] == [], "a CPU has no memory of a GPU"
    assert len(record["checks"]) >= 10
    assert all(row["passed"] for row in record["checks"])


def test_what_fails_does_not_end_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: Bench) -> None:
        raise RuntimeError("no kernel\nis there")

    monkeypatch.setattr(benchmark, "measure_inference", broken)
    with pytest.raises(SystemExit, match=r"^failed: inference \(RuntimeError: no kernel\)$"):
        benchmark.main("cpu", True, tmp_path / "device.json", ["memory", "inference", "checks"])
    record = json.loads((tmp_path / "device.json").read_text())
    assert record["failed"] == ["inference (RuntimeError: no kernel)"]
    assert record["memory"] and len(record["checks"]) > 5 and "teacher" not in record
    with pytest.raises(typer.BadParameter, match="--only speed is none of teacher, build, "):
        benchmark.main("cpu", True, tmp_path / "device.json", ["speed"])


def test_a_large_batch_equals_its_parts(tmp_path: Path) -> None:
    checks = list(large_batches(Bench(torch.device("cpu"), QUICK, tmp_path), rows=4, seconds=1))
    assert len(checks) == 3
    assert all(0 <= difference < 1e-3 * limit for _, difference, limit in checks[2:])
    assert all(difference < limit for _, difference, limit in checks)


def test_what_a_build_finds_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(torch.device("cpu"), QUICK, tmp_path)
    assert measure_auto_build(bench) == []
    # A function stands for the memory of a GPU.
    bench.device, bench.on_gpu = torch.device("cuda", 0), True
    for module in (build_cache, shard_writer):
        monkeypatch.setattr(module, "load_teacher", lambda spec, device="cpu": load_teacher(spec))
    monkeypatch.setattr(PassMemory, "_usable_bytes", lambda memory, share: 30_000_000)
    monkeypatch.setattr(PassMemory, "_peak", lambda memory, lengths: 1_000_000 * len(lengths) * max(lengths) // 16_000)
    for name in ("max_memory_allocated", "max_memory_reserved", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 7)
    rows = measure_auto_build(bench)
    assert [row["precision"] for row in rows] == ["fp32", "fp16"]
    for row in rows:
        assert 25 < row["batch_seconds"][0] <= 30 and row["audio_seconds_per_second"] > 0
        assert row["notes"][0].startswith(f"batches of {row['batch_seconds'][0]:g} s of audio (auto) on ")
        assert row["search_allocated_bytes"] == 7
