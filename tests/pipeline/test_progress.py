"""What a run tells: lines in place of a bar, where it was interrupted, and what is refused before any work."""

import io
import json
import os
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ray_distill.pipeline import ray_session
from ray_distill.pipeline.config import ConfigError
from ray_distill.pipeline.ray_session import RayStartError, check_ray, owns_ray, quiet_ray
from ray_distill.pipeline.stages import Run, progress, run_stages
from ray_distill.pipeline.stages.progress import Position
from ray_distill.pipeline.stages.train import _show_metrics
from ray_distill.student.training import run_files

from ..tiny import demo_config


def test_lines_without_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
    said = io.StringIO()
    run = Run(demo_config(tmp_path), Console(file=said, width=40))

    def wait_for(pattern: str) -> None:
        while not re.search(pattern, said.getvalue()):
            time.sleep(0.01)

    with run.progress("train", "steps") as update:
        wait_for(r"\n")
        update(1000, 3000, "loss 0.5")
        time.sleep(0.02)
        update(1200, 3000, "loss 0.4")
        wait_for(r"1,200 .*unchanged for .*\n")
    lines = said.getvalue().splitlines()
    assert re.match(r"train   no steps finished yet, \d+ s since", lines[0])
    line = next(line for line in lines if line.startswith("train   1,200 of 3,000 steps (40%), "))
    assert " per second, " in line and re.search(r" left, loss 0\.4$", line)
    assert re.search(r"unchanged for \d+ s, loss 0\.4$", lines[-1])


def test_lines_do_not_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing changes, the time between two lines doubles."""
    waited = 0

    def wait(seconds: float) -> bool:
        nonlocal waited
        waited += 1
        if waited == 20:
            position.update(7, 9)
        return waited == 40

    monkeypatch.setattr(progress.time, "monotonic", lambda: 30.0 * waited)
    position = Position("cache", "utterances")
    assert [line.removeprefix("cache   ") for line in progress._lines(position, wait)] == [
        *(
            f"no utterances finished yet, {text} since the start"
            for text in ("30 s", "60 s", "2 min", "4 min", "8 min")
        ),
        "7 of 9 utterances (78%)",
        *(f"7 of 9 utterances (78%), unchanged for {text}" for text in ("30 s", "2 min", "4 min", "8 min")),
    ]


def test_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    monkeypatch.setenv("TERM", "xterm")
    said = io.StringIO()
    run = Run(demo_config(tmp_path), Console(file=said, width=100, force_terminal=True))
    with run.progress("index", "files") as update:
        update(1, 2)
        time.sleep(0.2)
    assert "1/2" in said.getvalue() and "finished yet" not in said.getvalue()


def test_the_batches_that_a_training_found_are_said_once(tmp_path: Path) -> None:
    said = io.StringIO()
    auto = ("train.batch_seconds=auto", "train.use_gpu=true")
    run = Run(demo_config(tmp_path, *auto), Console(file=said, width=200))
    rows = [
        {
            "kind": "batch",
            "step": 0,
            "batch_seconds": 97.5,
            "peak_bytes": 61_200_000_000,
            "limit_bytes": 71_000_000_000,
        },
        {"kind": "train", "step": 1, "steps": 9, "loss": 0.5},
    ]
    run.folder.path.mkdir(parents=True)
    run.folder.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done, seen = threading.Event(), []

    def update(step: int, steps: int, note: str = "") -> None:
        seen.append((step, steps, note))
        if len(seen) == 2:
            done.set()

    _show_metrics(run, update, done, 0, measures=True)
    assert seen == [(1, 9, "loss 0.5000")] * 2
    sentence = "train   batches of 97.5 s of audio (auto); a step needs 61.2 of the 71.0 GB that it may use"
    assert said.getvalue().splitlines() == [sentence]


def test_what_a_pruning_has_left_is_said_before_the_second_phase(tmp_path: Path) -> None:
    said = io.StringIO()
    run = Run(demo_config(tmp_path), Console(file=said, width=200))
    pruning = run.folder.path / run_files.PRUNING
    student = pruning / run_files.PRUNED
    student.mkdir(parents=True)
    row = {"kind": "train", "step": 6, "steps": 6, "loss": 0.5, "sparsity": 0.4}
    (pruning / run_files.METRICS).write_text(json.dumps(row) + "\n")
    done, ended = threading.Event(), False

    def update(step: int, steps: int, note: str = "") -> None:
        nonlocal ended
        if not ended and "pruning, " in note:  # The first phase is over.
            record = {"parameters": 1500, "parameters_before": 3000, "sparsity": 0.5, "expected_sparsity": 0.4}
            (student / "config.json").write_text(json.dumps({"metadata": record}))
            row = {"kind": "train", "step": 1, "steps": 4, "loss": 0.4}
            run.folder.metrics_file.write_text(json.dumps(row) + "\n")
        elif not ended:
            run.say("second phase")
            done.set()
            ended = True

    _show_metrics(run, update, done, 0, measures=False, prunes=True)
    lines = said.getvalue().splitlines()
    left = "train   pruning has left 1,500 of 3,000 parameters without heads (sparsity 0.500)"
    assert lines[0] == left and "only reached a sparsity of 0.400" in lines[1] and lines[2:] == ["second phase"]
    # The training may end within the second in which the record is written.
    _show_metrics(run, update, done, 0, measures=False, prunes=True)
    assert said.getvalue().splitlines()[3] == left


def test_an_interruption_says_where_it_was_and_what_comes_next(tmp_path: Path) -> None:
    run = Run(demo_config(tmp_path), Console(quiet=True))
    run.position = Position("index", "files")
    assert run.interruption() == "interrupted in the index stage; the same command resumes from there"
    run.position = Position("plan")
    assert run.interruption() == "interrupted in the plan stage; the same command runs this stage again"
    with run.progress("cache", "utterances") as update:
        update(5, 20)
    assert run.interruption() == (
        "interrupted in the cache stage after 5 of 20 utterances; the same command resumes from there"
    )
    with run.progress("train", "steps") as update:
        update(12, 40)
    start = "interrupted in the train stage after 12 of 40 steps; the same command "
    assert run.interruption() == f"{start}starts the training again, since it has no checkpoint yet"
    state = run.folder.checkpoints / run_files.LAST / run_files.STATE
    state.parent.mkdir(parents=True)
    torch.save({"state": {"step": 10}, "parts": {}, "random": []}, state)
    assert run.interruption() == f"{start}resumes from step 10"
    state.write_bytes(b"damaged")
    assert run.interruption() == f"{start}starts the training again, since it has no checkpoint yet"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.checkpoint=/nowhere/teacher.pt"], "there is no teacher '/nowhere/teacher.pt'"),
        (["teacher.layers=[3]"], "there is no layer 3"),
        (["cache.precision=fp16"], "cache.precision fp16 needs GPUs; set cache.gpus_per_actor"),
        (
            ["cache.batch_seconds=auto"],
            "^cache.batch_seconds auto measures the memory of a GPU, but the teacher runs on the CPU; give the seconds, as in "
            "cache.batch_seconds=120, or set cache.gpus_per_actor=1$",
        ),
        (["train.targets=online", "cache.precision=fp16"], "cache.precision fp16 needs GPUs; set train.use_gpu=true"),
        (["corpus.path=/nowhere"], "/nowhere"),
        (["corpus.train_splits=[none]"], "none"),
        (["student.encoder_layers=5"], "predict"),
    ],
)
def test_a_run_that_is_refused_leaves_no_folder(
    overrides: list[str], message: str, tmp_path: Path, speech_folder: Path
) -> None:
    run = Run(demo_config(tmp_path, f"corpus.path={speech_folder}", *overrides), Console(quiet=True))
    with pytest.raises(ValueError, match=message):
        run_stages(run, ["index", "plan", "cache", "train"])
    assert not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("key", ["runs", "cache.path", "corpus.path", "teacher.checkpoint"])
def test_a_job_refuses_relative_paths(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = demo_config(
        tmp_path, f"corpus.path={tmp_path}", f"{key}=mean-mask:here" if "teacher" in key else f"{key}=here"
    )
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "")
    Run(config, Console(quiet=True))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({}))
    with pytest.raises(ConfigError, match=f"{key}: here is relative, but a Ray job"):
        Run(config, Console(quiet=True))


def test_what_ray_needs_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.setenv(name, "")
    assert owns_ray(), "an empty variable is not set"
    check_ray()
    monkeypatch.setenv("TMPDIR", f"/tmp/{'long' * 20}")
    with pytest.raises(ConfigError, match=r"^TMPDIR=/tmp/long.* characters too long .*RAY_TMPDIR=/tmp$"):
        check_ray()
    monkeypatch.setenv("RAY_TMPDIR", "/proc/version/ray")
    with pytest.raises(ConfigError, match=r"^RAY_TMPDIR=/proc/version/ray: Ray can't write to /proc/version; set RAY_"):
        check_ray()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setattr(ray_session, "_FREE_BYTES", 1e18)
    with pytest.raises(ConfigError, match=r"^RAY_TMPDIR=/tmp: .* MB are free, but Ray needs at least"):
        check_ray()
    monkeypatch.setattr("resource.getrlimit", lambda kind: (64, 64))
    with pytest.raises(
        ConfigError, match=r"may open 64 files \(ulimit -Hn\), but Ray needs at least 1024; .*ulimit -n"
    ):
        check_ray()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    check_ray()  # The cluster's machines are others.


def test_the_last_words_of_ray_are_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "ray.log"
    log.write_text("an older failure\n")
    for error, shown in ((ValueError("a mistake"), False), (RayStartError("no start"), True), (SystemExit(1), True)):
        with pytest.raises(type(error)), quiet_ray(log):
            os.write(2, b"too many open files\n")
            raise error
        said = capfd.readouterr().err
        assert said == (f"The last lines of {log}:\ntoo many open files\n" if shown else "")
