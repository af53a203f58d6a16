"""The lock of a run's folder: a second process is refused, a killed process is succeeded, and a refused run leaves nothing."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from ray_distill.pipeline.ablation.definition import load_ablation
from ray_distill.pipeline.ablation.sweep import Sweep
from ray_distill.pipeline.config import ConfigError, load_config
from ray_distill.pipeline.run_lock import RunInUseError
from ray_distill.pipeline.stages import Run, run_stages

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "configs" / "demo.yaml"
HOLDER = """
import sys, time
from pathlib import Path
from rich.console import Console
import ray_distill.pipeline.stages as stages
from ray_distill.pipeline.config import load_config

def wait(run):
    print("started", flush=True)
    time.sleep(300)

stages._STAGES["index"] = wait
stages.run_stages(stages.Run(load_config(Path(sys.argv[1]), sys.argv[2:]), Console(quiet=True)), ["index"])
"""


@pytest.fixture
def overrides(tmp_path: Path, speech_folder: Path) -> list[str]:
    paths = (f"corpus.path={speech_folder}", f"cache.path={tmp_path / 'cache'}", f"runs={tmp_path / 'runs'}")
    return [*paths, "teacher.checkpoint=random:2x64"]


@pytest.fixture
def holder(overrides: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process in the index stage of the run."""
    command = [sys.executable, "-c", HOLDER, str(DEMO), *overrides]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "started\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def start(overrides: list[str], console: Console | None = None) -> None:
    run_stages(Run(load_config(DEMO, overrides), console or Console(quiet=True)), ["index"])


def test_the_same_run_twice(holder: subprocess.Popen[str], overrides: list[str], tmp_path: Path) -> None:
    message = f"the run in {tmp_path}/runs/demo is in use by process {holder.pid} on {socket.gethostname()}, started 20"
    for again in (overrides, [*overrides, "train.seed=1"]):
        with pytest.raises(RunInUseError, match=message) as caught:
            start(again)
        assert "\n" not in str(caught.value)
    start([*overrides, "name=other"])
    assert holder.poll() is None, "the first process is not disturbed"

    holder.send_signal(signal.SIGKILL)
    holder.wait()
    console = Console(record=True, width=300)
    start(overrides, console)
    said = console.export_text()
    assert f"process {holder.pid} on {socket.gethostname()}" in said and "continuing its run" in said
    assert not (tmp_path / "runs" / "demo" / ".lock-holder.json").exists()
    console = Console(record=True, width=300)
    start(overrides, console)
    assert "continuing" not in console.export_text(), "the process before this one ended properly"


def test_an_ablation_locks_its_runs(overrides: list[str], tmp_path: Path) -> None:
    base = load_config(DEMO, overrides).model_dump(mode="json")
    tree = {"name": "two", "base": base, "seeds": [0], "variants": {"a": {}, "b": {"train.loss": "l1"}}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(tree))
    sweep = Sweep(load_ablation(tmp_path / "two.yaml"), Console(quiet=True))
    assert not (tmp_path / "runs").exists(), "checking an ablation writes nothing"
    run = sweep.runs["b-seed0"]
    with (
        run.folder.begin(run.config),
        pytest.raises(RunInUseError, match=f"b-seed0 is in use by process {os.getpid()}"),
    ):
        sweep.run()
    assert [path.name for path in (tmp_path / "runs" / "two").iterdir()] == ["b-seed0"], "nothing but the run in use"


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("index", "corpus.path=/nowhere", "there is no corpus at /nowhere"),
        ("plan", "train.seed=1", "run the index stage first"),
        ("export", "train.seed=1", "no finished training"),
    ],
)
def test_a_refused_run_leaves_no_folder(
    overrides: list[str], tmp_path: Path, stage: str, override: str, message: str
) -> None:
    config = load_config(DEMO, [*overrides, override])
    with pytest.raises(ValueError, match=message):
        run_stages(Run(config, Console(quiet=True)), [stage])
    assert not (tmp_path / "runs").exists()


def test_a_failed_stage_leaves_what_earlier_stages_made(overrides: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished training"):
        run_stages(Run(load_config(DEMO, overrides), Console(quiet=True)), ["index", "export"])
    assert (tmp_path / "runs" / "demo" / "corpus").is_dir()


def test_a_relative_path_in_a_ray_job_leaves_no_folder(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({}))
    with pytest.raises(
        ConfigError, match="cache.path: caches/x is relative, but a Ray job runs in a copy of its folder"
    ):
        start([*overrides, "cache.path=caches/x"])
    assert not (tmp_path / "runs").exists()
