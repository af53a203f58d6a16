"""``ray-distill``: its commands, its help, its completion, and how it reports mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import ray_distill
from ray_distill.command_line import TRACEBACK, Command, application

pytestmark = pytest.mark.slow

START = "start   importing PyTorch and Ray\n"
"""The line that a job prints before its imports, on standard output like the rest of its progress."""
REPOSITORY = Path(__file__).resolve().parents[1]
COMMANDS = (
    "run",
    "demo",
    "ablate",
    "import-config",
    "plan-cluster",
    "export",
    "push",
    "convert",
    "profile",
    "probe",
    "serve",
    "cache",
    "teachers",
)
LEAVES = [
    *([name] for name in COMMANDS if name not in ("cache", "teachers")),
    *(["cache", name] for name in ("info", "verify", "repair")),
    *(["teachers", name] for name in ("list", "show")),
]
DOORS = {
    "ray-distill": ["-m", "ray_distill"],
    "job": ["pipeline/run.py"],
    "cache": ["-m", "teacher_cache"],
    "serve": ["-m", "serve"],
}
HELP_MODULES = 650
"""The help imports about 520 modules. PyTorch alone is another 900. Unlike seconds, a count is the same on any machine."""

HELP = """
import json, sys
from ray_distill.command_line import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print(json.dumps([len(sys.modules), sorted({"torch", "ray", "pyarrow"} & set(sys.modules))]), file=sys.stderr)
"""


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository's folder."""
    variables = {key: value for key, value in os.environ.items() if key != TRACEBACK} | {"COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=variables | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_help_lists_every_command_on_one_line() -> None:
    shown = CliRunner().invoke(application, ["--help"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0
    rows = [line.strip("│ ") for line in shown.output.splitlines()]
    described = {row.split()[0]: row for row in rows if row.split()[:1] and row.split()[0] in COMMANDS}
    assert tuple(described) == COMMANDS
    assert all(row.endswith(".") and len(row.split()) > 3 for row in described.values()), described
    for panel in ("Job", "Students", "Teacher cache", "Service"):
        assert f"─ {panel} ─" in shown.output


@pytest.mark.parametrize("command", [[], ["cache"], ["teachers"], *LEAVES], ids=" ".join)
def test_help_is_fast_and_imports_neither_torch_nor_ray(command: list[str]) -> None:
    done = start("-c", HELP, *command, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout
    modules, heavy = json.loads(done.stderr.splitlines()[-1])
    assert heavy == []
    assert modules < HELP_MODULES


def test_run_names_the_stages_that_exist() -> None:
    from ray_distill.pipeline.stages import STAGES

    shown = CliRunner().invoke(application, ["run", "--help"], env={"COLUMNS": "300"})
    assert f"of {', '.join(STAGES)}. Default" in " ".join(shown.output.split())


def test_version() -> None:
    shown = CliRunner().invoke(application, ["--version"])
    assert (shown.exit_code, shown.stdout) == (0, f"ray-distill {ray_distill.__version__}\n")


def test_without_arguments_it_shows_its_help() -> None:
    shown = CliRunner().invoke(application, [])
    assert shown.exit_code == 2 and "plan-cluster" in shown.output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("ray-distill ab", {"ablate"}),
        ("ray-distill c", {"convert", "cache"}),
        ("ray-distill cache ver", {"verify"}),
        ("ray-distill run --dry", {"--dry-run"}),
        ("ray-distill run --config armhubert-s", {"armhubert-s-100", "armhubert-s-960"}),
        ("ray-distill --config armhubert-s", {"armhubert-s-100", "armhubert-s-960"}),
        ("ray-distill ablate --config ablations/sm", {"ablations/smoke"}),
    ],
)
def test_completion(words: str, expected: set[str]) -> None:
    environment = {
        "_RAY_DISTILL_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    shown = CliRunner().invoke(application, [], prog_name="ray-distill", env=environment)
    assert shown.exit_code == 0
    assert set(shown.output.split()) == expected


@pytest.mark.parametrize("arguments", [["probe", "x.csv", "--task", "words"], ["export", "x", "--format", "words"]])
def test_a_wrong_choice_is_said_plainly(arguments: list[str]) -> None:
    shown = CliRunner().invoke(application, arguments, env={"COLUMNS": "200"})
    assert shown.exit_code == 2 and "Value error" not in shown.output
    assert f"Invalid value for '{arguments[2]}': 'words' is not one of '" in shown.output


def test_completion_can_be_shown() -> None:
    shown = CliRunner().invoke(application, [], prog_name="ray-distill", env={"_RAY_DISTILL_COMPLETE": "source_bash"})
    assert shown.exit_code == 0 and "complete -o default -F" in shown.output
    assert {"--install-completion", "--show-completion"} <= set(
        CliRunner().invoke(application, ["--help"]).output.split()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--config", "nothing"], "there is no configuration file at nothing"),
        (["--config", "nothing"], "there is no configuration file at nothing"),
        (["train.epochs=3", "--config", "nothing"], "there is no configuration file at nothing"),
        (["run", "--config", "demo", "--stages", "bake"], "--stages: unknown stage 'bake'; stages are index"),
        (["run", "--config", "demo", "train.epoch=3"], "train.epoch: unknown key; did you mean train.epochs?"),
        (["demo", "--config", "nothing", "--corpus", "."], "there is no configuration file at nothing"),
        (["ablate", "--config", "nothing"], "nothing"),
        (["ablate"], "give one recipe or YAML file, such as ablations/smoke; they are ablations/aggregate"),
        (["ablate", "demo", "--config", "ablations/smoke"], "give one recipe or YAML file, not demo, ablations/smoke"),
        (["ablate", "demo"], "demo.yaml is the configuration of a run; give it to `ray-distill run`"),
        (["ablations/smoke"], "smoke.yaml describes an ablation; give it to `ray-distill ablate`"),
        (["profile", "ablations/smoke"], "smoke.yaml describes an ablation; give it to `ray-distill ablate`"),
        (["run", "clusters/one-h100"], "describes a cluster; give it to `ray-distill plan-cluster --cluster`"),
        (
            ["plan-cluster", "--cluster", "demo"],
            "demo.yaml is the configuration of a run; give it to `ray-distill run`",
        ),
        (["ablate", "--config", "ablations/smoke", "--units", "words"], "--units needs --probe"),
        (
            ["run", "demo", "--train.epochs", "3"],
            "--train.epochs is not an option but a key of the configuration; write train.epochs=3",
        ),
        (
            ["run", "demo", "--corpus=/data"],
            "--corpus is not an option but a key of the configuration; write corpus=/data",
        ),
        (["ablate", "ablations/smoke", "--train.epochs"], "of the configuration; write train.epochs=VALUE"),
        (["import-config", "nothing.yaml"], "nothing.yaml"),
        (["plan-cluster", "--cluster", "nothing"], "there is no cluster description at nothing"),
        (["export", "nothing", "--format", "torch", "--output", "x"], "nothing is not a student"),
        (["convert", "nothing.ckpt", "nothing.yaml", "x"], "nothing."),
        (["profile", "nothing"], "nothing is not a student"),
        (["probe", "nothing.csv"], "nothing.csv can't be read"),
        (["cache", "info", "/nowhere"], "there is no teacher cache at /nowhere"),
        (["cache", "verify", "/nowhere"], "there is no teacher cache at /nowhere"),
        (["cache", "repair", "/nowhere"], "there is no teacher cache at /nowhere"),
        (["serve", "--model", "nothing"], "There is no model folder at 'nothing'"),
        # A shell replaces ~ only where an argument begins with it.
        (["serve", "--model=~/nothing"], f"There is no model folder at '{Path.home() / 'nothing'}'"),
        (["probe", "nothing.csv", "--student=~no-user/x"], "~no-user/x begins with ~no-user, which is no user"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(application, arguments)
    assert done.exit_code == 2
    assert done.stdout in ("", START)
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("door", "arguments", "message"),
    [
        ("ray-distill", ["profile", "nothing"], "nothing is not a student"),
        ("job", ["--config", "nothing"], "there is no configuration file at nothing"),
        ("job", ["export", "nothing", "--format", "torch", "--output", "x"], "nothing is not a student"),
        ("cache", ["info", "/nowhere"], "there is no teacher cache at /nowhere"),
        ("serve", ["--model", "nothing"], "There is no model folder at 'nothing'"),
    ],
)
def test_every_door_reports_mistakes_alike(door: str, arguments: list[str], message: str) -> None:
    done = start(*DOORS[door], *arguments)
    assert done.returncode == 2
    assert done.stdout in ("", START)
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


def test_every_door_opens(tmp_path: Path) -> None:
    for arguments, usage in (
        (DOORS["ray-distill"], "Usage: python -m ray_distill "),
        (DOORS["job"], "Usage: run.py "),
        (DOORS["cache"], "Usage: python -m teacher_cache "),
        (DOORS["serve"], "Usage: python -m serve "),
    ):
        done = start(*arguments, "--help")
        assert done.returncode == 0 and usage in done.stdout, done.stdout + done.stderr
    # A submitted job starts elsewhere, with nothing installed.
    elsewhere = subprocess.run(
        [sys.executable, str(REPOSITORY / "pipeline" / "run.py"), "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert elsewhere.stdout == f"ray-distill {ray_distill.__version__}\n", elsewhere.stderr


def test_a_traceback_of_a_mistake_is_shown_on_request() -> None:
    done = start(*DOORS["cache"], "info", "/nowhere", **{TRACEBACK: "1"})
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr and "CacheError: there is no teacher cache" in done.stderr


@pytest.mark.parametrize("error", [AssertionError, TypeError, KeyError, RuntimeError])
def test_what_is_no_mistake_of_the_user_keeps_its_traceback(error: type[Exception]) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command(cls=Command)
    def fail() -> None:
        raise error("ours")

    with pytest.raises(error, match="ours"):
        CliRunner().invoke(app, [], catch_exceptions=False)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (FloatingPointError("the loss is not finite"), "the loss is not finite"),
        (FileNotFoundError(2, "No such file or directory", "x"), "[Errno 2] No such file or directory: 'x'"),
        (ValueError(), "ValueError"),
    ],
    ids=str,
)
def test_the_sentence_of_a_mistake(error: Exception, sentence: str) -> None:
    app = typer.Typer()

    @app.command(cls=Command)
    def fail() -> None:
        raise error

    done = CliRunner().invoke(app, [])
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", f"error: {sentence}\n")


def test_a_misspelt_command_is_suggested() -> None:
    done = CliRunner().invoke(application, ["exprt"])
    assert done.exit_code == 2 and "Did you mean 'export'?" in done.output
