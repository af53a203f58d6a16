"""The line about an error in a sentence."""

import pytest

from ray_distill.first_line import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("no route\nto host"), "no route"),
        (ValueError("\n  indented"), "indented"),
        (TimeoutError(), "TimeoutError"),
        (RuntimeError("\n"), "RuntimeError"),
    ],
)
def test_first_line(error: Exception, line: str) -> None:
    assert first_line(error) == line
