"""The resolved configuration of a run as YAML, with where each value comes from."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from ray_distill.pipeline.composition.config_tree import ConfigTree, compose
from ray_distill.pipeline.config import Config, check_config
from ray_distill.student.model.student_config import StudentConfig

_COLUMN = 48


def config_with_origins(path: Path, overrides: Sequence[str] = ()) -> str:
    """Return the resolved configuration as YAML that can be used as a configuration again.

    Args:
        path: YAML file.
        overrides: Changes of the form ``section.key=value``. Default: none.

    Returns:
        One line for each value, with a comment that names the file, ``command line`` or ``default``, after one comment for each
        note of `ConfigTree`.

    Raises:
        ConfigError: As for `load_config`.
    """
    composed = compose(path, overrides)
    config = check_config(composed.tree)
    lines = [f"# {note}" for note in composed.notes]
    tree = config.model_dump(mode="json") | {"student": _student(config)}
    lines += _lines(tree, composed, "", 0)
    return "\n".join(lines) + "\n"


def _student(config: Config) -> dict[str, Any]:
    """Return all keys of the student; those that it takes from the teacher are ``teacher`` unless they are given."""
    predictions = "split_heads" if config.student.get("heads") == "split" else "encoder_layers"
    of_teacher = (predictions, "target_dim", "patches")
    defaults = StudentConfig().model_dump(mode="json")
    return {
        name: config.student.get(name, "teacher" if name in of_teacher else default)
        for name, default in defaults.items()
    }


def _lines(tree: dict[str, Any], composed: ConfigTree, prefix: str, depth: int) -> Iterator[str]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        indent = "  " * depth
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:"
            yield from _lines(value, composed, f"{key}.", depth + 1)
            continue
        text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
        text = text.removesuffix("...\n").strip()
        yield f"{indent}{name}: {text}".ljust(_COLUMN) + f"  # {composed.source_of(key) or 'default'}"
