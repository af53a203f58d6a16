"""Students on disk: a folder of model.safetensors and config.json; the published ``.ckpt`` can be read too."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ray_distill.student.model.student import Student
from ray_distill.student.model.student_config import StudentConfig

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def save_student(student: Student, folder: Path, metadata: dict[str, Any] | None = None) -> None:
    """Writes a student's weights and configuration into a folder (made if need be).

    Args:
        student: to save.
        folder: gets ``model.safetensors`` and ``config.json``.
        metadata: JSON values kept beside the configuration, such as the step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {"student": student.config.model_dump(mode="json"), "metadata": metadata or {}}
    temporary = folder / f".{CONFIG}.tmp"
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    weights = folder / f".{WEIGHTS}.tmp"
    # Written by hand: safetensors' own save_file lets nobody but the owner read, and a service may be another user.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in student.state_dict().items()}
    weights.write_bytes(save(tensors))
    weights.replace(folder / WEIGHTS)
    temporary.replace(folder / CONFIG)


def load_student(checkpoint: Path | str, config: Path | str | None = None) -> Student:
    """Loads a student, in eval mode, on the CPU.

    Args:
        checkpoint: a folder of `save_student`, its ``.safetensors`` file, or a published Lightning ``.ckpt``.
        config: our JSON, or the published yaml (needed with a ``.ckpt``); default ``config.json`` beside the weights.

    Raises:
        ValueError: what is missing, damaged or doesn't fit, in one sentence.
    """
    path = Path(checkpoint)
    if path.suffix == ".ckpt":
        from ray_distill.student.published import load_published

        if config is None:
            raise ValueError(f"{path} is a published checkpoint; its yaml must be given as config")
        return load_published(path, Path(config))
    weights = path / WEIGHTS if path.is_dir() else path
    described = Path(config) if config is not None else weights.with_name(CONFIG)
    for needed in (weights, described):
        if not needed.is_file():
            raise ValueError(f"{path} is not a student: there is no {needed}")
    try:
        student = Student(StudentConfig.model_validate(json.loads(described.read_text())["student"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{described} does not describe a student ({' '.join(str(error).split())})") from error
    fill(student, load_tensors(weights), weights)
    return student.eval()


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; ValueError where it is none."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file ({error})") from error
    return tensors


def fill(student: Student, tensors: Mapping[str, Any], origin: Path, *, whole: bool = True) -> None:
    """Puts named tensors into a student; ValueError names the first that is missing, unexpected or of another shape.

    With ``whole`` False tensors may be missing.
    """
    expected = student.state_dict()
    for name in sorted(expected.keys() ^ tensors.keys() if whole else tensors.keys() - expected.keys()):
        what = "lacks" if name in expected else "has an unexpected"
        raise ValueError(f"{origin} does not fit its configuration: it {what} tensor {name!r}")
    for name, found in tensors.items():
        tensor = expected[name]
        if not isinstance(found, Tensor) or found.shape != tensor.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise ValueError(f"{origin} does not fit its configuration: {name!r} is {shape}, not {tuple(tensor.shape)}")
    student.load_state_dict(tensors, strict=whole)
