"""The two phases of a training that prunes: with gates, and then on without what they closed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ray_distill.student.checkpoints import WEIGHTS, load_student
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.training import run_files
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.target_source import TargetSource
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.train_state import TrainResult, saved_batch_seconds
from ray_distill.student.training.training_loop import train
from ray_distill.teacher_cache.targets.target_batch import TargetReader


def train_in_phases(
    config: StudentConfig,
    settings: TrainSettings,
    train_reader: TargetReader,
    validation_reader: TargetReader,
    folder: Path,
    *,
    rank: Rank = Rank(),
    initial: Path | None = None,
    wrap: Callable[[nn.Module], nn.Module] = lambda distiller: distiller,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    on_validation: Callable[[dict[str, Any]], None] = lambda row: None,
    source: TargetSource | None = None,
) -> TrainResult:
    """Train as `train` does, and with ``settings.prune`` in two phases, each of which continues from its last checkpoint.

    The first phase is a training of its own in ``folder/pruning``, and leaves the pruned student in ``folder/pruning/student``. The
    second starts from it, and is a training as any other in ``folder``. With ``batch_seconds`` auto, the first one measures for both.

    For the arguments see `train`. ``on_row`` gets the rows of both phases.

    Raises:
        ValueError: As `train`; or the student can't be pruned to the sparsity.
        FloatingPointError, OSError: As `train`.
    """
    common: dict[str, Any] = {
        "rank": rank,
        "wrap": wrap,
        "on_row": on_row,
        "on_validation": on_validation,
        "source": source,
    }
    if settings.prune is None:
        return train(config, settings, train_reader, validation_reader, folder, initial=initial, **common)
    first = folder / run_files.PRUNING
    if not (first / run_files.RESULT).is_file():
        train(config, settings.pruning_phase(), train_reader, validation_reader, first, initial=initial, **common)
        rank.gather(None)  # Rank 0 has written the pruned student.
    pruned = first / run_files.PRUNED
    changes: dict[str, Any] = {"prune": None}
    if settings.batch_seconds == "auto":
        changes["batch_seconds"] = saved_batch_seconds(first)
    config, settings = load_student(pruned).config, settings.model_copy(update=changes)
    return train(config, settings, train_reader, validation_reader, folder, initial=pruned / WEIGHTS, **common)
