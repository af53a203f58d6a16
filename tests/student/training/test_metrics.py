"""Metrics of a training: rows, TensorBoard and trackers."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.training.metrics import Metrics, agreement_row, check_trackers
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.training_loop import train
from ray_distill.teacher_cache.reader import CacheReader

Settings = Callable[..., TrainSettings]
Readers = tuple[CacheReader, CacheReader]


def test_cosines_are_named_by_layer_and_kind_of_frame() -> None:
    sums = torch.tensor([[1.0, 3.0, 4.0], [5.0, -10.0, 10.0]])
    assert agreement_row(torch.stack([sums, torch.zeros(2, 3)]), ("04", "07")) == {
        "cosine_masked_layer_04": 0.25,
        "cosine_masked_layer_07": 0.75,
        "cosine_unmasked_layer_04": 0.5,
        "cosine_unmasked_layer_07": -1.0,
    }


def test_a_kind_of_frame_that_did_not_occur_has_no_cosine() -> None:
    sums = torch.tensor([[[0.0, 0.0], [-3.0, 3.0]], [[1.0, 2.0], [0.0, 0.0]]])
    assert agreement_row(sums, ("01",)) == {"cosine_unmasked_layer_01": -1.0, "accuracy_masked_layer_01": 0.5}


def test_rows_beyond_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    with Metrics(tmp_path, None) as metrics:
        for step in range(1, 6):
            metrics.write({"kind": "train", "step": step, "loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 6, "lo')
    with Metrics(tmp_path, 3) as metrics:
        metrics.write({"kind": "train", "step": 4, "loss": 40.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    with Metrics(tmp_path, None):
        assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_rows_are_handed_on_as_they_are_written(
    tmp_path: Path, tiny: StudentConfig, settings: Settings, readers: Readers
) -> None:
    seen: list[dict[str, Any]] = []
    train(tiny, settings(max_steps=6, validate_every=3, log_every=2), *readers, tmp_path, on_row=seen.append)
    assert seen == [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in seen} == {"train", "validation"}


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Return the calls received by a stand-in for wandb."""
    calls: list[tuple[str, Any]] = []

    def init(**arguments: Any) -> SimpleNamespace:
        calls.append(("init", arguments))
        return SimpleNamespace(
            id=arguments["id"] or "made-up",
            log=lambda values, step: calls.append(("log", (step, values))),
            finish=lambda exit_code: calls.append(("finish", exit_code)),
        )

    module = ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Return the calls received by a stand-in for mlflow."""
    calls: list[tuple[str, Any]] = []

    def start_run(**arguments: Any) -> SimpleNamespace:
        calls.append(("start_run", arguments))
        return SimpleNamespace(info=SimpleNamespace(run_id=arguments.get("run_id", "made-up")))

    module = ModuleType("mlflow")
    module.start_run = start_run  # type: ignore[attr-defined]
    module.log_params = lambda params: calls.append(("log_params", params))  # type: ignore[attr-defined]
    module.log_metrics = lambda values, step: calls.append(("log_metrics", (step, values)))  # type: ignore[attr-defined]
    module.end_run = lambda status: calls.append(("end_run", status))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return calls


def test_trackers_get_every_row(
    tmp_path: Path,
    tiny: StudentConfig,
    settings: Settings,
    readers: Readers,
    wandb: list[tuple[str, Any]],
    mlflow: list[tuple[str, Any]],
) -> None:
    options = settings(trackers=("wandb", "mlflow"), max_steps=3)
    train(tiny, options, *readers, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = [
        (
            row["step"],
            {f"{row['kind']}/{name}": value for name, value in row.items() if name not in ("kind", "step", "steps")},
        )
        for row in rows
    ]
    assert [value for name, value in wandb if name == "log"] == expected
    assert [value for name, value in mlflow if name == "log_metrics"] == expected
    first, arguments = wandb[0]
    assert first == "init"
    assert arguments["name"] == "run"
    assert arguments["config"]["train.learning_rate"] == 5e-3
    assert arguments["config"]["student.encoder_layers"] == 2
    assert wandb[-1] == ("finish", 0)
    assert mlflow[0] == ("start_run", {"run_name": "run"})
    assert mlflow[1] == ("log_params", arguments["config"])
    assert mlflow[-1] == ("end_run", "FINISHED")


def test_trackers_go_on_with_the_same_run_and_hear_of_failures(
    tmp_path: Path, wandb: list[tuple[str, Any]], mlflow: list[tuple[str, Any]]
) -> None:
    with pytest.raises(FloatingPointError), Metrics(tmp_path, None, ("wandb", "mlflow")):
        raise FloatingPointError
    assert wandb[-1] == ("finish", 1)
    assert mlflow[-1] == ("end_run", "FAILED")
    with Metrics(tmp_path, 7, ("wandb", "mlflow")):
        pass
    assert [arguments["id"] for name, arguments in wandb if name == "init"] == [None, "made-up"]
    assert [arguments for name, arguments in mlflow if name == "start_run"] == [
        {"run_name": tmp_path.name},
        {"run_id": "made-up"},
    ]
    # A new training is a new run of the tracker.
    with Metrics(tmp_path, None, ("wandb",)):
        pass
    assert wandb[-2][1]["id"] is None


def test_trackers_are_imported_only_where_configured(
    tmp_path: Path, wandb: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Metrics(tmp_path, None), Metrics(tmp_path, None, ("wandb",), enabled=False) as other:
        other.write({"kind": "train", "step": 1, "loss": 1.0})
    assert wandb == []
    assert not (tmp_path / "trackers.json").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused(
    tmp_path: Path, settings: Settings, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        importlib.import_module(name)
    for refuse in (check_trackers, lambda names: Metrics(tmp_path, None, names)):
        with pytest.raises(
            ValueError, match=f"train.trackers has {name}, which is not installed; `pip install {name}`"
        ):
            refuse(settings(trackers=(name,)).trackers)
