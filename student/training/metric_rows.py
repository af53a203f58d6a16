"""Reading of ``metrics.jsonl``."""

import json
from pathlib import Path
from typing import Any

_NUMBERS = {
    "train": ("step", "loss"),
    "validation": ("step", "loss"),
    "skipped": ("step",),
    "resumed": ("step",),
    "batch": ("step", "batch_seconds", "peak_bytes", "limit_bytes"),
}
"""Fields that are numbers in every row of a kind."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics, without a last row that a kill or a write in progress cut off.

    Returns:
        The rows; none if the file does not exist.

    Raises:
        ValueError: A row is damaged; the message names the file and the line.
    """
    return [_read_row(path, number, line) for number, line in enumerate(_complete_lines(path), 1)]


def read_last_train_row(path: Path) -> dict[str, Any] | None:
    """Return the last training row, or None if there is none yet. Rows before it are not parsed, since progress asks each second.

    Raises:
        ValueError: That row, or one after it, is damaged; the message names the file and the line.
    """
    lines = _complete_lines(path)
    rows = (_read_row(path, number, lines[number - 1]) for number in range(len(lines), 0, -1))
    return next((row for row in rows if row["kind"] == "train"), None)


def _complete_lines(path: Path) -> list[bytes]:
    # Each complete row ends with a line end.
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def _read_row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:  # JSONDecodeError and UnicodeDecodeError
        row = None
    kind = row.get("kind") if isinstance(row, dict) else None
    if kind not in _NUMBERS or not all(isinstance(row.get(name), (int, float)) for name in _NUMBERS[kind]):
        raise ValueError(
            f"{path} is damaged in line {number}, which is not a row of metrics; restore the file from a copy, or remove that line"
        )
    checked: dict[str, Any] = row
    return checked
