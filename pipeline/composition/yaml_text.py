"""YAML in which a key that is given twice is an error; PyYAML alone keeps the last value and drops the others."""

from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Safe loader that refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value} is given twice; keep one of them", problem_mark=key.start_mark
                )
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """Return the value of a YAML text, without running code.

    Raises:
        ValueError: It is not valid YAML, or a table gives a key twice. The message is one line, and names the place.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        message = " ".join(str(error).split()).replace('in "<unicode string>", ', "at ")
        tab = "; indent with spaces, not with tabs" if r"character '\t'" in message else ""
        raise ValueError(message + tab) from error


def read_yaml(path: Path) -> Any:
    """Return the value of a YAML file, as `load_yaml`.

    Raises:
        ValueError: It is not UTF-8, or not valid YAML. The message begins with the path.
    """
    try:
        return load_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
