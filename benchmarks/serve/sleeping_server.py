"""The service with a model that only waits, for `benchmarks.serve.overload` on machines whose cores other work needs too."""

import time
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ray_distill.serve import create_app
from ray_distill.serve.server import Server
from ray_distill.student import Student
from tests.tiny import tiny_student

SPEED = 20.0
"""Seconds of very short audio per second."""


def seconds(rows: int, longest: float) -> float:
    """Return the time of a batch: each second of audio costs twice as much at 60 s, as attention makes it."""
    return rows * longest * (1 + longest / 60) / SPEED


class Sleeper(Student):
    """A tiny student that takes the time of `seconds`."""

    def layer_outputs(
        self, waveforms: Tensor, *given: Any, **options: Any
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Wait, then return the tiny student's outputs."""
        due = time.monotonic() + seconds(len(waveforms), waveforms.shape[1] / 16_000)
        outputs = super().layer_outputs(waveforms, *given, **options)
        time.sleep(max(0.0, due - time.monotonic()))
        return outputs


def main(
    port: Annotated[int, typer.Option()], deadline_seconds: Annotated[float, typer.Option("--deadline-seconds")]
) -> None:
    """Serve the sleeping model."""
    torch.manual_seed(0)
    app = create_app(Sleeper(tiny_student()).eval(), deadline_seconds=deadline_seconds)
    Server(app, "127.0.0.1", port).run()


if __name__ == "__main__":
    typer.run(main)
