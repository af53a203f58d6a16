"""``ray-distill probe``: linear probes on frozen features."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def probe(
    manifest: Annotated[
        Path,
        typer.Argument(
            help="CSV file with the columns path and one of label, transcript and frame_labels, and optionally split; or, with "
            "--task, the folder of a run."
        ),
    ],
    student: Annotated[
        list[Path] | None, typer.Option(help="Folder of a run or of an exported student; may be repeated.")
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(help="Teacher, as in configurations: a checkpoint, OWNER/NAME on the hub, ...; may be repeated."),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Folder of a run: probes its student and stores the result there, for the run's report."),
    ] = None,
    task: Annotated[
        Literal["characters", "speakers"] | None,
        typer.Option(
            help="What to probe, with the labels of the corpus of a run. The run's student is probed, as with --run."
        ),
    ] = None,
    hours: Annotated[
        float | None,
        typer.Option(help="Maximum hours of audio with --task. Default: 2.", min=0.001, show_default=False),
    ] = None,
    log_mel: Annotated[bool, typer.Option(help="Also probe log-mel bands.")] = True,
    units: Annotated[
        Literal["characters", "words"],
        typer.Option(help="Units of transcripts: characters, or words separated by spaces (also for phones)."),
    ] = "characters",
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Number of passes over the training utterances. Default: until a probe stops improving on a tenth of them, which is "
            "held out.",
            min=1,
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the probes.")] = 0,
    device: Annotated[str, typer.Option(help="Device of the teacher and the students: cpu, cuda.")] = "cpu",
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for probe.json and probe.html. Default: ./probe, or a new folder in RUN/probes."),
    ] = None,
) -> None:
    """Compare features of teacher and students by linear probes.

    The features stay frozen. Log-mel bands are the baseline.
    """
    from rich.console import Console

    from ray_distill.gpu import set_up_gpu
    from ray_distill.pipeline.files import check_room
    from ray_distill.pipeline.probing.corpus_task import read_corpus_task
    from ray_distill.pipeline.probing.feature_source import FeatureSource
    from ray_distill.pipeline.probing.linear_probe import run_probes
    from ray_distill.pipeline.probing.probe_record import (
        probe_folder,
        probe_settings,
        refuse_other_results,
        settings_of,
        write_outcomes,
    )
    from ray_distill.pipeline.probing.task import read_task
    from ray_distill.pipeline.reports.probe_page import outcome_table
    from ray_distill.pipeline.student_export import open_student
    from ray_distill.teacher_cache.device import check_device
    from ray_distill.teacher_cache.teachers import load_teacher

    console = Console(soft_wrap=True, highlight=False)
    check_device(device)
    set_up_gpu(device)
    if manifest.is_dir() != (task is not None):
        raise ValueError(
            f"{manifest} is {'a folder' if task is None else 'no folder'}; give a CSV manifest, or the folder of a run and --task "
            "characters or speakers"
        )
    if (task is None and hours is not None) or (task is not None and units != "characters"):
        raise ValueError("--hours is for --task and --units is for a CSV manifest; remove one of them")
    if task is None:
        labelled, settings, title = (
            read_task(manifest, units),
            probe_settings(manifest, units, epochs, seed),
            manifest.stem,
        )
    else:
        labelled, digest = read_corpus_task(manifest, task, hours or 2.0)
        settings, title, run = settings_of(digest, "characters", epochs, seed), task, run or manifest
    folder = output or (probe_folder(run, title, settings) if run else Path("probe"))
    check_room(folder)
    places = [*(student or []), *([run] if run else [])]
    if len(set(places)) < len(places):
        raise ValueError("the same student is given twice; give each --student and --run once")
    teachers = teacher or []
    if len(set(teachers)) < len(teachers):
        raise ValueError("the same teacher is given twice; give each --teacher once")
    sources = [FeatureSource.of_teacher(load_teacher(name, device)) for name in teachers]
    opened = [open_student(place) for place in places]
    names = student_names(places, [origin for _, origin in opened])
    origins = {name: origin for name, (_, origin) in zip(names, opened, strict=True)}
    for name, (loaded, _) in zip(names, opened, strict=True):
        sources.append(FeatureSource.of_student(loaded.to(device), name))
    run_student = len(sources) - 1 if run else None
    if log_mel:
        sources.append(FeatureSource.log_mel())
    if not sources:
        raise ValueError("nothing to probe; give --teacher, --student or --run")
    refuse_other_results(folder, settings, sources)
    outcomes = run_probes(labelled, sources, epochs=epochs, seed=seed, on_progress=console.print)
    Console().print(outcome_table(outcomes))
    write_outcomes(folder, outcomes, labelled, title, origins, settings, run_student)
    console.print(f"probe   {folder / 'probe.html'}")


def student_names(places: Sequence[Path], origins: Sequence[Any]) -> list[str]:
    """Return a name for each student: that of its run or folder, with the path where two names are equal."""
    names = [f"student {origin.get('run') or path.name}" for path, origin in zip(places, origins, strict=True)]
    return [name if names.count(name) == 1 else f"{name} ({path})" for name, path in zip(names, places, strict=True)]
