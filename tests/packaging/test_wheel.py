"""The wheel, installed away from the repository: its commands, its recipes, its citation."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from check_jsonschema.cli import main as check_jsonschema
from click.testing import CliRunner

import ray_distill

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel as for a release, from a copy of the files that Git knows, so that a stale build/ is left out."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file() and not name.startswith(("tests/", "benchmarks/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(output.glob("*.whl"))  # It is built from the sdist, so the sdist is complete too.


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bin folder of a new environment with the wheel, which uses the dependencies of this environment."""
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", str(wheel)], check=True, timeout=300
    )
    site = next((home / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    return home / "bin"


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_wheel_holds_packages_and_recipes_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"ray_distill"}
    sources = [
        f"ray_distill/{path.relative_to(REPOSITORY)}"
        for top in ("pipeline", "teacher_cache", "student", "serve")
        for path in (REPOSITORY / top).rglob("*.py")
        if "__pycache__" not in path.parts
    ]
    assert set(sources) <= set(names)
    for recipe in (REPOSITORY / "configs").rglob("*.yaml"):
        assert f"ray_distill/recipes/{recipe.relative_to(REPOSITORY / 'configs')}" in names
    assert "ray_distill/pipeline/demo/demo_sentences.txt" in names
    assert "ray_distill/pipeline/reports/templates/charts.js" in names
    assert "ray_distill/teacher_cache/teachers/known/known_teachers.json" in names
    teacher = "ray_distill/teacher_cache/teachers/builtin/phone-hubert"
    assert {f"{teacher}/{name}" for name in ("config.json", "model.safetensors", "README.md")} <= set(names)
    page = [path for path in (REPOSITORY / "serve" / "page").iterdir() if path.is_file()]
    assert {f"ray_distill/serve/page/{path.name}" for path in page} <= set(names)


def test_commands_work_from_anywhere(installed: Path, tmp_path: Path, speech_folder: Path) -> None:
    for name in ("ray-distill", "ray-distill-cache", "ray-distill-serve"):
        shown = run([str(installed / name), "--help"], tmp_path)
        assert shown.returncode == 0, shown.stdout + shown.stderr
        assert f"Usage: {name} " in shown.stdout
    module = run([str(installed / "python"), "-m", "ray_distill", "--version"], tmp_path)
    assert module.stdout == f"ray-distill {ray_distill.__version__}\n", module.stderr
    where = run([str(installed / "python"), "-c", "import ray_distill; print(ray_distill.__file__)"], tmp_path).stdout
    assert Path(where).is_relative_to(installed.parent), "the repository was imported, not the wheel"
    command = [str(installed / "ray-distill"), "run", "--config", "demo", f"corpus.path={speech_folder}"]
    command.append("teacher.checkpoint=random:2x32")
    planned = run([*command, "--dry-run"], tmp_path)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert "9 train files, 3 validation files" in planned.stdout
    assert not (tmp_path / "runs").exists()
    done = run([*command, "--stages", "index,plan"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 utterances" in done.stdout and "2 mask draws" in done.stdout
    listed = run([str(installed / "ray-distill"), "ablate", "--config", "ablations/smoke", "--list"], tmp_path)
    assert listed.returncode == 0 and "variant" in listed.stdout, listed.stdout + listed.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["ray-distill", "--config", "nothing"], "there is no configuration file at nothing"),
        (["ray-distill", "plan-cluster", "--cluster", "clusters/this-machine"], "there is no benchmark result"),
        (["ray-distill-cache", "info", "none"], "there is no teacher cache at"),
        (["ray-distill-serve", "--model", "none"], "There is no model folder"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence(installed: Path, tmp_path: Path, command: list[str], message: str) -> None:
    done = run([str(installed / command[0]), *command[1:]], tmp_path)
    assert done.returncode == 2 and done.stdout in ("", "start   importing PyTorch and Ray\n")
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


def test_completion_knows_commands_and_recipes(installed: Path, tmp_path: Path) -> None:
    for words, expected in (("ray-distill ab", "ablate"), ("ray-distill run --config armw", "armwavlm-s-100")):
        variables = {
            "_RAY_DISTILL_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
        environment = [f"{name}={value}" for name, value in variables.items()]
        shown = run(["env", *environment, str(installed / "ray-distill")], tmp_path)
        assert shown.returncode == 0 and expected in shown.stdout.split(), shown.stdout + shown.stderr


def test_citation_is_valid_and_of_this_version() -> None:
    path = REPOSITORY / "CITATION.cff"
    checked = CliRunner().invoke(check_jsonschema, ["--builtin-schema", "vendor.citation-file-format", str(path)])
    assert checked.exit_code == 0, checked.output
    citation = yaml.safe_load(path.read_text())
    assert citation["version"] == ray_distill.__version__
    assert f"\n## {citation['version']}\n" in (REPOSITORY / "CHANGELOG.md").read_text()
    titles = json.dumps([reference["title"] for reference in citation["references"]])
    assert "Recycle-and-Distill" in titles and "STaR" in titles
