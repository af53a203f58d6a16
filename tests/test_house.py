"""The house rules: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "teacher_cache", "student", "serve")
ALLOWED = {
    "teacher_cache": (),
    # The reader and, beside it, what is plain arithmetic or safe unpickling; the teacher only for online targets.
    "student": ("teacher_cache",),
    "serve": ("student", "teacher_cache.audio", "teacher_cache.frames"),
    "pipeline": ("teacher_cache", "student"),
}
ONLY_ONLINE = ("teacher_cache.teachers", "teacher_cache.build", "teacher_cache.maintenance")


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    assert not {name.split(".")[0] for name in names} & set(PACKAGES), f"{path} doesn't import through ray_distill"
    return {name.removeprefix("ray_distill.") for name in names}


@pytest.mark.parametrize("package", PACKAGES)
def test_data_flows_one_way(package: str) -> None:
    for path in (REPOSITORY / package).rglob("*.py"):
        for name in imports(path):
            top = name.split(".")[0]
            if top in PACKAGES and top != package:
                allowed = any(name == prefix or name.startswith(prefix + ".") for prefix in ALLOWED[package])
                assert allowed, f"{path} imports {name}"
            if package == "student" and path.name != "ray_training.py":
                assert not name.startswith(ONLY_ONLINE), f"{path} imports {name}"
            if top == "ray":
                assert str(path.relative_to(REPOSITORY)) in {
                    "teacher_cache/build/build_cache.py",
                    "student/training/ray_training.py",
                    "pipeline/ray_session.py",
                    "pipeline/ablation/sweep.py",
                    "serve/deployment.py",
                }, f"{path} imports ray"


@pytest.mark.parametrize(
    "module", ["student", "serve", "ray_distill.teacher_cache.masks", "ray_distill.teacher_cache.teachers"]
)
def test_models_and_service_work_without_ray_and_parquet(module: str) -> None:
    code = f"import sys, ray_distill.{module}; assert not {{'ray', 'pyarrow'}} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
