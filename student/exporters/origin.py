"""Origin of an exported student: the record that each export contains."""

from typing import Any

Origin = dict[str, Any]
"""JSON values by name; see `describe`."""


def describe(origin: Origin) -> list[str]:
    """Return readable lines with the known facts.

    Args:
        origin: Any of ``run``, ``teacher``, ``teacher_source`` (on the hub), ``teachers`` (several, each with ``name``, ``teacher``,
            ``teacher_source`` and ``objective``), ``corpus_hours``,
            ``targets``, ``loss``, ``cache_fingerprint``, ``commit``,
            ``features`` (of the export), ``metrics`` (numbers by name) and ``configuration`` (of the run).
    """
    names = {
        "run": "run",
        "teacher": "teacher",
        "teacher_source": "teacher on the hub",
        "corpus_hours": "hours of training and validation audio",
        "targets": "targets",
        "loss": "loss",
        "cache_fingerprint": "fingerprint of the teacher cache",
        "commit": "commit of the exporting program",
        "features": "features",
    }
    lines = [f"{text}: {_text(origin[name])}" for name, text in names.items() if origin.get(name) is not None]
    for one in origin.get("teachers") or ():
        learnt = f", objective {one['objective']}" if one.get("objective") else ""
        lines.append(f"teacher {one['name']}: {one['teacher']} ({one['teacher_source']}){learnt}")
    return lines + [f"{name}: {value:.6g}" for name, value in (origin.get("metrics") or {}).items()]


def _text(value: Any) -> str:
    """Return a value as text, a table such as the fingerprints of several caches as ``NAME VALUE, NAME VALUE``."""
    return ", ".join(f"{name} {one}" for name, one in value.items()) if isinstance(value, dict) else str(value)
