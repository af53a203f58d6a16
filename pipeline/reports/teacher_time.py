"""Teacher hours that an ablation saved by training from a cache."""

from collections.abc import Sequence

from ray_distill.pipeline.ablation.definition import Ablation
from ray_distill.pipeline.ray_session import counted
from ray_distill.pipeline.reports.ablation_results import RunResult
from ray_distill.student.training.prefetch import TrainingPlan
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.storage.build_statistics import TeacherTime, total_teacher_time
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.shard_plan import Utterances
from ray_distill.teacher_cache.storage.store import Store


def teacher_hours(
    time: TeacherTime, train_seconds: float, clean_passes: float, masked_passes: float
) -> tuple[float, float] | None:
    """Return the teacher hours of training with the teacher in the loop, and those of building the cache.

    Args:
        time: Teacher time recorded while the cache was built.
        train_seconds: Seconds of audio in the training split.
        clean_passes, masked_passes: Passes over that split in the epochs of all runs together.

    Returns:
        None if a needed pass was not recorded: by an earlier version, or because every build was killed.
    """
    clean, masked = time.clean.rate, time.masked.rate
    if (clean_passes and clean is None) or (masked_passes and masked is None):
        return None
    online = (clean_passes * (clean or 0.0) + masked_passes * (masked or 0.0)) * train_seconds
    return online / 3600, time.seconds / 3600


def teacher_time_sentences(ablation: Ablation, results: Sequence[RunResult]) -> str:
    """Return sentences about the teacher hours saved and how they are computed, for several teachers about each.

    Nothing is said about a cache that does not exist.
    """
    found = [_sentences_of_teacher(ablation, results, number) for number in range(len(ablation.needs.parts))]
    names = [f"Teacher {entry.name}: " for entry in ablation.needs.teachers] or [""]
    return " ".join(f"{name}{text}" for name, text in zip(names, found, strict=True) if text)


def _sentences_of_teacher(ablation: Ablation, results: Sequence[RunResult], number: int) -> str:
    """Return the sentences about one teacher of `Config.parts`."""
    store = Store(ablation.needs.parts[number].cache.location)
    if not Cache.exists(store):
        return ""
    cache = Cache.open(store)
    samples = Utterances(cache.plan).of_split("train").num_samples
    clean_passes = masked_passes = 0.0
    finished = 0
    for planned, result in zip(ablation.runs, results, strict=True):
        if result.training is not None:
            finished += 1
            passes = TrainingPlan(samples, planned.config.train, planned.config.train.workers).passes
            targets = planned.config.parts[number].cache.targets if planned.config.masks.draws else "clean_only"
            clean_passes += passes * (targets != "masked_everywhere")
            masked_passes += passes * (targets != "clean_only")
    seconds = float(samples.sum()) / SAMPLE_RATE
    time = total_teacher_time(store)
    hours = teacher_hours(time, seconds, clean_passes, masked_passes)
    if hours is None:
        return "The teacher time saved is unknown, because the teacher's time was not fully recorded while this cache was built."
    online, built = hours
    rates = f"{time.clean.rate:.3g} teacher seconds per second of audio for a clean pass"
    rates += f" and {time.masked.rate:.3g} for a masked pass" if time.masked.rate is not None else ""
    outcome = "saved" if online > built else "spent, not saved"
    return (
        f"Teacher time {outcome}: {_duration(abs(online - built))}. With the teacher in the loop, "
        f"{counted(finished, 'finished run')} would have needed {_duration(online)}: {clean_passes:.1f} clean passes and "
        f"{masked_passes:.1f} masked passes over {_duration(seconds / 3600)} of audio, at {rates}. "
        "These rates were measured while the cache was built. "
        f"Building the cache took {_duration(built)} of teacher time."
    )


def _duration(hours: float) -> str:
    return f"{hours:.2f} h" if hours >= 0.1 else f"{60 * hours:.1f} min"
