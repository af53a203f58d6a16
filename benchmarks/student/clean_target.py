"""Phone errors of students of composite, masked and clean targets of a teacher of real speech, at equal steps and from one cache.

``python -m benchmarks.student.clean_target`` caches the clean and the whole masked pass of the small HuBERT for 2.4 hours of real
speech (``masked_everywhere``), trains students of the variants of the grid ``ablations/clean-target`` from it, and probes them for
phones of speakers that no model was trained on. No Ray is needed.
"""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.result_file import REPOSITORY, RESULTS, write_result
from benchmarks.small_speech import shared_data, small_student
from benchmarks.student.sizes import write_corpus
from benchmarks.teacher.cached_run import cached_run
from benchmarks.teacher.quality import write_real_manifest
from ray_distill.pipeline.ablation.definition import load_ablation
from ray_distill.pipeline.config import load_config
from ray_distill.pipeline.probing.feature_source import FeatureSource
from ray_distill.pipeline.probing.linear_probe import run_probes
from ray_distill.pipeline.probing.task import read_task
from ray_distill.student import load_student
from ray_distill.student.training.training_loop import train
from ray_distill.teacher_cache.reader import CacheReader

GRID = REPOSITORY / "configs" / "ablations" / "clean-target.yaml"


def main(
    steps: Annotated[int, typer.Option(help="Optimiser steps of each student.")] = 600,
    seeds: Annotated[int, typer.Option(help="Students of each variant.")] = 3,
    epochs: Annotated[int, typer.Option(help="Epochs of each probe.")] = 20,
    minutes: Annotated[float, typer.Option(help="Minutes of speech; 0 for all.")] = 0,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "student/clean_target.json",
) -> None:
    """Train and probe students of all variants."""
    torch.set_num_threads(1)
    seconds = 60 * minutes or float("inf")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_corpus(folder / "corpus.csv", seconds)
        write_real_manifest(folder / "phones.csv", seconds)
        student = small_student(6, 1, 112).model_dump(mode="json", exclude={"target_dim"})
        config = load_config(
            REPOSITORY / "configs" / "demo.yaml",
            [
                f"corpus.path={folder / 'corpus.csv'}",
                f"cache.path={folder / 'cache'}",
                f"runs={folder / 'runs'}",
                "cache.targets=masked_everywhere",
                f"teacher.checkpoint={shared_data() / 'teacher' / 'hubert_small.pt'}",
                f"student={json.dumps(student)}",
                f"train.max_steps={steps}",
                f"train.validate_every={steps}",
            ],
        )
        job = cached_run(config)
        variants = {
            run.variant: (run.config.cache.targets, None if run.config.masks.draws else 0)
            for run in load_ablation(GRID).runs
        }
        task, rows = read_task(folder / "phones.csv"), []
        sources = [FeatureSource.log_mel(), FeatureSource.of_teacher(job.teacher, "teacher")]
        for seed in range(seeds):
            for name, (targets, draws) in variants.items():
                readers = (
                    CacheReader(folder / "cache", "train", draws=draws, targets=targets),
                    CacheReader(folder / "cache", "validation"),
                )
                settings = config.train.model_copy(update={"workers": 1, "seed": seed})
                run = folder / "runs" / f"{name}-{seed}"
                architecture = config.resolve_student(6, job.teacher.dim)
                result = train(architecture, settings, *readers, run)
                trained = load_student(run / "checkpoints" / "best").eval()
                sources.append(FeatureSource.of_student(trained, f"{name}, seed {seed}"))
                rows.append(
                    {
                        "variant": name,
                        "targets": targets,
                        "masked": draws is None,
                        "seed": seed,
                        "seconds": result.seconds,
                        "last_validation_loss": result.last_validation_loss,
                    }
                )
                print(rows[-1], flush=True)
        outcomes = [asdict(outcome) for outcome in run_probes(task, sources, epochs=epochs)]
        for outcome in outcomes:
            print({key: outcome[key] for key in ("source", "value", "low", "high")}, flush=True)
    masks = config.masks.model_dump(mode="json")
    write_result(
        output, teacher=job.teacher.name, steps=steps, epochs=epochs, masks=masks, rows=rows, outcomes=outcomes
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
