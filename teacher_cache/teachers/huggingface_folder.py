"""A Hugging Face folder (config.json, model.safetensors, preprocessor_config.json), read without transformers."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.teachers.teacher import TeacherError


class HuggingFaceFolder:
    """A folder written by transformers' ``save_pretrained``. TeacherError is raised if a file is missing or damaged.

    Args:
        path: Path of the folder.

    Attributes:
        path: Path of the folder.
        name: Last part of the path, for messages.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of config.json."""
        return _read_json(self.path / "config.json")

    @property
    def model_type(self) -> str:
        """``model_type`` in config.json, such as ``hubert``."""
        return str(self.config.get("model_type"))

    @cached_property
    def preprocessor(self) -> dict[str, Any] | None:
        """Content of preprocessor_config.json, or None if there is no such file. Its sampling rate must be 16 kHz."""
        path = self.path / "preprocessor_config.json"
        if not path.exists():
            return None
        content = _read_json(path)
        if (rate := content.get("sampling_rate", SAMPLE_RATE)) != SAMPLE_RATE:
            raise TeacherError(
                f"{path} has sampling_rate = {rate!r}, but teachers must take {SAMPLE_RATE} Hz; use a model that was trained on "
                "such audio"
            )
        return content

    def weights(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
        path = self.path / "model.safetensors"
        if not path.is_file():
            raise TeacherError(f"{path} is missing; a Hugging Face folder must have its weights in this file")
        try:
            state: dict[str, Tensor] = load_file(path)
        except (SafetensorError, OSError) as error:
            raise TeacherError(f"{path} is not a readable safetensors file: {error}") from error
        return state

    def require(self, allowed: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise TeacherError if a setting in config.json has a value that is not allowed.

        Args:
            allowed: Allowed values by setting. A setting that config.json does not have is not checked.
        """
        for key, values in allowed.items():
            if key in self.config and self.config[key] not in values:
                raise TeacherError(
                    f"{self.name} has {key} = {self.config[key]!r}, but only {' or '.join(map(repr, values))} is supported"
                )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TeacherError(f"{path} is missing; a Hugging Face folder must have it") from None
    except (OSError, ValueError) as error:
        raise TeacherError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise TeacherError(f"{path} has a {type(content).__name__}, not a JSON object")
    return content
