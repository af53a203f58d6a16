"""Whether the frames of a run's teachers can become those of its student."""

import numpy as np

from ray_distill.pipeline.config import ConfigError
from ray_distill.pipeline.stages.run import Run, TeacherRun
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.teacher_cache.codecs import is_discrete
from ray_distill.teacher_cache.frames import FRAME_RATE, SAMPLE_RATE, num_frames
from ray_distill.teacher_cache.targets.frame_rate import check_masked, check_rule
from ray_distill.teacher_cache.teachers import Teacher


def check_frame_rates(run: Run) -> None:
    """Check the frames of the teachers.

    Raises:
        ConfigError: A rule is given for a teacher whose frames are the student's. The frames of a teacher can't be averaged, or
            can't have exact masked targets. Or one of several teachers has patches of a spectrogram that another lacks.
    """
    for part in run.parts:
        teacher, config = part.teacher, part.config
        if teacher.stated_rate is None:
            if config.teacher.frames is not None:
                with part.named():
                    raise ConfigError(
                        f"teacher.frames {config.teacher.frames} does nothing: {teacher.name} has {_own_frames(teacher)}; remove it"
                    )
            continue
        cached = config.train.targets == "cached"
        with part.named():
            try:
                check_rule(
                    teacher.frame_rate, config.teacher.frames, discrete=cached and is_discrete(config.cache.codec)
                )
            except ValueError as error:
                raise ConfigError(f"teacher.{error}") from error
            if config.masks.draws and config.cache.targets != "clean_only":
                try:
                    check_masked(teacher.name, teacher.frame_rate)
                except ValueError as error:
                    raise ConfigError(f"masks.draws: {error}") from error
    first, *others = run.parts
    for part in others:
        assert isinstance(part, TeacherRun)
        for samples in (SAMPLE_RATE, 10 * SAMPLE_RATE):
            counts = [_student_frames(one.teacher, samples) for one in (first, part)]
            if counts[0] != counts[1]:
                raise ConfigError(
                    f"teachers.{part.name}: {part.teacher.name} has {counts[1]} {_unit(part.teacher)} in {samples // SAMPLE_RATE} s "
                    f"of audio, but {first.teacher.name} has {counts[0]} {_unit(first.teacher)}; patches of a spectrogram are not "
                    "mapped to frames, so either all teachers of a run have the same patches, or none has patches"
                )


def check_student_frames(student: StudentConfig, teacher: Teacher) -> None:
    """Check that the student makes the frames that the targets have, which depends on no utterance.

    Raises:
        ValueError: It makes others.
    """
    samples = [SAMPLE_RATE, 10 * SAMPLE_RATE]
    student.check_frames(np.array(samples), np.array([_student_frames(teacher, count) for count in samples]))


def _student_frames(teacher: Teacher, samples: int) -> int:
    return teacher.num_frames(samples) if teacher.patches is not None else num_frames(samples)


def _own_frames(teacher: Teacher) -> str:
    return (
        f"{FRAME_RATE} frames per second, as the student"
        if teacher.patches is None
        else "patches, which are not mapped"
    )


def _unit(teacher: Teacher) -> str:
    return f"frames at {FRAME_RATE} per second" if teacher.patches is None else "patches"
