"""The resolved configuration of a run as YAML, with where each value comes from."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from ray_distill.pipeline.composition.config_tree import ConfigTree, compose
from ray_distill.pipeline.config import Config, check_config, last_head
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
    of_entries = _sources_of_entries(composed)

    def source_of(key: str) -> str | None:
        return of_entries.get(key) if key.startswith("teachers.") else composed.source_of(key)

    lines += _lines(tree, source_of, "", 0)
    return "\n".join(lines) + "\n"


def _student(config: Config) -> dict[str, Any]:
    """Return all keys of the student; those that it takes from the teacher are ``teacher`` unless they are given."""
    predictions = "split_heads" if config.student.get("heads") == "split" else "encoder_layers"
    of_teacher = {predictions, "target_dim", "patches"}
    defaults = StudentConfig().model_dump(mode="json")
    if (last := last_head(config.student)) is not None:
        of_teacher.discard("encoder_layers")
        defaults["encoder_layers"] = last
    return {
        name: config.student.get(name, "teacher" if name in of_teacher else default)
        for name, default in defaults.items()
    }


def _sources_of_entries(composed: ConfigTree) -> dict[str, str]:
    """Return where the values of several teachers come from, by keys such as ``teachers.NAME.cache.codec``."""
    found: dict[str, str] = {}
    common = composed.tree.get("cache") or {}
    for entry in composed.tree.get("teachers") or ():
        prefix = f"teachers.{entry['name']}"
        found |= {f"{prefix}.cache.{key}": composed.source_of(f"cache.{key}") or "default" for key in common}
        cache = entry.get("cache", {})
        for key in [*entry, *(f"cache.{key}" for key in (cache if isinstance(cache, dict) else ["path"]))]:
            found[f"{prefix}.{key}"] = composed.source_of(f"{prefix}.{key}") or "default"
        objective = entry.get("objective")
        for key in objective if isinstance(objective, dict) else ["objective"] if objective else []:
            found[f"{prefix}.objective.{key}"] = composed.source_of(f"{prefix}.objective.{key}") or "default"
    return found


def _lines(tree: dict[str, Any], source_of: Callable[[str], str | None], prefix: str, depth: int) -> Iterator[str]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        indent = "  " * depth
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:"
            yield from _lines(value, source_of, f"{key}.", depth + 1)
            continue
        if key == "teachers":
            yield "teachers:"
            for entry in value:
                lines = _lines({"name": entry["name"]} | entry, source_of, f"teachers.{entry['name']}.", 2)
                for number, line in enumerate(lines):
                    yield f"  - {line[4:]}" if number == 0 else line
            continue
        text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
        text = text.removesuffix("...\n").strip()
        yield f"{indent}{name}: {text}".ljust(_COLUMN) + f"  # {source_of(key) or 'default'}"
