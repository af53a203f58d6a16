"""Messages for errors of Ray Train, without starting Ray."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import ray.train
import ray.train.torch
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)

from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.training.ray_training import TrainingError, _explain, train_on_ray
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


def test_what_a_worker_says_to_the_user_is_passed_on(settings: Callable[..., TrainSettings]) -> None:
    said = UserExceptionWithTraceback(ValueError("the student doesn't fit"), "")
    group = ray.train.WorkerGroupError("...", {0: UserExceptionWithTraceback(ConnectionError("peer"), ""), 1: said})
    assert str(_explain(group, settings())) == "the student doesn't fit"


def test_workers_that_find_no_room_are_one_sentence(settings: Callable[..., TrainSettings]) -> None:
    error = _explain(ray.train.ControllerError(WorkerGroupStartupTimeoutError(2)), settings(workers=2))
    assert re.match(
        r"Ray could not start the training's 2 workers \(The worker group .* 2 workers\); change", str(error)
    )


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
        train_on_ray(
            tiny,
            settings(workers=2),
            tmp_path,
            layers=(1, 2),
            cache="cache",
            teacher="random:2x32",
            masks=MaskDraws(),
            utterances=[],
        )
