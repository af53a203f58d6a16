"""Recipes by name: ``--config demo`` stands for the file ``configs/demo.yaml``, also in an installed package."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray_distill.pipeline.composition.suggestions import by_nearness, nearest, question

_ROOT = Path(__file__).resolve().parents[1]
_FOLDERS = (_ROOT / "recipes", _ROOT / "configs")
"""Folders of the recipes: in an installed package, and in the repository."""

_KINDS = {
    "ablation": ({"variants", "grid"}, "describes an ablation; give it to `ray-distill ablate`"),
    "cluster": ({"node_bytes_per_second"}, "describes a cluster; give it to `ray-distill plan-cluster --cluster`"),
    "run": (
        {"corpus", "teacher", "teachers", "masks", "student"},
        "is the configuration of a run; give it to `ray-distill run`",
    ),
}
"""Kinds of YAML files: keys that only they have, and what is said where another kind is wanted."""


def find_recipe(name: str) -> Path:
    """Return the file of a recipe.

    Args:
        name: Path of a file, or name of a recipe with or without ``configs/`` and ``.yaml``: ``demo``,
            ``configs/demo.yaml``, ``ablations/smoke``.

    Returns:
        Path of the file. If no file and no recipe has this name, ``name`` itself as a path.

    Example:
        >>> find_recipe("demo").name
        'demo.yaml'
    """
    path = Path(name)
    if path.is_file() or path.is_absolute():
        return path
    relative = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    for folder in _FOLDERS:
        for file in (folder / relative, folder / f"{relative}.yaml"):
            if file.is_file():
                return file
    return path


def other_kind(tree: Mapping[str, Any], wanted: str) -> str | None:
    """Return what a YAML file is, and the command for it, if it is not of the kind that is wanted; None if it may be.

    Args:
        tree: The file's sections.
        wanted: ``run``, ``ablation`` or ``cluster``.

    Example:
        >>> other_kind({"base": "demo", "variants": {}}, "run")
        'describes an ablation; give it to `ray-distill ablate`'
    """
    kind = next((kind for kind, (keys, _) in _KINDS.items() if keys & set(tree)), wanted)
    return None if kind == wanted else _KINDS[kind][1]


def recipe_name(path: Path) -> str | None:
    """Return the name of the recipe that a file is; None for other files."""
    for folder in _FOLDERS:
        if path.resolve().is_relative_to(folder):
            return path.resolve().relative_to(folder).with_suffix("").as_posix()
    return None


def recipe_names(folder: str = "") -> list[str]:
    """Return the names of the recipes in a sub-folder of ``configs/``, sorted. Default: in ``configs/`` itself."""
    places = [root / folder for root in _FOLDERS if (root / folder).is_dir()]
    return sorted({(Path(folder) / file.stem).as_posix() for place in places for file in place.glob("*.yaml")})


def other_recipes(name: Path, folder: str | None = None) -> str:
    """Return a list of the recipes for the message about a name that is none of them, nearest first.

    Args:
        name: Name that was given.
        folder: Sub-folder of ``configs/`` whose recipes are listed. Default: ``configs/`` itself and all but ``clusters``.
    """
    names = (
        [name for below in ("", "ablations", "discrete", "pruned", "several") for name in recipe_names(below)]
        if folder is None
        else recipe_names(folder)
    )
    given = name.with_suffix("").as_posix() if name.suffix == ".yaml" else name.as_posix()
    stems = {other.rpartition("/")[2]: other for other in names}
    begun = [name for name in names if name.startswith(given)]
    near = begun or nearest(given, names) or [stems[stem] for stem in nearest(given.rpartition("/")[2], stems)]
    listed = f"the recipes are {', '.join(by_nearness(given, names))}"
    return f"{question(near[:1])} {listed}" if near else listed


def complete_recipe(folder: str = "") -> Callable[[str], list[str]]:
    """Return the shell completion of an option that takes a recipe from a sub-folder of ``configs/``."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in recipe_names(folder) if name.startswith(incomplete)]

    return complete


def recipe_and_changes(config: str | None, words: list[str], example: str) -> tuple[str, list[str]]:
    """Return the recipe, from ``--config`` or the first word without ``=``, and the changes.

    Args:
        config: Value of ``--config``, or None.
        words: Words of the command.
        example: What to give where nothing is, as in ``such as demo``.

    Raises:
        ValueError: No recipe is given, or more than one.
    """
    recipes = [word for word in words if "=" not in word] + ([] if config is None else [config])
    if len(recipes) != 1:
        given = f"not {', '.join(recipes)}" if recipes else example
        raise ValueError(
            f"give one recipe or YAML file, {given}; changes are written KEY=VALUE, such as train.epochs=3"
        )
    return recipes[0], [word for word in words if "=" in word]
