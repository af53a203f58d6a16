"""Phone errors of a student that is pruned from its teacher and of an ARM student of the same size, at equal steps and from one cache.

``python -m benchmarks.student.pruning`` makes the demo's corpus, caches the small HuBERT's layers, prunes a copy of it to the size of
the demo's student (both without heads), trains the demo's student for as many steps as both phases together, and probes them for
phones of voices that no model was trained on. The corpus and the models are tiny, and the trainings short. With ``--speech`` the
teacher is the small HuBERT of real speech, the ARM student a quarter of it, and the corpus 2.4 hours of real speech. No Ray is needed.
"""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.result_file import REPOSITORY, RESULTS, write_result
from benchmarks.small_speech import shared_data, small_student
from benchmarks.student.sizes import write_corpus
from benchmarks.teacher.cached_run import cached_run
from benchmarks.teacher.quality import write_real_manifest
from ray_distill.pipeline.config import load_config
from ray_distill.pipeline.demo.demo_corpus import make_demo_corpus
from ray_distill.pipeline.initialise import initial_tensors, write_initial
from ray_distill.pipeline.probing.feature_source import FeatureSource
from ray_distill.pipeline.probing.linear_probe import run_probes
from ray_distill.pipeline.probing.task import PHONES_FILE, read_task
from ray_distill.student import Student, load_student
from ray_distill.student.pruning.phases import train_in_phases
from ray_distill.student.training.metric_rows import read_rows
from ray_distill.teacher_cache.reader import CacheReader

DEMO_TEACHER = [
    "student.conv_layers=[[32,10,5],[48,3,2],[48,3,2],[48,3,2],[48,3,2],[48,2,2],[48,2,2]]",
    "student.encoder_embed_dim=128",
    "student.encoder_ffn_embed_dim=256",
    "student.conv_pos=64",
    "student.conv_pos_groups=16",
]
SPEECH_TEACHER = [
    "student.conv_layers=[[96,10,5],[96,3,2],[96,3,2],[96,3,2],[96,3,2],[96,2,2],[96,2,2]]",
    "student.encoder_embed_dim=192",
    "student.encoder_ffn_embed_dim=768",
    "student.conv_pos=128",
    "student.conv_pos_groups=16",
]
"""Sizes of the small HuBERT of the demo and of that of real speech."""
COPY = [
    "student.encoder_attention_heads=4",
    "student.attention_reuse=none",
    "student.layer_grad_scale=false",
    "masks.draws=0",
    "train.init_front_end=true",
    "train.init_encoder_layers=6",
    "train.learning_rate=1e-3",
    "train.loss=l1",
    "train.cosine_weight=1",
]
"""Changes of the demo's configuration for a copy of its teacher, beside the sizes."""


def main(
    steps: Annotated[int, typer.Option(help="Optimiser steps of each of the two phases.")] = 400,
    seeds: Annotated[int, typer.Option(help="Students of each kind.")] = 1,
    epochs: Annotated[int, typer.Option(help="Epochs of each probe.")] = 20,
    minutes: Annotated[float, typer.Option(help="Minutes of speech; 0 for all.")] = 0,
    speech: Annotated[bool, typer.Option("--speech", help="Use real speech and a teacher of it.")] = False,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "student/pruning/demo.json",
) -> None:
    """Train and probe students of both kinds."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        demo, cache = REPOSITORY / "configs" / "demo.yaml", folder / "cache"
        common = [f"cache.path={cache}", f"runs={folder / 'runs'}", "student.encoder_layers=6"]
        common += [f"train.validate_every={steps}"]
        if speech:
            corpus, phones = folder / "corpus.csv", folder / "phones.csv"
            write_corpus(corpus, 60 * minutes or float("inf"))
            write_real_manifest(phones, 60 * minutes or float("inf"))
            quarter = small_student(6, 1, 112).model_dump(mode="json", exclude={"target_dim"})
            common += [f"teacher.checkpoint={shared_data() / 'teacher' / 'hubert_small.pt'}"]
            common += [f"student={json.dumps(quarter)}"]
        else:
            corpus = make_demo_corpus(folder / "corpus", *([minutes] if minutes else []))
            phones = corpus / PHONES_FILE
        common += [f"corpus.path={corpus}"]
        copy = [*common, *(SPEECH_TEACHER if speech else DEMO_TEACHER), *COPY]
        plain = load_config(demo, [*common, f"train.max_steps={2 * steps}"])
        job = cached_run(plain)
        small = plain.resolve_student(6, job.teacher.dim)
        whole = load_config(demo, copy).resolve_student(6, job.teacher.dim)
        sizes = [_parameters(Student(config)) for config in (small, whole)]
        prune = {"sparsity": 1 - sizes[0] / sizes[1], "steps": steps, "rise_steps": max(1, steps // 4)}
        prune |= {"weight_learning_rate": 1e-3, "warmup_steps": steps // 10, "gate_learning_rate": 0.1}
        pruned = load_config(demo, [*copy, f"train.max_steps={steps}", f"train.prune={json.dumps(prune)}"])
        initial = folder / "initial.safetensors"
        write_initial(initial, initial_tensors(job.teacher, whole, pruned.train))
        task, rows = read_task(phones), []
        sources = [FeatureSource.log_mel()]
        for name, config, architecture, start in (
            ("ARM student", plain, small, None),
            ("pruned student", pruned, whole, initial),
        ):
            draws = config.masks.draws
            readers = CacheReader(cache, "train", draws=draws), CacheReader(cache, "validation")
            for seed in range(seeds):
                run = folder / "runs" / f"{len(rows)}"
                settings = config.train.model_copy(update={"workers": 1, "seed": seed})
                result = train_in_phases(architecture, settings, *readers, run, initial=start)
                student = load_student(run / "checkpoints" / "best").eval()
                sources.append(FeatureSource.of_student(student, f"{name}, seed {seed}"))
                row: dict[str, Any] = {"student": name, "seed": seed, "seconds": result.seconds}
                row |= {"parameters": _parameters(student), "last_validation_loss": result.last_validation_loss}
                if start is not None:
                    gated = [one for one in read_rows(run / "pruning" / "metrics.jsonl") if one["kind"] == "train"]
                    row |= {key: gated[-1][key] for key in ("sparsity", "target_sparsity")}
                    row |= {"real_sparsity": 1 - row["parameters"] / sizes[1]}
                    row |= {"heads": student.config.layer_heads, "units": student.config.layer_ffn_dims}
                    row |= {"channels": [layer[0] for layer in student.config.conv_layers]}
                    row |= {"first_loss_after_removal": result.first_validation_loss}
                    torch.manual_seed(0)
                    untrained = Student(student.config).eval()
                rows.append(row)
                print(row, flush=True)
        sources.append(FeatureSource.of_student(untrained, "pruned student, random weights"))
        sources.append(FeatureSource.of_teacher(job.teacher, "teacher"))
        outcomes = [asdict(outcome) for outcome in run_probes(task, sources, epochs=epochs)]
        for outcome in outcomes:
            print({key: outcome[key] for key in ("source", "value", "low", "high")}, flush=True)
    write_result(
        output,
        teacher=job.teacher.name,
        steps=steps,
        epochs=epochs,
        prune=prune,
        parameters=sizes,
        rows=rows,
        outcomes=outcomes,
    )


def _parameters(student: Student) -> int:
    return sum(p.numel() for p in student.without_heads().parameters())


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
