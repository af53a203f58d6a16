"""The part of an ablation outside of Ray: the work that is left, the resources it needs, and when a run counts as reported."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from rich.console import Console
from typer.testing import CliRunner

from ray_distill.command_line import Command
from ray_distill.pipeline.ablation.definition import load_ablation
from ray_distill.pipeline.ablation.sweep import Job, Probing, Sweep, _is_reported
from ray_distill.pipeline.ablation.sweep_progress import _active
from ray_distill.pipeline.commands.ablate import ablate
from ray_distill.pipeline.config import ConfigError, dump_config
from ray_distill.pipeline.probing.probe_record import read_probes
from ray_distill.pipeline.run_folder import RunFolder
from ray_distill.pipeline.stages import Run
from ray_distill.pipeline.stages.train import initial_student
from ray_distill.student import Student, save_student

from ...tiny import tiny_tree

Start = Callable[..., Sweep]
BASE = tiny_tree(train={"batch_seconds": 8, "use_gpu": True})


@pytest.fixture
def start(tmp_path: Path, speech_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """An ablation of two runs on a machine with two cores and no GPU. Ray is not started, and jobs for Tune are not run."""
    files = sorted(speech_folder.rglob("*.flac"))
    rows = [f"{file},{'low' if n % 2 else 'high'},{'test' if n > 7 else 'train'}" for n, file in enumerate(files)]
    (tmp_path / "pitch.csv").write_text("\n".join(["path,label,split", *rows]))

    def make(**changes: Any) -> Sweep:
        tree = {"name": "two", "base": BASE, "seeds": [0], "variants": {"a": {}, "b": {"train.loss": "l1"}}} | changes
        path = tmp_path / "two.yaml"
        path.write_text(yaml.safe_dump(tree))
        ablation = load_ablation(path, [f"runs={tmp_path / 'runs'}", f"cache.path={tmp_path / 'cache'}"])
        return Sweep(ablation, Console(quiet=True))

    def unwanted(run: Run) -> None:
        raise AssertionError("corpus and cache are for runs that are not trained")

    for stage in ("index_audio", "plan_cache", "cache_targets", "check_cache"):
        monkeypatch.setattr(f"ray_distill.pipeline.ablation.sweep.{stage}", unwanted)
    monkeypatch.setattr("ray_distill.pipeline.ablation.sweep.init_ray", lambda: None)
    monkeypatch.setattr("ray_distill.pipeline.ablation.sweep.node_resources", lambda: [{"CPU": 2.0}])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return make


def finish(run: Run) -> None:
    """Write what a training leaves."""
    student, _ = initial_student(run)
    save_student(Student(student), run.folder.best, {})
    run.folder.config_file.write_text(dump_config(run.config))
    run.folder.result_file.write_text("{}")


def test_a_probe_of_a_finished_ablation_needs_neither_cache_nor_gpu(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in start().runs.values():
        finish(run)
    left: dict[str, Job] = {}

    def probe(self: Sweep, jobs: Mapping[str, Job], concurrent: int) -> dict[str, str]:
        left.update(jobs)
        for job in jobs.values():
            job()
        return {}

    monkeypatch.setattr(Sweep, "_train", probe)
    monkeypatch.setattr(Probing, "probe_baselines", lambda *arguments: None)
    for stage in ("export_best", "report_run"):
        monkeypatch.setattr(f"ray_distill.pipeline.ablation.sweep.{stage}", lambda run: None)
    probing = {"manifest": "pitch.csv", "epochs": 1}
    sweep = start(probe=probing, cpus_per_worker=16)
    assert sweep.run() == {}
    assert left.keys() == {"a-seed0", "b-seed0"}
    for name, job in left.items():
        assert job.training is None and job.resources["CPU"] == 1 and "GPU" not in job.resources
        [probed] = read_probes(sweep.runs[name].folder.path)
        assert probed.student is not None and probed.student.source == "student"
    left.clear()
    assert start(probe=probing).run() == {} and not left, "a finished probe is not repeated"
    start(probe=probing | {"epochs": 2}).run()
    assert left.keys() == {"a-seed0", "b-seed0"}, "other settings are another probe"
    assert len(read_probes(sweep.runs["a-seed0"].folder.path)) == 2


@pytest.mark.parametrize("concurrent", [None, 1])
def test_only_runs_that_are_left_to_train_need_resources(start: Start, concurrent: int | None) -> None:
    sweep = start(concurrent=concurrent)
    finish(sweep.runs["a-seed0"])
    with pytest.raises(
        ConfigError, match="^b-seed0: 1 worker with 1 core and 1 GPU each can't run; Ray has 2 cores and 0"
    ):
        sweep.run()


def test_a_run_is_reported_when_summary_and_page_are_there_and_young(tmp_path: Path) -> None:
    def write(name: str, time: int) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        os.utime(path, (time, time))

    write("train.json", 10)
    write("summary.json", 20)
    assert not _is_reported(RunFolder(tmp_path)), "the report is missing, as after a kill"
    write("report.html", 20)
    assert _is_reported(RunFolder(tmp_path))
    write("probes/pitch/probe.json", 30)
    assert not _is_reported(RunFolder(tmp_path))


def test_units_without_a_probe_are_refused(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command(cls=Command)(ablate)
    done = CliRunner().invoke(app, ["--config", str(tmp_path / "none.yaml"), "--units", "words"])
    assert done.exit_code == 2 and "--units needs --probe" in " ".join(done.output.split())


def test_the_list_reads_the_manifest_of_the_probe(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command(cls=Command)(ablate)
    done = CliRunner().invoke(app, ["--config", "ablations/aggregate", "--list", "--probe", str(tmp_path / "none.csv")])
    assert (
        done.exit_code == 2
        and "can't be read" in " ".join(done.output.split())
        and "aggregate: 9 runs" not in done.output
    )


def test_the_progress_of_runs_includes_their_pruning(tmp_path: Path) -> None:
    folders = [RunFolder(tmp_path / name) for name in ("waiting", "pruned", "prunes", "damaged", "old")]
    row = {"kind": "train", "step": 7, "steps": 9, "loss": 2.0, "sparsity": 0.25}
    for folder in folders[1:]:
        for path in (folder.path / "pruning" / "metrics.jsonl", folder.metrics_file):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(row | {"step": 7 if "pruning" in path.parts else 3}) + "\n")
    folders[2].metrics_file.unlink()
    folders[3].metrics_file.write_text("{]\n")
    for path in (folders[4].path / "pruning" / "metrics.jsonl", folders[4].metrics_file):
        os.utime(path, (1000, 1000))
    pruned, prunes, damaged = _active(folders, since=2000)
    assert pruned == "pruned step 3 of 9, loss 2.0000"
    assert prunes == "prunes step 7 of 9, pruning, sparsity 0.250, loss 2.0000"
    assert damaged.startswith("damaged: ") and "metrics.jsonl" in damaged
