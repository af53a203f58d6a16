"""What differs between two configurations, key by key."""

import json
from collections.abc import Iterator
from typing import Any

_SHOWN = 3
_ABSENT = "not set"


def told_differences(recorded: dict[str, Any], given: dict[str, Any]) -> str:
    """Return what differs, such as ``train.seed is 0 there and 9 here``; empty if nothing does. At most three keys are named.

    Args:
        recorded: Configuration of what there is, as plain values.
        given: The configuration that is compared with it.
    """
    found = [f"{key} is {old} there and {new} here" for key, old, new in _differences(recorded, given, "")]
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more


def _differences(recorded: Any, given: Any, key: str) -> Iterator[tuple[str, str, str]]:
    recorded, given = _by_name(recorded), _by_name(given)
    if recorded == given:
        return
    if isinstance(recorded, dict) and isinstance(given, dict):
        for name in [*given, *(name for name in recorded if name not in given)]:
            inner = f"{key}.{name}" if key else str(name)
            yield from _differences(recorded.get(name, _ABSENT), given.get(name, _ABSENT), inner)
        return
    yield key, _text(recorded), _text(given)


def _by_name(value: Any) -> Any:
    """Return a list of named sections, as several teachers are, as a dictionary; anything else as it is."""
    if isinstance(value, list) and value and all(isinstance(entry, dict) and "name" in entry for entry in value):
        return {entry["name"]: entry for entry in value}
    return value


def _text(value: Any) -> str:
    text = value if value == _ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
