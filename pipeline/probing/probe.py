"""``run.py probe MANIFEST --teacher T --student S``: linear probes on frozen features, compared side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ray_distill.pipeline.files import check_room
from ray_distill.pipeline.probing.feature_source import FeatureSource
from ray_distill.pipeline.probing.linear_probe import run_probes
from ray_distill.pipeline.probing.probe_record import probe_folder, probe_settings, refuse_other_results, write_outcomes
from ray_distill.pipeline.probing.task import Units, read_task
from ray_distill.pipeline.reports.probe_page import outcome_table
from ray_distill.pipeline.student_export import open_student
from ray_distill.teacher_cache.teachers import load_teacher


def _check_device(device: str) -> None:
    """ValueError where PyTorch can't use it."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # What PyTorch raises: of a missing GPU, in builds without CUDA.
        raise ValueError(f"--device {device} can't be used here ({str(error).splitlines()[0]})") from error


def _names(places: Sequence[Path], origins: Sequence[dict[str, Any]]) -> list[str]:
    """A name for each student: its run's or its folder's, with its path where two have one name."""
    names = [f"student {origin.get('run') or path.name}" for path, origin in zip(places, origins, strict=True)]
    return [name if names.count(name) == 1 else f"{name} ({path})" for name, path in zip(names, places, strict=True)]


def command(
    manifest: Annotated[
        Path, typer.Argument(help="CSV with columns path and label, or path and transcript; split if any.")
    ],
    student: Annotated[
        list[Path] | None, typer.Option(help="A run's folder or an exported student; may be repeated.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="As in configurations: a checkpoint, torchaudio:NAME, ...")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="A run's folder: probes its student and keeps the result there, for the run's report."),
    ] = None,
    log_mel: Annotated[bool, typer.Option(help="Also probe log-mel bands.")] = True,
    units: Annotated[
        str, typer.Option(help="Of transcripts: characters, or words (what blanks separate, as phones).")
    ] = "characters",
    epochs: Annotated[int, typer.Option(help="Passes over the training utterances.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Of the probes.")] = 0,
    device: Annotated[str, typer.Option(help="Of teacher and students: cpu, cuda.")] = "cpu",
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for probe.json and probe.html; default probe, or a folder of its own in RUN/probes."),
    ] = None,
) -> None:
    """Fit linear probes on frozen features of teacher, students and log-mel bands, and compare what they tell."""
    console = Console()
    try:
        if units not in ("characters", "words"):
            raise ValueError(f"--units must be characters or words, not {units!r}")
        chosen: Units = "characters" if units == "characters" else "words"
        _check_device(device)
        task = read_task(manifest, chosen)
        settings = probe_settings(manifest, chosen, epochs, seed)
        folder = output or (probe_folder(run, manifest.stem, settings) if run else Path("probe"))
        check_room(folder)
        places = [*(student or []), *([run] if run else [])]
        if len(set(places)) < len(places):
            raise ValueError("a student is given twice; one with itself can't be compared")
        sources = []
        if teacher is not None:
            sources.append(FeatureSource.of_teacher(load_teacher(teacher, device)))
        opened = [open_student(place) for place in places]
        names = _names(places, [origin for _, origin in opened])
        origins = {name: origin for name, (_, origin) in zip(names, opened, strict=True)}
        for name, (loaded, _) in zip(names, opened, strict=True):
            sources.append(FeatureSource.of_student(loaded.to(device), name))
        own = len(sources) - 1 if run else None
        if log_mel:
            sources.append(FeatureSource.log_mel())
        if not sources:
            raise ValueError("there is nothing to probe; give --teacher, --student or --run")
        if output or not run:
            refuse_other_results(folder, settings, sources)
        outcomes = run_probes(
            task,
            sources,
            epochs=epochs,
            seed=seed,
            on_progress=lambda text: console.print(text, highlight=False, soft_wrap=True),
        )
        console.print(outcome_table(outcomes))
        write_outcomes(folder, outcomes, task, manifest.stem, origins, settings, own)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    console.print(f"probe   {folder / 'probe.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app()
