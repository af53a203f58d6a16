"""The export stage: copy the best student to where the service finds it."""

import shutil
from pathlib import Path

from ray_distill.pipeline.config import ConfigError
from ray_distill.pipeline.stages.run import Run
from ray_distill.student import load_student
from ray_distill.whole_files import replacing


def export_best(run: Run) -> None:
    """Copy the student with the lowest validation loss to the run's export folder, unless that is up to date.

    Raises:
        ConfigError: The training is not finished.
        ValueError: The student is damaged.
    """
    if not run.folder.is_trained:
        raise ConfigError(f"the run {run.config.name} has no finished training to export; run the train stage first")
    best, export = run.folder.best, run.folder.export
    if _has_copy(export, best):
        run.say(f"export  {export} is up to date")
        return
    with replacing(export) as temporary:
        temporary.mkdir()
        # The export may be moved, and then still names the commits of its teachers.
        for file in (*best.iterdir(), *run.folder.teacher_files):
            shutil.copy(file, temporary)
        load_student(temporary)
    run.say(f"export  {export}")


def _has_copy(folder: Path, source: Path) -> bool:
    """Return whether a folder has the same files as another."""
    return all(
        (folder / path.name).is_file() and (folder / path.name).read_bytes() == path.read_bytes()
        for path in source.iterdir()
    )
