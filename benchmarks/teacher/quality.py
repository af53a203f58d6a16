"""Phone errors of the demo's teacher and of students that are distilled from it as in the demo.

``python -m benchmarks.teacher.quality`` measures both on the demo's corpus, whose validation voices no model was trained on. With real
speech (see `benchmarks.small_speech`), it measures the teacher there too. No Ray is needed.
"""

import csv
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.result_file import REPOSITORY, RESULTS, write_result
from benchmarks.small_speech import HELD_OUT, TRAIN, shared_data, utterances
from benchmarks.teacher.cached_run import cached_run
from ray_distill.pipeline.config import Config, load_config
from ray_distill.pipeline.demo.demo_corpus import make_demo_corpus
from ray_distill.pipeline.probing.feature_source import FeatureSource
from ray_distill.pipeline.probing.linear_probe import run_probes
from ray_distill.pipeline.probing.task import NO_LABEL, PHONES_FILE, Task, read_task
from ray_distill.student import Student, load_student
from ray_distill.student.training.training_loop import train
from ray_distill.teacher_cache.frames import FRAME_SAMPLES, RECEPTIVE_FIELD, SAMPLE_RATE, num_frames
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.teachers import Teacher, load_teacher


def real_phones() -> dict[str, list[tuple[str, int, int]]]:
    """Return the phones of each utterance of real speech: name, first sample and number of samples."""
    found = {}
    unit = SAMPLE_RATE // 100
    for line in (shared_data() / "speech" / "phones.tsv").read_text().splitlines()[1:]:
        name, *segments = line.split()
        parts = [segment.rsplit(":", 2) for segment in segments]
        found[name] = [(phone, int(start) * unit, int(length) * unit) for phone, start, length in parts]
    return found


def write_real_manifest(path: Path, seconds: float) -> None:
    """Write the phone of each frame of real speech; frames of noise and beyond the alignment have none."""
    phones = real_phones()
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "frame_labels", "split"])
        for split, name in ((TRAIN, "train"), (HELD_OUT, "test")):
            for utterance in utterances(split, seconds):
                if utterance.id not in phones:
                    continue  # A few utterances have no alignment.
                labels = np.full(num_frames(utterance.num_samples), NO_LABEL, dtype=object)
                centres = np.arange(len(labels)) * FRAME_SAMPLES + RECEPTIVE_FIELD // 2
                for phone, start, length in phones[utterance.id]:
                    if not phone.startswith("+"):
                        labels[(centres >= start) & (centres < start + length)] = phone
                rows.writerow([utterance.path, " ".join(labels), name])


def probed(task: Task, sources: Sequence[FeatureSource], epochs: int | None) -> dict[str, Any]:
    """Return the size of a task and the outcomes of its probes."""
    test = sum(example.test for example in task.examples)
    return {
        "train_utterances": len(task.examples) - test,
        "test_utterances": test,
        "phones": len(task.vocabulary),
        "outcomes": [asdict(outcome) for outcome in run_probes(task, sources, epochs=epochs)],
    }


def one_layer(teacher: Teacher, layer: int) -> FeatureSource:
    """Return one layer of a teacher."""
    return FeatureSource(
        f"layer {layer}",
        1,
        teacher.dim,
        lambda wave: teacher.hidden_states(torch.from_numpy(wave)[None], layers=[layer])[0],
    )


def distil(config: Config, folder: Path, seeds: int) -> list[Student]:
    """Return students of the configuration's teacher, one for each seed, trained on one rank from one cache."""
    job = cached_run(config)
    teacher = job.teacher
    readers = [CacheReader(job.cache.location, split, job.layers) for split in ("train", "validation")]
    # As many frames per step as the workers of the demo have together.
    settings = config.train.model_copy(update={"workers": 1, "accumulate": config.train.workers})
    students = []
    for seed in range(seeds):
        run = folder / f"seed-{seed}"
        settings = settings.model_copy(update={"seed": seed})
        architecture = config.resolve_student(len(job.layers), teacher.dim)
        result = train(architecture, settings, readers[0], readers[1], run)
        print(
            f"seed {seed}: {result.steps} steps, {result.seconds:.0f} s, validation loss {result.last_validation_loss:.3f}"
        )
        students.append(load_student(run / "checkpoints" / "best").eval())
    return students


def main(
    seeds: Annotated[int, typer.Option(help="Number of students.")] = 3,
    epochs: Annotated[int, typer.Option(help="Epochs of each probe.")] = 20,
    real_minutes: Annotated[float, typer.Option(help="Maximum number of minutes of real speech per split.")] = 60.0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run a few steps and minutes, only to try the script.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "teacher/quality.json",
) -> None:
    """Probe log-mel bands, untrained models, the teacher and its students for the phone of each frame."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus = make_demo_corpus(folder / "corpus", 1.0) if quick else make_demo_corpus(folder / "corpus")
        paths = [f"corpus.path={corpus}", f"cache.path={folder / 'cache'}", f"runs={folder / 'runs'}"]
        steps = ["train.max_steps=3"] if quick else []
        config = load_config(REPOSITORY / "configs" / "demo.yaml", [*paths, *steps])
        teacher = load_teacher(config.teacher.checkpoint)
        students = distil(config, folder, seeds)
        torch.manual_seed(0)
        untrained = Student(students[0].config).eval()
        sources = [
            FeatureSource.log_mel(),
            FeatureSource.of_student(untrained, "student, random weights"),
            *(FeatureSource.of_student(student, f"student, seed {seed}") for seed, student in enumerate(students)),
            FeatureSource.of_teacher(teacher, "teacher"),
        ]
        layers = [one_layer(teacher, layer) for layer in range(1, teacher.num_layers + 1)]
        found = {"synthetic": probed(read_task(corpus / PHONES_FILE), [*sources, *layers], 1 if quick else epochs)}
        write_real_manifest(folder / "real.csv", 30.0 if quick else 60 * real_minutes)
        on_real = [sources[0], sources[1], replace(sources[2], name="student, seed 0"), sources[-1], *layers]
        found["real"] = probed(read_task(folder / "real.csv"), on_real, 1 if quick else epochs)
    write_result(
        output,
        teacher=teacher.name,
        teacher_parameters=teacher.num_parameters,
        student_parameters=sum(p.numel() for p in students[0].parameters()),
        steps=config.train.max_steps,
        epochs=epochs,
        tasks=found,
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
