"""The quality gate of ensembles: a short distillation of two teachers teaches the student both, and a break of one of them is noticed.

The ensemble is the built-in teacher and a student of it that is trained here; see `benchmarks.teacher.ensemble`, which has the checks
and their bounds. Its results say how far the bounds are from what seeds give.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.teacher.ensemble import (
    BEYOND_SPECTRUM,
    BEYOND_UNTRAINED,
    LONG,
    LONG_STEPS,
    SHORT,
    SHORT_STEPS,
    Ensemble,
)
from ray_distill.student.objectives.several_teachers import LossBalance, SeveralTeachers
from ray_distill.teacher_cache.targets.target_batch import Batch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Ensemble:
    return Ensemble(tmp_path_factory.mktemp("ensemble"))


def test_student_learns_both_teachers(ensemble: Ensemble, tmp_path: Path) -> None:
    learnt = ensemble.distil(tmp_path, LONG_STEPS)
    learnt.check(LONG)
    errors = ensemble.phone_errors(learnt.student)
    assert errors["student"] < errors["log-mel"] - BEYOND_SPECTRUM
    assert errors["student"] < errors["untrained"] - BEYOND_UNTRAINED


def _exchanged_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The student's own heads predict the second teacher, and the heads beside it the first."""
    monkeypatch.setattr(SeveralTeachers, "owner", property(lambda self: 1))


def _changed_targets(change: Callable[[Tensor], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """The second teacher's targets (B, L, T, D) are changed."""

    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        of_teacher = Batch.of_teacher

        def changed(self: Batch, number: int) -> Batch:
            batch = of_teacher(self, number)
            return replace(batch, coded=change(batch.targets)) if number == 1 else batch

        monkeypatch.setattr(Batch, "of_teacher", changed)

    return apply


class _Earlier:
    """Gives each batch the targets of the batch before it, repeated or cut to its shape."""

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def __call__(self, targets: Tensor) -> Tensor:
        last = targets if self.last is None else self.last
        self.last = targets
        rows, frames = (torch.arange(targets.shape[n]) % last.shape[n] for n in (0, 2))
        return last[rows][:, :, frames]


def _changed_loss(factor: float) -> Callable[[pytest.MonkeyPatch], None]:
    """The second teacher's balanced loss is multiplied."""

    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        forward = LossBalance.forward

        def changed(self: LossBalance, teacher: int, loss: Tensor, share: Tensor) -> Tensor:
            return forward(self, teacher, loss, share) * (factor if teacher == 1 else 1.0)

        monkeypatch.setattr(LossBalance, "forward", changed)

    return apply


BREAKS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "nothing": lambda monkeypatch: None,
    "heads of the teachers exchanged": _exchanged_heads,
    "second teacher's targets one frame late": _changed_targets(lambda x: x.roll(1, 2)),
    "second teacher's targets of other utterances": _changed_targets(_Earlier()),
    "wrong sign of the second teacher's loss": _changed_loss(-1.0),
    "balance of the second teacher is zero": _changed_loss(0.0),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_break_is_noticed(broken: str, ensemble: Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of `test_student_learns_both_teachers`, with bounds for fewer steps, pass without a break and fail with each."""
    BREAKS[broken](monkeypatch)
    try:
        ensemble.distil(tmp_path, SHORT_STEPS).check(SHORT)
    except (AssertionError, FloatingPointError):
        assert broken != "nothing"
    else:
        assert broken == "nothing", "the quality gate did not notice the break"
