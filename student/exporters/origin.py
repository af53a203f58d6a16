"""What every export says of where it comes from."""

from typing import Any

Origin = dict[str, Any]
"""JSON values; see `describe`."""


def describe(origin: Origin) -> list[str]:
    """Its lines for people, of what is known.

    Args:
        origin: ``run``, ``teacher``, ``corpus_hours``, ``targets``, ``loss``, ``cache_fingerprint``, ``commit``, ``metrics``
            (name to number), ``configuration`` (the run's), each where known.
    """
    names = {
        "run": "run",
        "teacher": "teacher",
        "corpus_hours": "hours of training and validation audio",
        "targets": "targets",
        "loss": "loss",
        "cache_fingerprint": "fingerprint of the teacher cache",
        "commit": "commit of the program that exported it",
    }
    lines = [f"{text}: {origin[name]}" for name, text in names.items() if origin.get(name) is not None]
    return lines + [f"{name}: {value:.6g}" for name, value in (origin.get("metrics") or {}).items()]
