"""What students learn from one and from two trained teachers of real speech, by layers, units and codebooks, at equal steps.

``python -m benchmarks.student.two_teachers measure --folder FOLDER --whisper FOLDER`` caches layers of a small HuBERT and of
Whisper-small's encoder for the same speech, derives units and codebooks from these caches without the teachers, and trains a
student of the same encoder for each objective, set of teachers and seed. Probes then read phones, characters and speakers. The
teachers have no common mask embedding, so all targets are clean; units and codebooks are predicted at all frames under fresh
masks. Caches, students and outcomes that ``--folder`` already has are not made again, and ``--share`` divides the work among
processes. ``plot`` draws bytes against errors. No Ray is needed.
"""

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console

from benchmarks.result_file import REPOSITORY, RESULTS, write_result
from benchmarks.small_speech import shared_data, small_student, whisper_folder
from benchmarks.student.probe_tasks import write_manifest
from benchmarks.student.sizes import write_corpus
from benchmarks.teacher.cached_run import cached_run
from benchmarks.teacher.quality import probed
from ray_distill.pipeline.config import Config, load_config
from ray_distill.pipeline.probing.feature_source import FeatureSource
from ray_distill.pipeline.probing.task import read_task
from ray_distill.pipeline.stages import Run
from ray_distill.pipeline.stages.run import TeacherRun
from ray_distill.student import Student, load_student
from ray_distill.student.training.target_source import TeacherCache, several_readers
from ray_distill.student.training.training_loop import train
from ray_distill.teacher_cache.maintenance.derive import derive_cache
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.teachers import load_teacher

LAYERS = {"hubert": [1, 2, 3, 4, 5, 6], "whisper": [2, 4, 6, 8, 10, 12]}
"""Layers of each teacher that the six layers of a student predict."""
SYMBOL_LAYER = {"hubert": 5, "whisper": 10}
"""Layer of each teacher that units and codebooks are derived from."""
CODECS = {"layers": "pca", "units": "units:100", "mvq": "mvq:4"}
"""Codec of the caches of each objective."""
TEACHERS = (("hubert",), ("whisper",), ("hubert", "whisper"))
WIDTH = 112


def configuration(
    folder: Path, checkpoints: dict[str, str], objective: str, names: tuple[str, ...], steps: int
) -> Config:
    """Return the configuration of a training: the demo's with these teachers, this objective and a larger student."""
    discrete = objective != "layers"
    teachers = []
    for name in names:
        entry = {
            "name": name,
            "checkpoint": checkpoints[name],
            "layers": [SYMBOL_LAYER[name]] if discrete else LAYERS[name],
            "cache": {"path": str(folder / f"{name}-{objective}"), "codec": CODECS[objective]},
        }
        teachers.append(entry | ({"objective": {"objective": objective, "unmasked_weight": 1.0}} if discrete else {}))
    student = small_student(6, 1, WIDTH).model_dump(mode="json", exclude={"target_dim"})
    settings: dict[str, Any] = {"max_steps": steps, "validate_every": max(steps // 4, 1)}
    if discrete:
        student |= {"heads": "none", "layer_grad_scale": False}
        settings |= {"masks": "fresh", "hint_weight": 0.1}  # The default, since the key of the demo does nothing here.
    elif len(names) > 1:
        settings["balance"] = "variance"
    tree = {
        "base": str(REPOSITORY / "configs" / "demo.yaml"),
        "corpus": {"path": str(folder / "corpus.csv")},
        "runs": str(folder / "runs"),
        "teachers": teachers,
        "masks": {"draws": 0},
        "train": settings,
        "student": student,
    }
    path = folder / f"{objective}-{'-'.join(names)}.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return load_config(path)


def make_caches(folder: Path, checkpoints: dict[str, str]) -> None:
    """Build the caches of layers, and derive those of units and codebooks."""
    for name in LAYERS:
        config = configuration(folder, checkpoints, "layers", (name,), 1)
        job = cached_run(config.of_teacher(config.teachers[0]))
        for objective, codec in CODECS.items():
            place = folder / f"{name}-{objective}"
            if objective != "layers" and not Cache.exists(Store(place)):
                derive_cache(job.cache.location, place, codec, [SYMBOL_LAYER[name]])


def distil(folder: Path, config: Config, seed: int) -> dict[str, Any]:
    """Train a student in ``folder``, unless it is there, and return its record."""
    record = folder / "record.json"
    if record.is_file():
        found: dict[str, Any] = json.loads(record.read_text())
        return found
    run = Run(config, Console(quiet=True))
    settings = run.settings().model_copy(update={"seed": seed})
    caches = [
        TeacherCache(part.name, part.cache.location, part.layers, part.config.cache.targets)
        for part in run.parts
        if isinstance(part, TeacherRun)
    ]
    fresh = settings.masks == "fresh"
    reader, validation, source = several_readers(caches, run.config.masks, fresh=fresh)
    architecture = run.config.resolve_student(len(run.layers), run.teacher.dim, run.teacher.patches)
    cpu = time.process_time()
    result = train(architecture, settings, reader, validation, folder, source=source)
    codecs = [codec for cache in caches for codec in Cache.open(cache.cache).codecs(0)]
    found = {
        "steps": result.steps,
        "cpu_seconds": time.process_time() - cpu,
        "target_bytes_per_second": 50 * sum(codec.bytes_per_frame for codec in codecs),
        "bytes_read": getattr(reader, "bytes_read", None),
    }
    record.write_text(json.dumps(found))
    return found


def trainings(seeds: int) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Yield the objective, teachers and seed of each training; all of a seed come before the next seed."""
    for seed in range(seeds):
        for objective in CODECS:
            for names in TEACHERS:
                yield objective, names, seed


def probe(folder: Path, task: str, source: FeatureSource, minutes: float, epochs: int | None) -> dict[str, Any]:
    """Probe one source for a task, unless its outcome is in ``folder``, and return the outcome."""
    record = folder / f"probe-{task}-{source.name.replace(' ', '-')}.json"
    if not record.is_file():
        manifest = folder / f"{task}.csv"
        if not manifest.is_file():
            write_manifest(manifest, task, 60 * minutes)
        found = probed(read_task(manifest), [source], epochs)
        record.write_text(json.dumps({key: found[key] for key in found if key != "outcomes"} | found["outcomes"][0]))
    outcome: dict[str, Any] = json.loads(record.read_text())
    print(task, {key: outcome[key] for key in ("source", "value", "low", "high")}, flush=True)
    return outcome


def main(
    folder: Annotated[Path, typer.Option(help="Folder for caches, students and outcomes of probes; it is kept.")],
    whisper: Annotated[str, typer.Option(help="Folder of Whisper-small.")] = "",
    minutes: Annotated[float, typer.Option(help="Minutes of speech to distil with.")] = 45.0,
    steps: Annotated[int, typer.Option(help="Optimiser steps of each training.")] = 400,
    seeds: Annotated[int, typer.Option(help="Students of each objective and set of teachers.")] = 3,
    share: Annotated[
        str | None,
        typer.Option(help="I/N: only train and probe every N-th student from the I-th (from 0) on; write no result."),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--task", help="Task to probe; may be repeated. Default: all three.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of each probe. Default: until it stops improving.", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "student/two_teachers.json",
) -> None:
    """Cache, distil and probe."""
    torch.set_num_threads(1)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "corpus.csv").is_file():
        write_corpus(folder / "corpus.csv", 60 * minutes)
    checkpoints = {
        "hubert": str(shared_data() / "teacher" / "hubert_small.pt"),
        # As the documentation of teachers says: a few frames of Whisper's layers are a thousand times as large as the others.
        "whisper": f"layer-norm:{whisper_folder(whisper).resolve()}",
    }
    make_caches(folder, checkpoints)
    part, parts = map(int, (share or "0/1").split("/"))
    rows, sources, student = [], [], None
    for number, (objective, names, seed) in enumerate(trainings(seeds)):
        if number % parts != part:
            continue
        place = folder / f"{objective}-{'-'.join(names)}-{seed}"
        config = configuration(folder, checkpoints, objective, names, steps)
        row = {"objective": objective, "teachers": names, "seed": seed} | distil(place, config, seed)
        print(row, flush=True)
        rows.append(row)
        student = load_student(place / "checkpoints" / "best").eval()
        sources.append(FeatureSource.of_student(student, place.name))
    assert student is not None
    if part == 0:
        torch.manual_seed(0)
        sources.append(FeatureSource.log_mel())
        sources.append(FeatureSource.of_student(Student(student.config).eval(), "random weights"))
        for name, checkpoint in checkpoints.items():
            plain = load_teacher(checkpoint.removeprefix("layer-norm:"))
            sources.append(FeatureSource.of_teacher(plain, f"teacher {name}"))
    found = {
        task: [probe(folder, task, source, minutes, epochs) for source in sources]
        for task in tasks or ("phones", "speakers", "characters")
    }
    if share is not None:
        return
    write_result(
        output,
        layers=LAYERS,
        symbol_layers=SYMBOL_LAYER,
        codecs=CODECS,
        minutes=minutes,
        epochs=epochs,
        student_parameters=sum(p.numel() for p in student.parameters())
        - sum(p.numel() for p in student.heads.parameters()),
        rows=rows,
        tasks=found,
    )


def plot(
    result: Annotated[Path, typer.Option()] = RESULTS / "student/two_teachers.json",
    output: Annotated[Path, typer.Option()] = REPOSITORY / "docs" / "pictures" / "two-teachers.svg",
) -> None:
    """Plot bytes of targets per second against the error of each probe, and print the table as Markdown."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "two-teachers", "font.size": 9}
    from matplotlib import pyplot

    record = json.loads(result.read_text())
    seeds = sorted({row["seed"] for row in record["rows"]})
    errors = {task: {row["source"]: row["value"] for row in outcomes} for task, outcomes in record["tasks"].items()}
    metrics = {task: outcomes[0]["metric"] for task, outcomes in record["tasks"].items()}
    figure, axes = pyplot.subplots(1, len(errors), figsize=(4 * len(errors), 3.8), squeeze=False)
    markers, colours = (
        dict(zip(CODECS, "osD", strict=True)),
        {"hubert": "C0", "whisper": "C1", "hubert + whisper": "C2"},
    )
    lines = [
        "| targets | teachers | bytes/s | " + " | ".join(f"{task}, {metrics[task]}" for task in errors) + " |",
        "|---|---|---" + "|---" * len(errors) + "|",
    ]
    for objective in CODECS:
        for names in TEACHERS:
            rows = [row for row in record["rows"] if (row["objective"], tuple(row["teachers"])) == (objective, names)]
            rate, teachers = rows[0]["target_bytes_per_second"], " + ".join(names)
            cells = [f"`{objective}`", teachers, f"{rate:,}"]
            for axis, values in zip(axes[0], errors.values(), strict=True):
                of_seeds = [100 * values[f"{objective}-{'-'.join(names)}-{seed}"] for seed in seeds]
                mean = statistics.mean(of_seeds)
                axis.plot(rate, mean, markers[objective], color=colours[teachers], label=f"{objective}, {teachers}")
                axis.vlines(rate, min(of_seeds), max(of_seeds), color=colours[teachers])
                spread = f" ({min(of_seeds):.1f} to {max(of_seeds):.1f})" if len(seeds) > 1 else ""
                cells.append(f"{mean:.1f}{spread}")
            lines.append("| " + " | ".join(cells) + " |")
    baselines = [name for name in next(iter(errors.values())) if not name[-1].isdigit()]
    for name in baselines:
        cells = [f"{100 * values[name]:.1f}" for values in errors.values()]
        lines.append(f"| none: {name} | | | " + " | ".join(cells) + " |")
    for axis, (task, values) in zip(axes[0], errors.items(), strict=True):
        for name, style in zip(baselines, ("-", "--", "-.", ":"), strict=False):
            if name != "random weights":
                axis.axhline(100 * values[name], color="0.6", linestyle=style, linewidth=1, label=name)
        axis.set(xscale="log", xlabel="bytes of targets per second of audio", ylabel=f"{metrics[task]}, %", title=task)
    axes[0][-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(output, metadata={"Date": None})
    print("\n".join(lines))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command("measure")(main)
    app.command()(plot)
    app()
