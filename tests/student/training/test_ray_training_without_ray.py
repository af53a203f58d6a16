"""Messages for errors of Ray Train, without starting Ray."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.train
import ray.train.torch
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)

from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.training import ray_training
from ray_distill.student.training.ray_training import TrainingError, _explain, _worker, train_on_ray
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.teacher_cache.masks import MaskDraws


@pytest.mark.parametrize(
    ("failures", "message"),
    [
        (
            [RuntimeError("Connection closed by peer"), torch.OutOfMemoryError("CUDA out of memory. Tried to ...")],
            "failed 3 times .train.max_failures is 2., the last time because a worker ran out of memory; lower train.batch_size,",
        ),
        (
            [RuntimeError("[...] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")],
            "ran out of memory; .*, set train.checkpoint_activations=true, or lower corpus.max_seconds if one utterance is too",
        ),
        (
            [WorkerHealthCheckFailedError("rank 0", OutOfMemoryError("The node was running low on memory."))],
            "ran out of memory; lower train.batch_size",
        ),
        (
            [RuntimeError("Connection closed by peer"), WorkerHealthCheckFailedError("rank 1", ActorDiedError())],
            "because a worker's process died, for example because the machine ran out of memory; if memory ran out, lower",
        ),
        ([UserExceptionWithTraceback(KeyError("x"), "")], "a worker failed: 'x'; the same command continues"),
    ],
)
def test_workers_that_fail_too_often_are_one_sentence(
    settings: Callable[..., TrainSettings], failures: list[Exception], message: str
) -> None:
    error = _explain(ray.train.WorkerGroupError("...", dict(enumerate(failures))), settings())
    assert isinstance(error, TrainingError) and "\n" not in str(error)
    assert re.search(message, str(error)), error


def test_batches_that_were_found_can_be_given_smaller(settings: Callable[..., TrainSettings]) -> None:
    group = ray.train.WorkerGroupError("...", {0: torch.OutOfMemoryError("CUDA out of memory.")})
    auto = settings(batch_size=None, batch_seconds="auto", use_gpu=True)
    assert "lower train.batch_seconds (a number below what auto found), set" in str(_explain(group, auto))


def test_what_a_worker_says_to_the_user_is_passed_on(settings: Callable[..., TrainSettings]) -> None:
    said = UserExceptionWithTraceback(ValueError("the student doesn't fit"), "")
    group = ray.train.WorkerGroupError("...", {0: UserExceptionWithTraceback(ConnectionError("peer"), ""), 1: said})
    assert str(_explain(group, settings())) == "the student doesn't fit"


def test_workers_that_find_no_room_are_one_sentence(settings: Callable[..., TrainSettings]) -> None:
    error = _explain(ray.train.ControllerError(WorkerGroupStartupTimeoutError(2)), settings(workers=2))
    assert re.match(
        r"Ray could not start the training's 2 workers \(The worker group .* 2 workers\); change", str(error)
    )


class FakeTask:
    """Stands for a Ray task with some outcomes; `get` raises those that are exceptions, and returns what is in a list."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, outcomes: list[object]) -> None:
        self.outcomes, self.options, self.cancelled = iter(outcomes), dict[str, object](), list[object]()
        monkeypatch.setattr("ray.remote", lambda **options: self.options.update(options) or (lambda _: self))
        monkeypatch.setattr("ray.get", self.get)
        monkeypatch.setattr("ray.cancel", lambda running, force: self.cancelled.append((running, force)))

    def remote(self, job: dict[str, object]) -> object:
        return next(self.outcomes)

    def get(self, outcome: object) -> object:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome[0] if isinstance(outcome, list) else outcome


def start(config: StudentConfig, settings: TrainSettings, folder: Path, **options: Any) -> None:
    data: dict[str, Any] = {"cache": "cache", "teacher": "random:2x32", "masks": MaskDraws(), "utterances": []}
    train_on_ray(config, settings, folder, layers=(1, 2), **data, **options)


@pytest.mark.parametrize(
    ("outcomes", "kind", "message"),
    [
        ([WorkerCrashedError(), None], None, ""),
        (
            [WorkerCrashedError()] * 3,
            TrainingError,
            "failed 3 times .* a worker's process died, .*; if memory ran out, lower",
        ),
        (
            [OutOfMemoryError("low on memory")] * 3,
            TrainingError,
            "failed 3 times .* because a worker ran out of memory; lower",
        ),
        (
            [RayTaskError("f", "Traceback\n", KeyError("x"))] * 3,
            TrainingError,
            "because a worker failed: 'x'; the same command",
        ),
        ([RayTaskError("f", "Traceback\n", OSError("no space left"))] * 3, OSError, "^no space left$"),
        ([[FloatingPointError("the loss was not finite")]], FloatingPointError, "^the loss was not finite$"),
        ([KeyboardInterrupt()], KeyboardInterrupt, "^$"),
    ],
)
def test_a_single_worker_is_a_task_that_is_started_again(
    settings: Callable[..., TrainSettings],
    tiny: StudentConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outcomes: list[object],
    kind: type[BaseException] | None,
    message: str,
) -> None:
    task = FakeTask(monkeypatch, outcomes)

    def train() -> None:
        start(tiny, settings(workers=1), tmp_path, reserved_cpus=2, as_task=True)

    if kind is None:
        train()
    else:
        with pytest.raises(kind, match=message):
            train()
    assert next(task.outcomes, None) is None, "it was not started as often as it should"
    assert task.options == {"num_cpus": 2, "num_gpus": 0, "max_retries": 0}
    assert task.cancelled == ([(outcomes[0], True)] if kind is KeyboardInterrupt else [])


def test_ray_does_not_look_for_room_for_ever(
    settings: Callable[..., TrainSettings], tiny: StudentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trainer:
        def __init__(self, worker: object, *, run_config: ray.train.RunConfig, **options: object) -> None:
            assert run_config.failure_config.controller_failure_limit > 0

        def fit(self) -> None:
            raise ray.train.ControllerError(WorkerGroupStartupTimeoutError(2))

    monkeypatch.setattr("ray.train.torch.TorchTrainer", Trainer)
    with pytest.raises(TrainingError, match="could not start the training's 2 workers"):
        start(tiny, settings(workers=2), tmp_path)


def test_what_a_restart_would_repeat_is_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[Exception] = []
    ranks = iter([(0, 1), (1, 2), (0, 2), (0, 1)])

    class Context:
        def __init__(self) -> None:
            self.rank, self.ranks = next(ranks)

        def get_world_rank(self) -> int:
            return self.rank

        def get_world_size(self) -> int:
            return self.ranks

    def fail(*arguments: object, **options: object) -> None:
        raise raised[-1]

    monkeypatch.setattr(ray.train, "get_context", Context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ray_training, "_RayMetrics", lambda run: type("Metrics", (), {"set": None}))
    monkeypatch.setattr(ray_training, "_train", fail)
    job = {"refusal": str(tmp_path / "refusal"), "threads": 1, "folder": str(tmp_path)}
    raised.append(ValueError("the state is damaged"))
    assert _worker(job) is raised[-1], "a single worker is not restarted"
    with pytest.raises(ValueError, match="the state is damaged"):
        _worker(job)
    assert str(_worker(job)) == "the state is damaged", "the workers that Ray restarts return at once"
    (tmp_path / "refusal").unlink()
    raised.append(ValueError("the shard is damaged"))
    raised[-1].__cause__ = OSError("connection reset")
    with pytest.raises(ValueError, match="the shard is damaged"):
        _worker(job)
    assert not (tmp_path / "refusal").exists(), "a store that could not be reached is tried again"
