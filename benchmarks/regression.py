"""Compare this commit's speed and quality with the committed figures, and say what moved beyond the noise.

``python -m benchmarks.regression`` takes some minutes on one core and needs no Ray, network or other data. It exits with 1 if a
figure became worse. ``--update`` replaces the committed figures in benchmarks/results/regression.json.

A speed is the process CPU time of a piece of work, divided by that of a fixed calculation that runs before and after it. The ratio
cancels most of the load of a shared machine. Speeds of another processor are printed and not judged. The quality is the phone error
of students that are distilled as in tests/test_distillation.py.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.result_file import REPOSITORY, RESULTS, machine, write_result
from benchmarks.teacher.quality import distil
from ray_distill.pipeline.config import load_config
from ray_distill.pipeline.demo.demo_corpus import make_demo_corpus
from ray_distill.pipeline.probing.feature_source import FeatureSource
from ray_distill.pipeline.probing.linear_probe import run_probes
from ray_distill.pipeline.probing.task import PHONES_FILE, read_task
from ray_distill.student import Student
from ray_distill.student.objectives.layer_prediction import LayerDistiller
from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.masks import MaskPolicy, draw_mask
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.teachers import load_teacher

_MINUTES = 4.0
_TRAINING = ["train.batch_seconds=5", "train.max_steps=600", "train.learning_rate=8e-3", "train.validate_every=300"]
"""A training of a minute, as in tests/test_distillation.py."""
_LEAST_CHANGE = 0.05
"""Relative change of a speed below which nothing is said."""


@dataclass(frozen=True)
class Figure:
    """A measured figure, where less is better.

    Attributes:
        value: Median of the rounds, or mean of the students.
        noise: By how much repetitions of the measurement differ, in the unit of the value.
    """

    value: float
    noise: float


def calibration() -> None:
    """Compute what stands for the machine's speed: products of matrices, and a loop in the interpreter."""
    x = torch.full((192, 192), 1e-3)
    for _ in range(150):
        x = (x @ x).clamp(max=1)
    sum(n * n for n in range(200_000))


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of a call in this process."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def speeds(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, Figure]:
    """Return the CPU time of each piece of work in units of `calibration`, with the spread of the middle half as noise."""
    ratios: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()  # Allocates and compiles what later calls reuse.
    for _ in range(rounds):
        before = cpu_seconds(calibration)
        for name, work in works.items():
            took = cpu_seconds(work)
            after = cpu_seconds(calibration)
            ratios[name].append(2 * took / (before + after))
            before = after
    found = {}
    for name, values in ratios.items():
        low, _, high = statistics.quantiles(values, n=4)
        found[name] = Figure(statistics.median(values), high - low)
    return found


def workloads(corpus: Path, cache: Path, student: Student, teacher_name: str) -> dict[str, Callable[[], object]]:
    """Return the pieces of work by name. Each takes a tenth of a second or more."""
    policy = MaskPolicy(selection="uniform", mask_prob=0.4, mask_length=10, no_overlap=True, min_space=1)
    files = sorted(corpus.rglob("*.flac"))[:60]
    waveforms = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 8 * 16_000)).astype(np.float32)) * 0.1
    teacher = load_teacher(teacher_name)
    reader = CacheReader(str(cache), "train", threads=1)
    rows = list(range(min(24, len(reader))))
    batch = reader.read(rows[:8], draw=0)
    distiller = LayerDistiller(student)

    def step() -> None:
        distiller.zero_grad()
        distiller(batch.waveforms, batch.lengths, batch.frame_mask, batch.targets).total.backward()

    def features() -> None:
        with torch.inference_mode():
            student(waveforms)

    return {
        "draw masks": lambda: [draw_mask(policy, 0, 0, str(n), 600) for n in range(500)],
        "decode audio files": lambda: [load_audio(path) for path in files],
        "teacher": lambda: teacher.hidden_states(waveforms),
        "read and decode targets": lambda: reader.read(rows, draw=0).targets,
        "training step": step,
        "student's features": features,
    }


def quality(students: list[Student], corpus: Path, teacher_name: str) -> dict[str, Figure]:
    """Return phone errors, with half of the confidence interval as noise; for students the mean of all, and their spread if larger."""
    sources = [
        FeatureSource.log_mel(),
        *(FeatureSource.of_student(student, f"student {n}") for n, student in enumerate(students)),
        FeatureSource.of_teacher(load_teacher(teacher_name), "teacher"),
    ]
    outcomes = run_probes(read_task(corpus / PHONES_FILE), sources, epochs=20, on_progress=lambda line: None)
    halves = [(outcome.high - outcome.low) / 2 for outcome in outcomes]
    errors = [outcome.value for outcome in outcomes[1:-1]]
    return {
        "phone error, log-mel bands": Figure(outcomes[0].value, halves[0]),
        "phone error, student": Figure(statistics.mean(errors), max(*halves[1:-1], max(errors) - min(errors))),
        "phone error, teacher": Figure(outcomes[-1].value, halves[-1]),
    }


def verdict(old: Figure, new: Figure, least: float) -> str:
    """Return ``better``, ``worse`` or an empty text for a change within the noise, or below ``least``."""
    change = new.value - old.value
    if abs(change) <= max(old.noise + new.noise, least):
        return ""
    return "worse" if change > 0 else "better"


def comparison(
    old: dict[str, Any], new: dict[str, dict[str, Figure]], same_processor: bool
) -> list[tuple[str, str, str, str, str]]:
    """Return a row for each figure: name, old and new value, change, and verdict."""
    rows = []
    for kind, figures in new.items():
        for name, figure in figures.items():
            known = old.get(kind, {}).get(name)
            if known is None:
                rows.append((name, "none", f"{figure.value:.3f}", "", "new"))
                continue
            before = Figure(**known)
            said = verdict(before, figure, _LEAST_CHANGE * before.value if kind == "speed" else 0.0)
            if kind == "speed" and not same_processor:
                said = "other processor"
            change = f"{figure.value / before.value - 1:+.1%}"
            rows.append((name, f"{before.value:.3f}", f"{figure.value:.3f}", change, said))
    return rows


def main(
    rounds: Annotated[int, typer.Option(help="Number of rounds of the speeds.")] = 9,
    seeds: Annotated[int, typer.Option(help="Number of students of the quality.")] = 3,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run a few steps and minutes, only to try the script.")
    ] = False,
    update: Annotated[bool, typer.Option("--update", help="Replace the committed figures.")] = False,
    results: Annotated[Path, typer.Option(help="File with the committed figures (JSON).")] = RESULTS
    / "regression.json",
) -> None:
    """Measure speed and quality, and compare them with the committed figures."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus = make_demo_corpus(folder / "corpus", 1.0 if quick else _MINUTES)
        paths = [f"corpus.path={corpus}", f"cache.path={folder / 'cache'}", f"runs={folder / 'runs'}"]
        config = load_config(
            REPOSITORY / "configs" / "demo.yaml", [*paths, *_TRAINING, *(["train.max_steps=3"] if quick else [])]
        )
        teacher_name = config.teacher.checkpoint
        students = distil(config, folder, seeds)
        new = {
            "speed": speeds(workloads(corpus, folder / "cache", students[0], teacher_name), 3 if quick else rounds),
            "quality": quality(students, corpus, teacher_name),
        }
    old = json.loads(results.read_text()) if results.is_file() else {}
    rows = comparison(old, new, old.get("machine", {}).get("cpu") == machine()["cpu"])
    for name, *cells, said in rows:
        print(f"{name:28s}" + "".join(f"{cell:>10s}" for cell in cells) + f"  {said}")
    if update:
        write_result(
            results, **{kind: {name: asdict(figure) for name, figure in found.items()} for kind, found in new.items()}
        )
    elif any(row[-1] == "worse" for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
