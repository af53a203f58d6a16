"""Comparison with frozen results of tiny students (tests/golden/make_student_golden.py), without the shared data."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from ray_distill.student import Student

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_student_golden", GOLDEN / "make_student_golden.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["paper", "released", "none"])
def test_frozen_student(maker: ModuleType, name: str) -> None:
    frozen = load_file(maker.FILE)
    student = Student(maker.STUDENTS[name]).eval()
    prefix = f"{name}/weights/"
    student.load_state_dict(
        {key.removeprefix(prefix): value for key, value in frozen.items() if key.startswith(prefix)}
    )
    found = maker.results(student, frozen)
    expected = {
        key.removeprefix(f"{name}/"): value
        for key, value in frozen.items()
        if key.startswith(f"{name}/") and not key.startswith(prefix)
    }
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


def test_the_two_reuse_behaviours_differ(maker: ModuleType) -> None:
    # With equal weights, the second softmax must make a difference, or the frozen file would not test reuse.
    paper, released = (Student(maker.STUDENTS[name]).eval() for name in ("paper", "released"))
    frozen = load_file(maker.FILE)
    for student in (paper, released):
        student.load_state_dict(
            {k.removeprefix("paper/weights/"): v for k, v in frozen.items() if "paper/weights/" in k}
        )
    with torch.no_grad():
        a, b = (s(frozen["waveforms"], frozen["lengths"]).hidden_states for s in (paper, released))
    torch.testing.assert_close(a[:, 0], b[:, 0])
    assert (a[:, 1] - b[:, 1]).abs().max() > 0.1
