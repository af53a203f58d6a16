"""The console command ``ray-distill``: ``pipeline/run.py``, which also knows the recipes by their names."""

import runpy
import sys
from pathlib import Path

_PLACES = (Path(__file__).resolve().parents[1] / "recipes", Path(__file__).resolve().parent.parent / "configs")
"""Of the recipes: in an installed package, in the repository."""


def find_recipe(name: str) -> str:
    """The file of a recipe.

    Args:
        name: a file, or a recipe's name, with or without its folder and ending: ``demo``, ``configs/demo.yaml``.

    Returns:
        The path of the file; ``name`` itself where it is a file, or where there is no such recipe.

    Example:
        >>> Path(find_recipe("demo")).name
        'demo.yaml'
    """
    if Path(name).is_file():
        return name
    relative = Path(name).relative_to("configs") if Path(name).parts[:1] == ("configs",) else Path(name)
    for place in _PLACES:
        for file in (place / relative, place / f"{relative}.yaml"):
            if not relative.is_absolute() and file.is_file():
                return str(file)
    return name


def with_recipes(arguments: list[str]) -> list[str]:
    """The arguments with the recipe named by ``--config`` or ``--cluster`` replaced by its file."""
    changed, options = [], ("--config", "--cluster")
    for number, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if number and arguments[number - 1] in options:
            changed.append(find_recipe(argument))
        elif option in options and equals:
            changed.append(f"{option}={find_recipe(value)}")
        else:
            changed.append(argument)
    return changed


def main() -> None:
    """Runs ``pipeline/run.py`` with the command line's arguments."""
    sys.argv[1:] = with_recipes(sys.argv[1:])
    runpy.run_module("ray_distill.pipeline.run", run_name="__main__")
