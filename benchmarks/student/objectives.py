"""Phone errors of students that learn one teacher's layers, units and codebooks at equal steps, on the demo's synthetic speech.

``python -m benchmarks.student.objectives`` makes the demo's corpus, caches the small HuBERT's layers, derives the discrete targets
from that cache without the teacher, trains a student with the same encoder for each objective and seed, and probes their layers for
phones of voices that no model was trained on. The corpus and the models are tiny, and the trainings short. No Ray is needed.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.result_file import REPOSITORY, RESULTS, write_result
from benchmarks.teacher.cached_run import cached_run
from ray_distill.pipeline.config import load_config
from ray_distill.pipeline.demo.demo_corpus import make_demo_corpus
from ray_distill.pipeline.probing.feature_source import FeatureSource
from ray_distill.pipeline.probing.linear_probe import run_probes
from ray_distill.pipeline.probing.task import PHONES_FILE, read_task
from ray_distill.student import Student, load_student
from ray_distill.student.training.training_loop import train
from ray_distill.teacher_cache.maintenance.derive import derive_cache
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.targets.fresh_masks import FreshMasks

DISCRETE = [
    "masks.draws=0",
    "train.masks=fresh",
    "train.hint_weight=0.1",  # The default, since the key of the demo does nothing here.
    "student.heads=none",
    "student.layer_grad_scale=false",
]
UNITS = [*DISCRETE, "train.objective=units"]
MVQ = [*DISCRETE, "train.objective=mvq"]
EVERYWHERE = "train.unmasked_weight=1.0"
OBJECTIVES: dict[str, tuple[str, list[str]]] = {
    "layers": ("", []),
    "units, masked frames": ("units:100", UNITS),
    "units, all frames": ("units:100", [*UNITS, EVERYWHERE]),
    "mvq, all frames": ("mvq:4", [*MVQ, EVERYWHERE]),
}
"""For each name the codec that is derived from the layers' cache, and the changes of the demo's configuration."""


def main(
    steps: Annotated[int, typer.Option(help="Optimiser steps of each training.")] = 400,
    seeds: Annotated[int, typer.Option(help="Students of each objective.")] = 1,
    layer: Annotated[int, typer.Option(help="Teacher layer of the discrete targets.")] = 5,
    epochs: Annotated[int, typer.Option(help="Epochs of each probe.")] = 20,
    minutes: Annotated[float, typer.Option(help="Minutes of synthetic speech; 0 for the demo's own amount.")] = 0,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "student/objectives.json",
) -> None:
    """Train and probe a student for each objective."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus = make_demo_corpus(folder / "corpus", *([minutes] if minutes else []))
        common = [f"corpus.path={corpus}", f"runs={folder / 'runs'}", f"train.max_steps={steps}"]
        common += [f"train.validate_every={steps}", "student.encoder_layers=6"]
        first = load_config(REPOSITORY / "configs" / "demo.yaml", [*common, f"cache.path={folder / 'cache'}"])
        job = cached_run(first)
        task = read_task(corpus / PHONES_FILE)
        sources = [FeatureSource.log_mel()]
        rows: list[dict[str, Any]] = []
        for name, (codec, changes) in OBJECTIVES.items():
            place, layers = folder / "cache", list(job.layers)
            if codec:
                place, layers = folder / codec.replace(":", "-"), [layer]
                derive_cache(folder / "cache", place, codec, layers)
                changes = [*changes, f"cache.codec={codec}", f"teacher.layers=[{layer}]"]
            config = load_config(REPOSITORY / "configs" / "demo.yaml", [*common, f"cache.path={place}", *changes])
            readers: list[Any] = [CacheReader(place, split, layers) for split in ("train", "validation")]
            if codec:
                readers = [FreshMasks(reader, config.masks) for reader in readers]
            architecture = config.resolve_student(len(layers) if not codec else 6, job.teacher.dim)
            for seed in range(seeds):
                settings = config.train.model_copy(update={"workers": 1, "seed": seed})
                run = folder / "runs" / f"{len(rows)}"
                result = train(architecture, settings, readers[0], readers[1], run)
                student = load_student(run / "checkpoints" / "best").eval()
                sources.append(FeatureSource.of_student(student, f"{name}, seed {seed}"))
                read = readers[0].bytes_read or 0
                rows.append(
                    {
                        "objective": name,
                        "seed": seed,
                        "seconds": result.seconds,
                        "first_validation_loss": result.first_validation_loss,
                        "last_validation_loss": result.last_validation_loss,
                        "bytes_read": read,
                        "bytes_per_frame": sum(c.bytes_per_frame for c in Cache.open(place).codecs(0)),
                    }
                )
                print(rows[-1], flush=True)
        torch.manual_seed(0)
        sources.append(FeatureSource.of_student(Student(architecture).eval(), "student, random weights"))
        sources.append(FeatureSource.of_teacher(job.teacher, "teacher"))
        outcomes = [asdict(outcome) for outcome in run_probes(task, sources, epochs=epochs)]
        for outcome in outcomes:
            print({key: outcome[key] for key in ("source", "value", "low", "high")}, flush=True)
    write_result(
        output,
        teacher=job.teacher.name,
        layer=layer,
        steps=steps,
        epochs=epochs,
        student_parameters=sum(p.numel() for p in Student(architecture).parameters()),
        rows=rows,
        outcomes=outcomes,
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
