"""A run that prunes: from the corpus to the export and the report, what is refused before, and the recipe."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ray_distill.pipeline.config import Config, ConfigError, check_config, load_config
from ray_distill.pipeline.initialise import initial_tensors
from ray_distill.pipeline.planning.dry_run import plan_run
from ray_distill.pipeline.stages import STAGES, Run
from ray_distill.pipeline.stages.export import export_best
from ray_distill.pipeline.stages.index import index_audio
from ray_distill.pipeline.stages.report import report_run
from ray_distill.pipeline.stages.train import initial_student, prepare_training, pruning_record
from ray_distill.pipeline.student_export import export_student, open_student
from ray_distill.student import Student, load_student
from ray_distill.student.pruning.gates import Gates
from ray_distill.student.training import ray_training
from ray_distill.student.training.steps.step_memory import StepMemory
from ray_distill.student.training.train_state import resume_step
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.storage.shard_plan import plan_shards
from ray_distill.teacher_cache.teachers import load_teacher
from tests.pipeline.test_initialise import like
from tests.tiny import CONFIGS

TEACHER = "random:3x48"
PRUNE = {"sparsity": 0.5, "steps": 6, "rise_steps": 3, "warmup_steps": 1, "gate_learning_rate": 0.1}


def configure(folder: Path, prune: dict[str, Any] | None = None, **train: Any) -> Config:
    """Return the configuration of a run that prunes a copy of `TEACHER`."""
    student = like(load_teacher(TEACHER)).model_dump(mode="json", exclude={"encoder_layers", "target_dim", "patches"})
    settings = {"batch_seconds": 8, "max_steps": 4, "validate_every": 2, "log_every": 1, "learning_rate": 1e-3}
    settings |= {"init_front_end": True, "init_encoder_layers": 3, "prune": PRUNE | (prune or {})}
    return check_config(
        {
            "name": "pruned",
            "runs": str(folder / "runs"),
            "corpus": {"path": str(folder / "corpus")},
            "teacher": {"checkpoint": TEACHER},
            "masks": {"draws": 0},
            "cache": {"path": str(folder / "cache"), "codec": "fp16", "verify": False},
            "student": student,
            "train": settings | train,
        }
    )


@pytest.mark.slow
def test_a_run_from_the_corpus_to_the_report(
    tmp_path: Path, speech_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A CPU stands for a GPU on which a step needs a byte for each sample.
    monkeypatch.setattr(ray_training, "_device", lambda job: torch.device("cpu"))
    monkeypatch.setattr(StepMemory, "_free_bytes", lambda memory: 64_000)
    monkeypatch.setattr(StepMemory, "_peak", lambda memory, indices: int(memory._lengths[indices].max()) * len(indices))
    config = configure(tmp_path, batch_seconds="auto", use_gpu=True)
    run = Run(config, Console(quiet=True))
    with run.folder.begin(config):
        index_audio(run)
    plan = plan_shards(run.utterances, run.spec.shard_seconds, run.teacher.num_frames)
    build_cache(run.cache.location, run.spec, plan, TEACHER, teacher_name=run.teacher.name, workers=None)
    assert "6 steps of pruning leave about" in plan_run(config, list(STAGES)).facts["student"]
    assert resume_step(run.folder.path) == (None, False)
    prepare_training(run, 1, in_process=True)()
    assert resume_step(run.folder.path) == (4, False)
    export_best(run)
    summary = report_run(run)
    record = pruning_record(run.folder)
    assert record is not None and summary["pruning"] == record
    assert 3.5 < summary["batch_seconds"] < 5
    assert f"batches of {summary['batch_seconds']:g} s of audio (auto), 1 per step" in run.folder.report.read_text()
    assert f"{summary['batch_seconds']:g} s of audio (auto)" in plan_run(config, list(STAGES)).facts["training"]
    assert record["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert 0 < record["expected_sparsity"] < record["sparsity"], "six steps are too few for the gates"
    assert f"{record['parameters']:,} of {record['parameters_before']:,} parameters" in run.folder.report.read_text()
    student = load_student(run.folder.path)
    assert student.config.layer_heads is not None
    assert sum(p.numel() for p in student.without_heads().parameters()) == record["parameters"]
    opened, origin = open_student(run.folder.path)
    assert export_student(opened, origin, "s3prl", tmp_path / "upstream") == "layers"
    assert load_teacher(str(tmp_path / "upstream")).num_parameters == record["parameters"]
    with pytest.raises(ConfigError, match="another configuration"):
        run.folder.refuse_other_config(configure(tmp_path, {"sparsity": 0.6}), may_extend=True)


def test_what_cant_be_pruned_is_refused_before_anything_is_built(tmp_path: Path, speech_folder: Path) -> None:
    for prune, train, message in (
        ({"sparsity": 1.5}, {}, r"train\.prune\.sparsity.*less than 1"),
        ({"sparsity": -1}, {}, r"train\.prune\.sparsity.*greater than 0"),
        ({"spars": 0.5}, {}, r"train\.prune\.spars: unknown key; did you mean .*train\.prune\.sparsity"),
        ({}, {"init_encoder_layers": 0}, "needs a student that has learned something"),
        ({"rise_steps": 7}, {}, "rise_steps 7 is more than train.prune.steps 6"),
    ):
        with pytest.raises(ConfigError, match=message) as refused:
            configure(tmp_path, prune, **train)
        assert "\n" not in str(refused.value)
    config = configure(tmp_path, {"sparsity": 0.99})
    for check in (lambda: initial_student(Run(config, Console(quiet=True))), lambda: plan_run(config, list(STAGES))):
        with pytest.raises(ValueError, match="so the highest sparsity is 0.827;"):
            check()
    tree = configure(tmp_path).model_dump(mode="json")
    del tree["teacher"]
    tree["cache"].pop("path")
    with pytest.raises(ConfigError, match="train.prune is for one teacher"):
        check_config(tree | {"teachers": [{"name": name, "checkpoint": TEACHER} for name in ("a", "b")]})


def test_the_recipe_prunes_a_copy_of_hubert_base() -> None:
    smaller = [
        "student.encoder_layers=2",
        "train.init_encoder_layers=2",
        "teacher.layers=[1,2]",
        "student.head_layers=[1,2]",
    ]
    config = load_config(CONFIGS / "pruned" / "dphubert-960.yaml", smaller)
    student = config.resolve_student(2, 768)
    tensors = initial_tensors(load_teacher("random:2x768"), student, config.train)  # HuBERT Base with fewer layers.
    assert {name.partition(".")[0] for name in tensors} >= {"conv_blocks", "projection", "position", "layers"}
    assert config.train.prune is not None
    whole = load_config(CONFIGS / "pruned" / "dphubert-960.yaml").resolve_student(3, 768)
    assert not list(Student(whole).heads.parameters()), "layers 4, 8 and 12 are compared as they are"
    assert Gates(whole, config.train.prune, 0).total == 94_371_712
