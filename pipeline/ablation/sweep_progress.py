"""The progress of an ablation: how many runs are finished, and how far the others are."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ray_distill.pipeline.run_folder import RunFolder
from ray_distill.pipeline.stages import Run
from ray_distill.pipeline.stages.progress import ProgressUpdate
from ray_distill.pipeline.stages.train import training_progress

_SECONDS = 2.0
"""Time between two looks at the metrics of the runs."""


@contextmanager
def shown_runs(shared: Run, folders: Sequence[RunFolder]) -> Iterator[None]:
    """Show the progress of an ablation while the block trains its runs.

    Args:
        shared: Run on whose console it is shown.
        folders: Folders of all runs.
    """
    done, started = threading.Event(), time.time()

    def watch(update: ProgressUpdate) -> None:
        while not done.wait(_SECONDS):
            finished = sum(folder.is_trained for folder in folders)
            update(finished, len(folders), "; ".join(_active(folders, started)))

    with shared.progress("train", "runs") as update:
        watcher = threading.Thread(target=watch, args=(update,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


def _active(folders: Sequence[RunFolder], since: float) -> Iterator[str]:
    """Yield how far each run is that is training now: it has written metrics since a time."""
    for folder in folders:
        if folder.is_trained:
            continue
        try:
            progress = training_progress(folder, since)
        except ValueError as error:  # The run itself is refused with it.
            yield f"{folder.name}: {error}"
            continue
        if progress is not None:
            step, steps, text = progress
            yield f"{folder.name} step {step} of {steps}, {text}"
