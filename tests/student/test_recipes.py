"""The published recipes build students of exactly the published size."""

from pathlib import Path

import pytest

from ray_distill.pipeline.config import load_config
from ray_distill.student import Student

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
