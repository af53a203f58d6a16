"""Recipes are found by name, wherever a recipe is taken."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ray_distill.command_line import application
from ray_distill.pipeline.recipes import find_recipe, other_recipes, recipe_names

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "configs/demo", "configs/demo.yaml"])
def test_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == CONFIGS / "demo.yaml"


def test_a_file_comes_before_a_recipe_and_an_unknown_name_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("nothing-of-this-name") == Path("nothing-of-this-name")
    assert find_recipe("/nowhere/demo") == Path("/nowhere/demo")
    Path("demo").mkdir()
    assert find_recipe("demo") == CONFIGS / "demo.yaml", "a folder is no recipe"
    Path("demo.yaml").write_text("")
    assert find_recipe("demo.yaml") == Path("demo.yaml")


def test_the_names_are_the_files() -> None:
    assert recipe_names() == sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    assert recipe_names("clusters") == [
        "clusters/h100-local-disks",
        "clusters/h100-object-store",
        "clusters/one-h100",
        "clusters/this-machine",
    ]


@pytest.mark.parametrize(
    ("name", "folder", "start"),
    [
        ("demoo", None, "did you mean demo? the recipes are demo, "),
        (
            "armhubert-s100.yaml",
            None,
            "did you mean armhubert-s-100? the recipes are armhubert-s-100, armhubert-s-960, ",
        ),
        ("armhubert", None, "did you mean armhubert-960? the recipes are "),
        ("smokee", None, "did you mean ablations/smoke? the recipes are "),
        ("this_machine", "clusters", "did you mean clusters/this-machine? the recipes are clusters/this-machine, "),
        ("qqq", "clusters", "the recipes are clusters/"),
    ],
)
def test_a_wrong_name_lists_the_recipes_nearest_first(name: str, folder: str | None, start: str) -> None:
    said = other_recipes(Path(name), folder)
    assert said.startswith(start)
    assert all(other in said for other in recipe_names(folder or ""))


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["ablate", "--config", "ablations/smoke", "--list"], "variant"),
        (["ablate", "ablations/smoke", "--list", "corpus=elsewhere"], "variant"),
        (["plan-cluster", "--cluster", "clusters/this-machine", "--hours", "1"], "Measured"),
        (["profile", "demo", "--seconds", "1"], "builtin:phone-hubert"),
    ],
)
def test_commands_take_names(arguments: list[str], shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(application, arguments, env={"COLUMNS": "160"})
    assert done.exit_code == 0 and shown in done.output, done.output
