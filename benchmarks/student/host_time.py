"""Time that the host needs for a training step, whatever the device: Python, and the dispatch of the operators.

A GPU works through the kernels of a step while the host dispatches those of the next one, so no step is shorter than this time. It
is measured on a CPU with students of the published depth and of so few channels and frames that the arithmetic takes no time. A
GPU adds the launches of the kernels, a few microseconds each, which are not measured here. ``python -m benchmarks.student.host_time``
also says from which size of batches on a card would not wait for the host.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.result_file import REPOSITORY, RESULTS, write_result
from ray_distill.pipeline.config import load_config
from ray_distill.student import StudentConfig
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.training_loop import train
from ray_distill.teacher_cache.frames import SAMPLE_RATE, num_frames
from ray_distill.teacher_cache.targets.target_batch import Batch

RECIPES = ("armhubert-960", "armhubert-s-960", "maskhubert-960")
NARROW = {
    "conv_layers": ((4, 10, 5), *((4, 3, 2),) * 4, *((4, 2, 2),) * 2),
    "encoder_embed_dim": 12,
    "encoder_ffn_embed_dim": 12,
    "encoder_attention_heads": 2,
    "conv_pos": 4,
    "conv_pos_groups": 2,
    "target_dim": 4,
}
"""What is changed in a student. Its layers, and so its operators, stay."""
RATES = (2_000, 7_300, 20_000)
"""Seconds of audio per second that a card trains on, from the estimates in docs/in-depth/scaling.md."""


class Resident:
    """A `TargetReader` of one batch of random frames."""

    def __init__(self, seconds: float, layers: int, dim: int) -> None:
        samples = int(seconds * SAMPLE_RATE)
        generator = torch.Generator().manual_seed(0)
        self.num_samples = np.full(2, samples)
        self.num_frames = num_frames(torch.from_numpy(self.num_samples)).numpy()
        self.layers, self.dim, self.draws = tuple(range(1, layers + 1)), dim, 1
        frames = int(self.num_frames[0])
        self._waveforms = 0.1 * torch.randn(2, samples, generator=generator)
        self._targets = torch.randn(2, layers, frames, dim, generator=generator)
        self._mask = torch.rand(2, frames, generator=generator) < 0.5

    def read(self, indices: Sequence[int], draw: int | None) -> Batch:
        """See `TargetReader.read`."""
        lengths, frames = torch.from_numpy(self.num_samples[indices]), torch.from_numpy(self.num_frames[indices])
        mask = None if draw is None else self._mask[indices]
        return Batch(["a"] * len(indices), self._waveforms[indices], lengths, frames, self._targets[indices], mask)


def main(
    steps: Annotated[int, typer.Option(help="Steps of a training, of which the second half counts.")] = 200,
    rounds: Annotated[int, typer.Option(help="Trainings of each way, in turns.")] = 3,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "student/host_time.json",
) -> None:
    """Measure steps of each student, as it is and compiled."""
    torch.set_num_threads(1)
    times: dict[tuple[str, bool], list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(rounds):
            for recipe in RECIPES:
                for compiled in (False, True):
                    folder = Path(temporary) / f"{recipe}-{compiled}-{number}"
                    times.setdefault((recipe, compiled), []).append(_seconds_per_step(recipe, compiled, steps, folder))
    rows = []
    for (recipe, compiled), found in times.items():
        seconds = statistics.median(found)
        row: dict[str, Any] = {
            "student": recipe,
            "way": "compiled" if compiled else "plain",
            "host_seconds_per_step": seconds,
        }
        row |= {"lowest": min(found), "highest": max(found)}
        row["batch_seconds_that_hide_it"] = {str(rate): math.ceil(rate * seconds) for rate in RATES}
        rows.append(row)
        print(row, flush=True)
    write_result(output, steps=steps, rounds=rounds, rows=rows)


def _seconds_per_step(recipe: str, compiled: bool, steps: int, folder: Path) -> float:
    """Return the median of the process's CPU seconds from one optimiser step to the next, in the second half of a training."""
    config = load_config(REPOSITORY / f"configs/{recipe}.yaml").resolve_student(12, 4)
    narrow = StudentConfig.model_validate(config.model_dump() | NARROW)
    reader = Resident(0.1, 12, 4)
    settings = TrainSettings.model_validate(
        {"epochs": 10**6, "max_steps": steps, "batch_size": 2, "validate_every": 10**6, "log_every": 10**6}
        | {"use_gpu": False, "compile": compiled}
    )
    times: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *call: times.append(time.process_time()))
    try:
        train(narrow, settings, reader, reader, folder)
    finally:
        hook.remove()
    return statistics.median(np.diff(times[steps // 2 :]).tolist())


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
