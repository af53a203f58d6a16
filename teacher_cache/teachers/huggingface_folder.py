"""A Hugging Face folder: config.json, model.safetensors, preprocessor_config.json; read without transformers."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ray_distill.teacher_cache.teachers.teacher import TeacherError


class Folder:
    """What transformers' ``save_pretrained`` wrote. Every reading raises TeacherError where a file is missing or damaged.

    Args:
        path: of the folder.

    Attributes:
        path: of the folder.
        name: its last part, for messages.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name

    @cached_property
    def config(self) -> dict[str, Any]:
        """What config.json says."""
        return _read_json(self.path / "config.json")

    @property
    def kind(self) -> str:
        """Its ``model_type``, such as ``hubert``."""
        return str(self.config.get("model_type"))

    @cached_property
    def preprocessor(self) -> dict[str, Any] | None:
        """What preprocessor_config.json says, if it is there."""
        path = self.path / "preprocessor_config.json"
        return _read_json(path) if path.exists() else None

    def weights(self) -> dict[str, Tensor]:
        """All tensors, by name."""
        path = self.path / "model.safetensors"
        if not path.is_file():
            raise TeacherError(f"{path} is missing; a Hugging Face folder must hold its weights in this one file")
        try:
            state: dict[str, Tensor] = load_file(path)
        except (SafetensorError, OSError) as error:
            raise TeacherError(f"{path} is not a readable safetensors file: {error}") from error
        return state

    def require(self, allowed: Mapping[str, tuple[Any, ...]]) -> None:
        """TeacherError where a setting has a value under which the model is another architecture.

        Args:
            allowed: values of settings; one that config.json lacks is taken to be allowed.
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
        raise TeacherError(f"{path} is missing; a Hugging Face folder must hold it") from None
    except (OSError, ValueError) as error:
        raise TeacherError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise TeacherError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content
