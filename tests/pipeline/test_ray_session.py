"""Work that does not fit on Ray's nodes: refused on a local Ray, announced on a cluster, which may grow."""

import io
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from rich.console import Console

from ray_distill.interruption import Interrupted, interruptible
from ray_distill.pipeline.config import ConfigError, load_config
from ray_distill.pipeline.ray_session import (
    RayStartError,
    count_fitting_workers,
    counted,
    describe_resources,
    init_ray,
)
from ray_distill.pipeline.stages import Run
from ray_distill.pipeline.stages.cache import cache_targets
from ray_distill.pipeline.stages.train import train_student

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
Start = Callable[..., tuple[Run, io.StringIO]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """A run on a machine with two cores, and its output. Ray is not started, and the training only writes its result."""

    def make(*overrides: str) -> tuple[Run, io.StringIO]:
        paths = ("teacher.checkpoint=random:2x64", f"cache.path={tmp_path / 'cache'}", f"runs={tmp_path / 'runs'}")
        said = io.StringIO()
        run = Run(load_config(DEMO, [*paths, *overrides]), Console(file=said, width=1000))

        def training() -> None:
            losses = ("first_loss", "last_loss", "first_validation_loss", "last_validation_loss")
            result = ", ".join(f'"{key}": 1' for key in ("steps", "seconds", *losses))
            run.folder.result_file.write_text(f"{{{result}}}")

        monkeypatch.setattr("ray_distill.pipeline.stages.train.prepare_training", lambda run, threads: training)
        return run, said

    for stage in ("cache", "train"):
        monkeypatch.setattr(f"ray_distill.pipeline.stages.{stage}.init_ray", lambda: None)
    monkeypatch.setattr("ray_distill.pipeline.ray_session.node_resources", lambda: [{"CPU": 2.0}])
    monkeypatch.setattr("ray_distill.pipeline.stages.train.check_cache", lambda run: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return make


def test_workers_that_fit_are_trained(start: Start) -> None:
    run, said = start("train.workers=2")
    train_student(run)
    assert "wait" not in said.getvalue() and run.folder.is_trained


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("train.workers=3",),
            "3 workers with 1 core each are needed{but} Ray has 2 cores and 0 GPUs on 1 machine",
        ),
        (
            ("train.use_gpu=true", "train.workers=2"),
            "2 workers with 1 core and 1 GPU each are needed{but} Ray has 2 cores and 0 GPUs on 1 machine",
        ),
    ],
)
def test_workers_that_fit_nowhere(
    start: Start, overrides: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = start(*overrides)
    with pytest.raises(
        ConfigError, match=f"train.workers, train.use_gpu: {message.format(but=', but')} and can't grow"
    ):
        train_student(run)
    assert not run.folder.result_file.exists()
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # Other machines may join a cluster.
    run, said = start(*overrides)
    train_student(run)
    assert f"wait    waiting for resources: {message.format(but=';')}" in said.getvalue()
    assert run.folder.is_trained


@pytest.mark.parametrize("override", ["cache.gpus_per_actor=0.5", "cache.cpus_per_actor=3"])
def test_cache_actors_that_fit_nowhere(start: Start, override: str) -> None:
    run, _ = start(override)
    with pytest.raises(
        ConfigError, match="cache.cpus_per_actor, cache.gpus_per_actor: a worker with .* is needed, but Ray has 2"
    ):
        cache_targets(run)


def test_workers_fit_on_one_machine_each() -> None:
    nodes = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 3.0}, {}]
    assert count_fitting_workers(nodes, 2, 0) == 3
    assert count_fitting_workers(nodes, 1, 1) == 1 and count_fitting_workers(nodes, 1, 0.5) == 2
    assert count_fitting_workers(nodes, 5, 0) == 0
    assert describe_resources(nodes) == "Ray has 7 cores and 1 GPU on 3 machines"


def test_a_noun_follows_its_number() -> None:
    assert [counted(n, "file") for n in (0, 1, 0.5, 1_234_567)] == ["0 files", "1 file", "0.5 files", "1234567 files"]


@pytest.mark.parametrize(
    ("limit", "starts", "message"),
    [
        (4_096_000, 1, r"at most 4 MB here \(ulimit -f\), .* start this with `ulimit -f unlimited`"),
        (resource.RLIM_INFINITY, 3, "within 30 s in 3 attempts, because this machine is busy"),
    ],
)
def test_ray_that_does_not_start_in_time(
    monkeypatch: pytest.MonkeyPatch, limit: int, starts: int, message: str
) -> None:
    begun = []

    def start(**options: object) -> None:
        begun.append(options["address"])
        raise RuntimeError("The current node timed out during startup. This could happen because ...")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", start)
    real = resource.getrlimit
    monkeypatch.setattr(
        resource, "getrlimit", lambda kind: (limit, limit) if kind == resource.RLIMIT_FSIZE else real(kind)
    )
    with pytest.raises(RayStartError, match=message):
        init_ray()
    assert begun == ["local"] * starts


def test_sigterm_while_ray_starts_is_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # As Ray does.
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", start)
    # Where Ray is loaded, such a process ends, so the signals are ignored afterwards.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.raises(Interrupted) as caught, interruptible():
            init_ray()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert caught.value.exit_code == 143
