"""A loss that consists of those of other objectives on one student."""

from collections.abc import Sequence
from typing import Self

from ray_distill.student.model.student import Student
from ray_distill.student.objectives.objective import Distiller
from ray_distill.student.training.spec_augment import SpecAugment


class CompositeDistiller(Distiller):
    """A student and several losses. The predictors of the parts are trained with it.

    Args:
        student: The student.
        parts: Distillers of the parts, with this student.
        spec_augment: Augmentation of the student's features in training mode. None disables it.
    """

    def __init__(self, student: Student, parts: Sequence[Distiller], spec_augment: SpecAugment | None) -> None:
        super().__init__(student, spec_augment=spec_augment)
        # Not a ModuleList, in which the student would appear once more for each part.
        self.parts = tuple(parts)
        self.predictors.extend(part.predictors for part in parts)
        self._step = 0

    def set_progress(self, epoch: int, step: int) -> None:
        """See `Distiller.set_progress`."""
        self._step = step
        for part in self.parts:
            part.set_progress(epoch, step)

    def with_student(self, student: Student) -> Self:
        """See `Distiller.with_student`."""
        other = super().with_student(student)
        other.parts = tuple(part.with_student(student) for part in self.parts)
        return other
