"""Work that fits nowhere: refused where waiting would bring nothing, waited for where a cluster may grow."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from ray_distill.pipeline.config import ConfigError
from ray_distill.pipeline.stages import Run, fitting

from ..tiny import demo_config

Start = Callable[..., tuple[Run, io.StringIO]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """A run on a machine of two cores, and what it says; Ray is not started, and the training only leaves its result."""

    def make(*overrides: str) -> tuple[Run, io.StringIO]:
        said = io.StringIO()
        run = Run(demo_config(tmp_path, *overrides), Console(file=said, width=1000))

        def training() -> None:
            losses = ("first_loss", "last_loss", "first_validation_loss", "last_validation_loss")
            result = ", ".join(f'"{key}": 1' for key in ("steps", "seconds", *losses))
            (run.folder / "train.json").write_text(f"{{{result}}}")

        monkeypatch.setattr(run, "training", lambda threads: training)
        return run, said

    monkeypatch.setattr("ray_distill.pipeline.stages.init_ray", lambda: None)
    monkeypatch.setattr("ray_distill.pipeline.stages.node_resources", lambda: [{"CPU": 2.0}])
    monkeypatch.setattr(Run, "check_cache", lambda run: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return make


def test_workers_that_fit_are_trained(start: Start) -> None:
    run, said = start("train.workers=2")
    run.train()
    assert "wait" not in said.getvalue() and (run.folder / "train.json").is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("train.workers=3",),
            "3 workers of 1 cores each are needed; Ray has 2 cores",
        ),
        (
            ("train.use_gpu=true",),
            "2 workers of 1 cores and 1 GPUs each are needed; Ray has 2 cores and 0 GPUs on 1",
        ),
    ],
)
def test_workers_that_fit_nowhere(
    start: Start, overrides: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = start(*overrides)
    with pytest.raises(ConfigError, match=f"train.workers, train.use_gpu: {message}.* and gets no more"):
        run.train()
    assert not (run.folder / "train.json").exists()
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # Others' machines may join.
    run, said = start(*overrides)
    run.train()
    assert f"wait    for room: {message}" in said.getvalue()
    assert (run.folder / "train.json").is_file()


@pytest.mark.parametrize("override", ["cache.gpus_per_actor=0.5", "cache.cpus_per_actor=3"])
def test_cache_actors_that_fit_nowhere(start: Start, override: str) -> None:
    run, _ = start(override)
    with pytest.raises(
        ConfigError, match="cache.cpus_per_actor, cache.gpus_per_actor: a worker of .* is needed; Ray has 2"
    ):
        run.cache_targets()


def test_fitting_counts_machine_by_machine() -> None:
    nodes = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 3.0}, {}]
    assert fitting(nodes, 2, 0) == 3
    assert fitting(nodes, 1, 1) == 1 and fitting(nodes, 1, 0.5) == 2
    assert fitting(nodes, 5, 0) == 0
