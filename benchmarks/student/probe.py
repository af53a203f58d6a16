"""Run linear probes on the teacher, the student and log-mel bands, on real speech.

``python -m benchmarks.student.probe MODEL`` probes phones (from forced alignments) and characters of two speakers who are not in the
training set, and the speaker of an utterance among eight. A student of the same shape with random weights serves as a baseline.
"""

import csv
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.result_file import RESULTS, write_result
from benchmarks.small_speech import HELD_OUT, TRAIN, shared_data, utterances
from ray_distill.pipeline.probing.feature_source import FeatureSource
from ray_distill.pipeline.probing.linear_probe import run_probes
from ray_distill.pipeline.probing.task import read_task
from ray_distill.pipeline.student_export import open_student
from ray_distill.student import Student
from ray_distill.teacher_cache.teachers import load_teacher

TASKS = ("phones", "characters", "speakers")


def phones() -> dict[str, str]:
    """Return the phones of each utterance without silence and noise."""
    found = {}
    for line in (shared_data() / "speech" / "phones.tsv").read_text().splitlines()[1:]:
        name, *segments = line.split()
        names = (segment.split(":")[0] for segment in segments)
        found[name] = " ".join(phone for phone in names if phone != "SIL" and not phone.startswith("+"))
    return found


def transcripts() -> dict[str, str]:
    """Return the words of each utterance."""
    lines = (
        line
        for path in (shared_data() / "speech" / "LibriSpeech").rglob("*.trans.txt")
        for line in path.read_text().splitlines()
    )
    return {name: text for name, _, text in (line.partition(" ") for line in lines)}


def write_manifest(path: Path, task: str, seconds: float) -> None:
    """Write the manifest of a task, with at most ``seconds`` of audio per split."""
    texts = {"phones": phones, "characters": transcripts, "speakers": dict}[task]()
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        if task == "speakers":
            rows.writerow(["path", "label", "split"])
            seen: Counter[str] = Counter()
            for u in utterances(TRAIN, seconds):  # The held-out speakers are not in the training set.
                speaker = u.id.split("-")[0]
                seen[speaker] += 1
                rows.writerow([u.path, speaker, "train" if seen[speaker] % 4 else "test"])
            return
        rows.writerow(["path", "transcript", "split"])
        for split, name in ((TRAIN, "train"), (HELD_OUT, "test")):
            # A few utterances have no alignment.
            rows.writerows([u.path, texts[u.id], name] for u in utterances(split, seconds) if texts.get(u.id))


def main(
    model: Annotated[
        Path, typer.Argument(help="Folder of a run or of an exported student that was distilled from the teacher.")
    ],
    teacher: Annotated[str | None, typer.Option(help="Teacher. Default: the small one trained on speech.")] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of each probe.")] = 20,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run two epochs on a few minutes of speech, only to try the script.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "student/probe.json",
) -> None:
    """Probe phones, characters and speakers."""
    torch.set_num_threads(1)
    student, origin = open_student(model)
    torch.manual_seed(0)
    sources = [
        FeatureSource.of_teacher(load_teacher(teacher or str(shared_data() / "teacher" / "hubert_small.pt"))),
        FeatureSource.of_student(student, "student"),
        FeatureSource.of_student(Student(student.config).eval(), "student with random weights"),
        FeatureSource.log_mel(),
    ]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in TASKS:
            manifest = Path(folder) / f"{name}.csv"
            write_manifest(manifest, name, 400.0 if quick else float("inf"))
            task = read_task(manifest, "words" if name == "phones" else "characters")
            print(f"{name}: {len(task.examples)} utterances, {len(task.vocabulary)} classes or symbols")
            outcomes = run_probes(task, sources, epochs=2 if quick else epochs)
            found[name] = {
                "train_utterances": sum(not example.test for example in task.examples),
                "test_utterances": sum(example.test for example in task.examples),
                "outcomes": [asdict(outcome) for outcome in outcomes],
            }
    write_result(output, student=origin.get("run"), epochs=2 if quick else epochs, tasks=found)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
