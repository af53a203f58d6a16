"""Trained teachers that are part of the package: Hugging Face folders beside this file, which are loaded by name."""

from pathlib import Path

import torch

from ray_distill.teacher_cache.teachers.huggingface import load_huggingface
from ray_distill.teacher_cache.teachers.huggingface_folder import HuggingFaceFolder
from ray_distill.teacher_cache.teachers.teacher import TeacherError
from ray_distill.teacher_cache.teachers.wav2vec2 import Wav2Vec2Teacher

_FOLDER = Path(__file__).parent


def builtin_names() -> list[str]:
    """Return the sorted names of the teachers in the package."""
    return sorted(path.parent.name for path in _FOLDER.glob("*/config.json"))


def builtin_folder(name: str) -> Path:
    """Return the Hugging Face folder of a teacher in the package. Its README.md is the model card.

    Raises:
        TeacherError: If there is no teacher of this name.
    """
    if name not in builtin_names():
        raise TeacherError(f"there is no built-in teacher {name!r}; these are: {', '.join(builtin_names())}")
    return _FOLDER / name


def load_builtin(name: str, device: str | torch.device) -> Wav2Vec2Teacher:
    """Load a teacher of the package.

    Args:
        name: One of `builtin_names`, such as ``phone-hubert``.
        device: Device on which the teacher computes.

    Raises:
        TeacherError: If there is no teacher of this name.
    """
    teacher = load_huggingface(HuggingFaceFolder(builtin_folder(name)), device)
    teacher.name = f"builtin:{name}"
    return teacher
