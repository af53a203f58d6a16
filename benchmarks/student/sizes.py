"""What students of three sizes keep of a teacher of real speech.

``python -m benchmarks.student.sizes`` distils students of about a half, a quarter and an eighth of a small HuBERT from one cache of
2.4 hours of real speech, then trains probes until they stop improving: the phone of each frame and the characters of two speakers who
are in no training set, and the speaker of an utterance among eight. Log-mel bands and the second student with random weights are the
baselines. Students that ``--folder`` already has are not trained again, and a stopped training goes on. No Ray is needed.
"""

import csv
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.result_file import REPOSITORY, RESULTS, write_result
from benchmarks.small_speech import HELD_OUT, TRAIN, shared_data, small_student, utterances
from benchmarks.student.probe_tasks import write_manifest
from benchmarks.teacher.cached_run import cached_run
from benchmarks.teacher.quality import probed
from ray_distill.pipeline.config import Config, load_config
from ray_distill.pipeline.probing.feature_source import FeatureSource
from ray_distill.pipeline.probing.task import read_task
from ray_distill.student import Student, load_student
from ray_distill.student.training.training_loop import train
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.teachers import Teacher, load_teacher

WIDTHS = {"a half": 160, "a quarter": 112, "an eighth": 72}
"""Width of the student for each part of the teacher's parameters."""
TASKS = ("phones", "characters", "speakers")


def write_corpus(path: Path, seconds: float) -> None:
    """Write the manifest of all speech to distil with; without a limit, the further hour and a half is in it."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "split"])
        for split, name in ((TRAIN, "train"), (HELD_OUT, "validation")):
            rows.writerows([u.path, name] for u in utterances(split, seconds))
        if seconds == float("inf"):
            rows.writerows([str(audio), "train"] for audio in sorted((shared_data() / "speech-more").rglob("*.flac")))


def distil(width: int, config: Config, readers: list[CacheReader], teacher: Teacher, folder: Path) -> dict[str, Any]:
    """Train a student of this width in ``folder``, and return its steps and seconds, those of earlier processes included."""
    student = small_student(teacher.num_layers, teacher.dim, width)
    folder.mkdir(exist_ok=True)
    spent = folder / "cpu_seconds.txt"
    cpu = time.process_time()
    try:
        result = train(student, config.train, readers[0], readers[1], folder)
    finally:
        with spent.open("a") as file:
            file.write(f"{time.process_time() - cpu:.1f}\n")
    return {
        "steps": result.steps,
        "cpu_seconds": sum(map(float, spent.read_text().split())),
        "last_validation_loss": result.last_validation_loss,
    }


def main(
    folder: Annotated[Path, typer.Option(help="Folder for the cache and the students; it is kept.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps of each training.")] = 800,
    only: Annotated[
        int | None,
        typer.Option(help="Train the student of this width and probe nothing: for processes side by side."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of each probe. Default: until it stops improving.", show_default=False)
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--task", help="Task to probe; may be repeated. Default: all three.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run a few steps and epochs on a few minutes of speech, to try the script.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "student/sizes/short.json",
) -> None:
    """Distil three students, and probe them, their teacher and the baselines."""
    torch.set_num_threads(1)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    seconds = 60.0 if quick else float("inf")
    steps, epochs = (3, 1) if quick else (steps, epochs)
    write_corpus(folder / "corpus.csv", seconds)
    checkpoint = str(shared_data() / "teacher" / "hubert_small.pt")
    changes = {
        "corpus.path": folder / "corpus.csv",
        "teacher.checkpoint": checkpoint,
        "cache.path": folder / "cache",
        "runs": folder,
        "name": "cache-run",
        "train.max_steps": steps,
        "train.validate_every": max(steps // 8, 1),
    }
    config = load_config(REPOSITORY / "configs" / "demo.yaml", [f"{key}={value}" for key, value in changes.items()])
    job = cached_run(config)
    teacher = job.teacher
    readers = [CacheReader(job.cache.location, split, job.layers) for split in ("train", "validation")]
    if only is not None:
        print(distil(only, config, readers, teacher, folder / f"width-{only}"))
        return
    rows = []
    sources = [FeatureSource.log_mel()]
    for part, width in WIDTHS.items():
        run = folder / f"width-{width}"
        rows.append({"part": part, "width": width} | distil(width, config, readers, teacher, run))
        student = load_student(run / "checkpoints" / "best").eval()
        rows[-1]["parameters"] = sum(p.numel() for p in student.parameters())
        rows[-1]["parameters_without_heads"] = rows[-1]["parameters"] - sum(
            p.numel() for p in student.heads.parameters()
        )
        print(rows[-1], flush=True)
        sources.append(FeatureSource.of_student(student, f"student of {part}"))
        if part == "a quarter":
            torch.manual_seed(0)
            sources.append(FeatureSource.of_student(Student(student.config).eval(), f"random weights, {part}"))
    sources.append(FeatureSource.of_teacher(load_teacher(checkpoint), "teacher"))
    found = {}
    for name in tasks or TASKS:
        write_manifest(folder / f"{name}.csv", name, 400.0 if quick else float("inf"))
        task = read_task(folder / f"{name}.csv")
        print(f"{name}: {len(task.examples)} utterances, {len(task.vocabulary)} classes or symbols", flush=True)
        found[name] = probed(task, sources, epochs)
    write_result(
        output,
        teacher=teacher.name,
        teacher_parameters=teacher.num_parameters,
        students=rows,
        epochs=epochs,
        tasks=found,
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
