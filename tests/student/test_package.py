"""The names of the package: shown by ``dir``, and imported on first use."""

import subprocess
import sys

import pytest

import ray_distill.student


def test_names_are_shown_and_found() -> None:
    assert {"Student", "StudentConfig", "load_student", "save_student", "distillation_loss"} <= set(
        dir(ray_distill.student)
    )
    for name in ray_distill.student.__all__:
        assert getattr(ray_distill.student, name).__name__ == name
    with pytest.raises(AttributeError, match=r"module 'ray_distill\.student' has no attribute 'Teacher'"):
        ray_distill.student.Teacher  # noqa: B018


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, ray_distill.student as s; dir(s); assert 'torch' not in sys.modules; s.StudentConfig"
    subprocess.run([sys.executable, "-c", code], check=True)
