"""The house rules: who may import whom."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "teacher_cache", "student", "serve")
ALLOWED = {
    "teacher_cache": (),
    # The reader and, beside it, what is plain arithmetic or safe unpickling; teachers for online targets, and for a student that
    # is one.
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
            if package == "student" and path.name not in ("ray_training.py", "student_teacher.py"):
                assert not name.startswith(ONLY_ONLINE), f"{path} imports {name}"
            if top == "ray":
                assert str(path.relative_to(REPOSITORY)) in {
                    "teacher_cache/build/audio_store.py",
                    "teacher_cache/build/build_cache.py",
                    "teacher_cache/build/shard_workers.py",
                    "student/training/ray_training.py",
                    "pipeline/ray_session.py",
                    "pipeline/ablation/sweep.py",
                    "pipeline/corpus/decoding_work.py",
                    "serve/deployment.py",
                }, f"{path} imports ray"


def product_imports() -> dict[str, set[str]]:
    """The modules of the product that each of its modules imports, at module level and inside functions alike.

    Imports for type checkers alone (``if TYPE_CHECKING``) never run and do not count.
    """
    paths = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        tree = ast.parse(path.read_text())
        checks = [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ]
        unused = {inner for check in checks for inner in ast.walk(check)}
        found: set[str] = set()
        for node in set(ast.walk(tree)) - unused:
            if isinstance(node, ast.Import):
                found |= {alias.name.removeprefix("ray_distill.") for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                parent = f"{module.rpartition('.')[0]}." if node.level else ""
                source = parent + node.module.removeprefix("ray_distill.")
                # `from package import name` imports a module of that name, or what the package itself defines.
                inside = {f"{source}.{alias.name}" for alias in node.names} & paths.keys()
                found |= inside or {source}
        graph[module] = found & paths.keys() - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of two or more modules that import each other, directly or through others."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reach = {module: reached(module) for module in graph}
    groups = {frozenset(other for other in reach[m] if m in reach[other]) for m in graph if m in reach[m]}
    return sorted(sorted(group) for group in groups)


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    graph = product_imports()
    assert graph["student.checkpoints"] > {"student.published", "student.weights"}
    assert circles(graph) == []


@pytest.mark.slow
@pytest.mark.parametrize("module", ["student", "serve", "serve.app", "teacher_cache.masks", "teacher_cache.teachers"])
def test_models_and_service_work_without_ray_and_parquet(module: str) -> None:
    # `import *` also imports what a package loads on first use.
    code = f"import sys; from ray_distill.{module} import *; assert not {{'ray', 'pyarrow'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_folders_and_files_stay_small() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs git, to know which files belong to the repository")
    files = [Path(name) for name in listed.stdout.splitlines() if (REPOSITORY / name).is_file()]
    folders = Counter(file.parent for file in files if len(file.parts) > 1)
    assert {folder: count for folder, count in folders.items() if count > 15} == {}, "divide these folders by concept"
    code = [file for file in files if file.parts[0] in PACKAGES and file.suffix == ".py"]
    lines = {file: len((REPOSITORY / file).read_text().splitlines()) for file in code}
    assert {file: count for file, count in lines.items() if count > 400} == {}, "divide these files by concept"
