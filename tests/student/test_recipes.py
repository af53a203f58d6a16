"""The published recipes build students of exactly the published size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_distill.pipeline.config import load_config
from ray_distill.student import Student
from ray_distill.teacher_cache.masks import MaskDraws

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PARAMETERS = {
    "armhubert-960": 26_448_448,
    "armhubert-s-100": 22_394_080,
    "armhubert-s-960": 22_394_080,
    "armwavlm-s-100": 22_394_080,
    "armwavlm-s-960": 22_394_080,
    "maskhubert-960": 26_635_840,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_exact_parameter_count(name: str) -> None:
    student = Student(load_config(CONFIGS / f"{name}.yaml").resolve_student(12, 768))
    assert sum(parameter.numel() for parameter in student.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("starhubert", 22.3),
        ("starhubert-l", 26.6),
        ("starhubert-s", 14.1),
        ("starhubert-xs", 9.4),
        ("distilhubert-960", 23.5),
        ("pruned/dphubert-960", 94.4),  # Before pruning.
    ],
)
def test_size_as_the_papers_round_it(name: str, millions: float) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    student = Student(config.resolve_student(len(config.teacher.layers or range(12)), 768)).without_heads()
    assert round(sum(parameter.numel() for parameter in student.parameters()) / 1e6, 1) == millions


def test_every_recipe_can_be_built() -> None:
    for path in (*CONFIGS.glob("*.yaml"), *(CONFIGS / "discrete").glob("*.yaml"), *(CONFIGS / "pruned").glob("*.yaml")):
        config = load_config(path)
        layers = len(config.teacher.layers or range(12))
        student = config.resolve_student(layers, 768)
        config.train.check_student(student)
        config.train.chosen_objective.check_targets(student, layers, 768)


@pytest.mark.parametrize("path", sorted((CONFIGS / "several").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_several_teachers_can_be_built(path: Path) -> None:
    config = load_config(path)
    sizes = [(len(teacher.layers or range(12)), 768) for teacher in config.teachers]
    training = config.training(sizes)
    student = config.resolve_student(sizes[config.owner][0], 768)
    training.check_student(student)
    weighted = [layers for teacher, (layers, _) in zip(config.teachers, sizes, strict=True) if teacher.weight]
    training.chosen_objective.check_targets(student, sum(weighted), 768)


def test_students_of_base_size_have_the_parameters_of_hubert_base() -> None:
    for name in ("hubert-base-960", "mvq-base-960"):
        student = Student(load_config(CONFIGS / "discrete" / f"{name}.yaml").resolve_student(1, 768))
        assert round(sum(parameter.numel() for parameter in student.parameters()) / 1e6, 1) == 94.4


@pytest.mark.parametrize(
    ("name", "student", "train"),
    [
        (  # run.sh, distill.py and convert_hubert_from_hf.py of pyf98/DPHuBERT, commit c18093fe.
            "pruned/dphubert-960",
            {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0, "dropout_input": 0.1, "layer_drop": 0},
            {
                "loss": "l1",
                "cosine_weight": 1,
                "cosine_term": "plain",
                "learning_rate": 1e-4,
                "max_steps": 25_000,
                "warmup_fraction": 5_000 / 25_000,
                "weight_decay": 0,
                "max_grad_norm": 10,
                "precision": "fp16",
                "betas": (0.9, 0.999),
                "eps": 1e-8,
                "batch_seconds": 160,
                "workers": 4,
                "accumulate": 1,
            },
        ),
        (  # examples/hubert/config/pretrain/hubert_base_librispeech.yaml of fairseq, commit e537ac44; steps and batches differ.
            "discrete/hubert-base-960",
            {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0, "dropout_input": 0.1}
            | {"layer_drop": 0.05, "feature_grad_mult": 0.1},
            {
                "unit_dim": 256,
                "masked_weight": 1,
                "unmasked_weight": 0,
                "learning_rate": 5e-4,
                "max_grad_norm": 10,
                "warmup_fraction": 32_000 / 400_000,
                "betas": (0.9, 0.98),
                "eps": 1e-6,
                "weight_decay": 0.01,
                "crop_seconds": 250_000 / 16_000,
            },
        ),
    ],
)
def test_values_of_the_published_configurations(name: str, student: dict[str, Any], train: dict[str, Any]) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    made = config.resolve_student(len(config.teacher.layers or ()), 768)
    assert {key: getattr(made, key) for key in student} == student
    assert {key: getattr(config.train, key) for key in train} == train


def test_dphubert_prunes_as_published() -> None:
    config = load_config(CONFIGS / "pruned" / "dphubert-960.yaml")
    assert config.teacher.layers == [4, 8, 12] == list(config.resolve_student(3, 768).head_layers or ())
    assert config.train.prune is not None
    assert config.train.prune.model_dump() == {
        "sparsity": 0.75,
        "steps": 50_000,
        "rise_steps": 5_000,
        "remove": ("channels", "heads", "units"),
        "weight_learning_rate": 2e-4,
        "warmup_steps": 15_000,
        "gate_learning_rate": 0.02,
    }


@pytest.mark.parametrize(
    ("name", "published", "share", "run"),
    [("discrete/spear-speech-960", 0.402, 0.411, 138), ("several/spear-speech-and-music", 0.491, 0.502, 155)],
)
def test_masks_cover_as_much_as_spears(name: str, published: float, share: float, run: float) -> None:
    """Masks of 12 s. The published shares are those of ``compute_mask_indices`` of marcoyang1998/icefall (commit ac6a2bec), in whose
    frames of 10 ms the masked runs have 133 and 148 ms."""
    policy = load_config(CONFIGS / f"{name}.yaml").masks.policy
    drawn = MaskDraws(policy=policy, draws=0, seed=0).frame_mask(0, [str(k) for k in range(400)], [600] * 400).numpy()
    assert drawn.mean() == pytest.approx(share, abs=0.004)
    assert share == pytest.approx(published, abs=0.015)
    starts = (drawn & ~np.pad(drawn, ((0, 0), (1, 0)))[:, :-1]).sum()
    assert 20 * drawn.sum() / starts == pytest.approx(run, abs=3)
