"""The demo's table of phone errors."""

import pytest
from rich.console import Console

from ray_distill.pipeline.demo.phone_probe import SOURCES, conclusion, phone_table
from ray_distill.pipeline.probing.linear_probe import Outcome


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ((0.5, 0.8, 0.3, 0.1), "gave the student 50% of the teacher's advantage over the spectrum"),
        ((0.5, 0.8, 0.6, 0.1), "gave the student -25% of the teacher's advantage"),
        ((0.5, 0.8, 0.4, 0.6), "no advantage over the spectrum"),
    ],
)
def test_the_table_says_what_the_student_learned(errors: tuple[float, ...], expected: str) -> None:
    outcomes = [
        Outcome(name, "frame error rate", error, error - 0.02, error + 0.03, None, [1.0], 0.0)
        for name, error in zip(SOURCES, errors, strict=True)
    ]
    console = Console(width=100)
    with console.capture() as captured:
        console.print(phone_table(outcomes))
    shown = captured.get()
    assert expected in conclusion(outcomes)
    for name, error in zip(SOURCES, errors, strict=True):
        [line] = [line for line in shown.splitlines() if f" {name} " in line]
        assert f"{error:.1%}" in line and f"{error - 0.02:.1%} to {error + 0.03:.1%}" in line
