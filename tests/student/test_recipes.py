"""The published recipes give students of exactly the published size."""

from pathlib import Path

import pytest

from pipeline.config import load_config
from student import Student

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
