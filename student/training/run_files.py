"""Files and folders in a run's folder that training and loading a student need: their names, and how they are replaced."""

from pathlib import Path

from ray_distill.whole_files import replacing

METRICS = "metrics.jsonl"
"""Rows of metrics, one JSON object per line."""
RESULT = "train.json"
"""Result of a finished training."""
TENSORBOARD = "tensorboard"
"""Folder of TensorBoard's event files."""
TRACKERS = "trackers.json"
"""Run ids at Weights & Biases and MLflow, by tracker."""
RAY = "ray"
"""Folder of Ray Train's own records."""
CHECKPOINTS = "checkpoints"
"""Folder of the training state and of the best students."""
LAST = "last"
"""Folder in CHECKPOINTS with the state from which an interrupted training continues."""
STATE = "state.pt"
"""Training state, in LAST."""
BEST = "best"
"""Link in CHECKPOINTS to the student with the lowest validation loss."""

PRUNING = "pruning"
"""Folder of the first phase of a training that prunes, with the files of a training."""
PRUNED = "student"
"""Folder in PRUNING with the pruned student, from which the second phase starts."""

CONFIG = "config.yaml"
"""Configuration of the run, written by the job."""
TEACHER = "teacher.json"
"""Commit of a teacher on the hub, written by the job, in the run's folder and in its export."""
EXPORT = "export"
"""Folder of the exported student, written by the job."""


def step_folder(step: int) -> str:
    """Return the name of the folder in CHECKPOINTS that holds the student of an optimiser step."""
    return f"step-{step:06d}"


def replace_text(path: Path, text: str) -> None:
    """Replace a file atomically: even after a kill or a power failure it has either the old text or the new text."""
    with replacing(path, durable=True) as temporary:
        temporary.write_text(text)
