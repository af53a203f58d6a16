"""Students on disk: a folder with model.safetensors and config.json, or a published ``.ckpt``."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save

from ray_distill.student.model.student import Student
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.published import load_published
from ray_distill.student.training import run_files
from ray_distill.student.weights import load_tensors, load_weights

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def save_student(student: Student, folder: Path, metadata: dict[str, Any] | None = None) -> None:
    """Save a student's weights and configuration.

    Args:
        student: the student to save.
        folder: receives ``model.safetensors`` and ``config.json``; created if missing.
        metadata: JSON values stored beside the configuration, such as the step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {"student": student.config.model_dump(mode="json"), "metadata": metadata or {}}
    temporary = folder / f".{CONFIG}.tmp"
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    weights = folder / f".{WEIGHTS}.tmp"
    # safetensors' save_file creates files that only their owner can read, but a service may run as another user.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in student.state_dict().items()}
    weights.write_bytes(save(tensors))
    weights.replace(folder / WEIGHTS)
    temporary.replace(folder / CONFIG)


def load_student(model: Path | str, config: Path | str | None = None) -> Student:
    """Load a student in eval mode on the CPU.

    Args:
        model: a run's folder (its exported student is loaded), a folder written by `save_student` (an export or a
            checkpoint), the ``.safetensors`` file in one, or a published Lightning ``.ckpt``.
        config: path of our ``config.json``, or of the published yaml, which a ``.ckpt`` needs. Default: ``config.json``
            beside the weights.

    Raises:
        ValueError: a file is missing, damaged, or does not fit the configuration.

    Example:
        >>> student = load_student("runs/demo")
        >>> hidden_states = student(torch.randn(1, 16_000)).hidden_states
    """
    path = student_folder(Path(model))
    if path.suffix == ".ckpt":
        if config is None:
            raise ValueError(f"{path} is a published checkpoint; give the path of its yaml as config")
        return load_published(path, Path(config))
    weights = path / WEIGHTS if path.is_dir() else path
    described = Path(config) if config is not None else weights.with_name(CONFIG)
    for needed in (weights, described):
        if not needed.is_file():
            raise ValueError(f"{path} is not a student: the file {needed} is missing")
    try:
        student = Student(StudentConfig.model_validate(json.loads(described.read_text())["student"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{described} does not describe a student ({' '.join(str(error).split())})") from error
    load_weights(student, load_tensors(weights), weights)
    return student.eval()


def student_folder(model: Path) -> Path:
    """Return where a student is stored: a run's exported student, or the path itself if it is not a run's folder.

    Raises:
        ValueError: the run has no exported student.
    """
    if not (model / run_files.CONFIG).is_file() or (model / CONFIG).is_file():
        return model
    if not (model / run_files.EXPORT).is_dir():
        raise ValueError(
            f"the run {model} has no exported student; run its export stage first, or give the folder of one of its checkpoints"
        )
    return model / run_files.EXPORT
