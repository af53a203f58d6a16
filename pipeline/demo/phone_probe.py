"""The demo's result: how many frames have the wrong phone, read from the spectrum, the student and the teacher."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.table import Table

from ray_distill.pipeline.probing.feature_source import FeatureSource
from ray_distill.pipeline.probing.linear_probe import Outcome, run_probes
from ray_distill.pipeline.probing.probe_record import probe_folder, probe_settings, write_outcomes
from ray_distill.pipeline.probing.task import read_task
from ray_distill.pipeline.stages import Run
from ray_distill.pipeline.student_export import open_student
from ray_distill.student import Student

_EPOCHS, _SEED = 20, 0
SOURCES = _SPECTRUM, _UNTRAINED, _STUDENT, _TEACHER = (
    "log-mel bands",
    "student with random weights",
    "distilled student",
    "teacher",
)
"""What the probes see, in the order of the table."""


def probe_phones(run: Run, manifest: Path) -> list[Outcome]:
    """Train linear probes for phones on a finished run's student and teacher, and store the result for the run's report.

    Args:
        run: Run with an export.
        manifest: Phones of the corpus; see `read_task`.

    Returns:
        Outcomes of log-mel bands, of the student's architecture with random weights, of the student and of the teacher.

    Raises:
        ValueError: The manifest can't be used, or its labels don't fit the frames.
    """
    task = read_task(manifest)
    student, origin = open_student(run.folder.path)
    torch.manual_seed(_SEED)
    sources = [
        replace(FeatureSource.log_mel(), name=_SPECTRUM),
        FeatureSource.of_student(Student(student.config).eval(), _UNTRAINED),
        FeatureSource.of_student(student, _STUDENT),
        FeatureSource.of_teacher(run.teacher, _TEACHER),
    ]
    outcomes = run_probes(task, sources, epochs=_EPOCHS, seed=_SEED, on_progress=run.say)
    settings = probe_settings(manifest, "characters", _EPOCHS, _SEED)
    folder = probe_folder(run.folder.path, manifest.stem, settings)
    write_outcomes(folder, outcomes, task, manifest.stem, {_STUDENT: origin}, settings, SOURCES.index(_STUDENT))
    return outcomes


def phone_table(outcomes: Sequence[Outcome]) -> Table:
    """Return the table of `probe_phones` for the terminal."""
    table = Table(title="phone error: frames with the wrong phone")
    for column in ("the classifier sees", "phone error", "95 % interval"):
        table.add_column(column)
    for outcome in outcomes:
        table.add_row(outcome.source, f"{outcome.value:.1%}", f"{outcome.low:.1%} to {outcome.high:.1%}")
    return table


def conclusion(outcomes: Sequence[Outcome]) -> str:
    """Return what the table of `probe_phones` measures, and where the student is between the spectrum and the teacher."""
    meaning = "A linear classifier names the phone of each frame of 20 ms, for voices that no model was trained on."
    error = {outcome.source: outcome.value for outcome in outcomes}
    gap = error[_SPECTRUM] - error[_TEACHER]
    if gap <= 0:
        return f"{meaning} This teacher has no advantage over the spectrum, so a student can't gain one from it."
    share = (error[_SPECTRUM] - error[_STUDENT]) / gap
    return f"{meaning} Distillation gave the student {share:.0%} of the teacher's advantage over the spectrum."
