"""The export stage: copy the best student to where the service finds it."""

import shutil
from pathlib import Path

from ray_distill.pipeline.config import ConfigError
from ray_distill.pipeline.stages.run import Run
from ray_distill.student import load_student
from ray_distill.whole_files import replacing


def require_training(run: Run) -> None:
    """Raise ConfigError if the training is not finished."""
    if not run.folder.is_trained:
        raise ConfigError(f"the run {run.config.name} has no finished training to export; run the train stage first")


def export_best(run: Run) -> None:
    """Copy the student with the lowest validation loss to the run's export folder, unless that is up to date, or the checkpoints were
    removed since.

    Raises:
        ConfigError: The training is not finished.
        ValueError: The checkpoint is missing or damaged.
    """
    require_training(run)
    best, export = run.folder.best, run.folder.export
    if not best.is_dir() and export.is_dir():
        run.say(f"export  {export} is kept; the checkpoint that it was made from, {best}, is no longer there")
        return
    if not best.is_dir():
        raise ValueError(
            f"the checkpoint {best}, from which the student would be exported, is missing; restore it from a copy, or remove "
            f"{run.folder.path} to train again"
        )
    if _has_copy(export, best):
        run.say(f"export  {export} is up to date")
        return
    load_student(best)  # If it is damaged, the message names it.
    with replacing(export) as temporary:
        temporary.mkdir()
        # The export may be moved, and then still names the commits of its teachers.
        for file in (*best.iterdir(), *run.folder.teacher_files):
            shutil.copy(file, temporary)
    run.say(f"export  {export}")


def _has_copy(folder: Path, source: Path) -> bool:
    """Return whether a folder has the same files as another."""
    return all(
        (folder / path.name).is_file() and (folder / path.name).read_bytes() == path.read_bytes()
        for path in source.iterdir()
    )
