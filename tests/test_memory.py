"""Running out of memory is recognised, and is one sentence that names what to lower."""

from collections.abc import Callable

import numpy as np
import pytest
import ray.exceptions
import torch
import typer
from typer.testing import CliRunner

from ray_distill.command_line import Command
from ray_distill.memory import MemoryRanOutError, memory_named, ran_out_of_memory

TOO_MUCH = 2**58
"""Number of float32 values that no machine holds."""


def error_of(function: Callable[[], object]) -> Exception:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        function()
    error: Exception = caught.value
    return error


@pytest.mark.parametrize(
    "error",
    [
        error_of(lambda: torch.empty(TOO_MUCH)),
        error_of(lambda: np.empty(TOO_MUCH, np.float32)),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory."),
        ray.exceptions.RayTaskError("f", "Traceback", MemoryError()),
    ],
    ids=lambda error: type(error).__name__,
)
def test_each_library_says_that_memory_ran_out(error: Exception) -> None:
    assert ran_out_of_memory(error)
    sentence = "^memory ran out in the index stage; lower corpus.max_seconds, or stop"
    with pytest.raises(MemoryRanOutError, match=sentence), memory_named("the index stage", "lower corpus.max_seconds"):
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("shape"), ValueError("out of memory"), ray.exceptions.ActorDiedError(), IndexError(3)]
)
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    assert not ran_out_of_memory(error)
    with pytest.raises(type(error)), memory_named("the index stage", "lower corpus.max_seconds"):
        raise error


def test_a_command_without_a_sentence_of_its_own_has_one() -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command(cls=Command)
    def work() -> None:
        torch.empty(TOO_MUCH)

    done = CliRunner().invoke(app)
    assert done.exit_code == 2 and done.output.startswith("error: memory ran out; use shorter audio")
