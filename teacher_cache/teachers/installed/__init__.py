"""Teachers of other packages, which entry points of the group ``ray_distill.teachers`` name.

An entry point ``NAME`` makes ``teacher.checkpoint=NAME:REST`` possible. It is a function ``load(rest: str, device) -> Teacher``. The
teacher is a subclass of `Teacher` with all of its promises. The function decides what ``REST`` means: a path, a size, or nothing.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ray_distill.plugins import Plugin
from ray_distill.teacher_cache.frames import FRAME_RATE, num_frames
from ray_distill.teacher_cache.targets.frame_rate import check_counts
from ray_distill.teacher_cache.teachers.teacher import Teacher, TeacherError

_SECONDS = (1, 10)


@dataclass(frozen=True)
class TeacherPlugin:
    """A teacher of another package, not loaded yet.

    Attributes:
        plugin: The entry point.
        rest: What follows the colon in its specification.
    """

    plugin: Plugin
    rest: str

    def resolved(self) -> str:
        """Return the specification for any process of any node: a path becomes absolute."""
        path = Path(self.rest).expanduser()
        return f"{self.plugin.name}:{path.absolute() if self.rest and path.exists() else self.rest}"

    def load(self, device: str | torch.device) -> Teacher:
        """Import the package and load the teacher.

        Raises:
            PluginError: The package can't be imported, or returns no `Teacher`.
            TeacherError: The teacher has other frames than students have.
            ValueError: The package refuses the rest.
        """
        load = self.plugin.load()
        if not callable(load):
            raise self.plugin.lacks("is no function")
        teacher = self.plugin.run("its loader", lambda: load(self.rest, device))
        if not isinstance(teacher, Teacher):
            raise self.plugin.lacks("returns no ray_distill.teacher_cache.teachers.Teacher")
        check_frames(teacher)
        return teacher


def check_frames(teacher: Teacher) -> None:
    """Raise TeacherError if a teacher without patches does not have the frames that its ``frame_rate`` states."""
    if teacher.patches is not None:
        return
    if teacher.frame_rate != FRAME_RATE:
        samples = np.array([16_000 * seconds for seconds in _SECONDS])
        try:
            check_counts(
                teacher.frame_rate, samples, np.array([teacher.num_frames(count) for count in samples.tolist()])
            )
        except ValueError as error:
            raise TeacherError(f"{teacher.name} states frame_rate {teacher.frame_rate}, and {error}") from error
        return
    for seconds in _SECONDS:
        have, need = teacher.num_frames(16_000 * seconds), num_frames(16_000 * seconds)
        if have != need:
            raise TeacherError(
                f"{teacher.name} has {have} frames in {seconds} s of audio, but students have {need}, one every 20 ms; give "
                "the teacher its frame_rate, if it is not 50"
            )
