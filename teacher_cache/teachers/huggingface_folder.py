"""A Hugging Face folder (config.json, weights, settings of the feature extractor), read without transformers."""

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.teachers.teacher import TeacherError
from ray_distill.teacher_cache.teachers.weights import without_wrappers
from ray_distill.teacher_cache.untrusted import load_untrusted, what_instead

STUDENT = "distilled_student"
"""Type of the students that this project exports."""

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Files that may have the weights; the first that exists is read, or its shards."""

EXTRACTOR_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
"""Files that may have the settings of the feature extractor, such as whether waveforms are normalised."""


class HuggingFaceFolder:
    """A folder written by transformers' ``save_pretrained``. TeacherError is raised if a file is missing or damaged.

    Args:
        path: Path of the folder.
        name: Name for messages. Default: the last part of the path.

    Attributes:
        path: Path of the folder.
        name: Name for messages.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path, self.name = path, name or path.name

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of config.json."""
        path = self.path / "config.json"
        if not path.exists():
            raise TeacherError(f"{path} is missing; a Hugging Face folder must have it{_instead(self.path)}")
        return _read_json(path)

    is_local = True
    """Whether the weights are files of the folder."""

    @property
    def model_type(self) -> str:
        """``model_type`` in config.json, such as ``hubert``; ``distilled_student`` for students of this project in any format."""
        ours = isinstance(self.config.get("student"), dict) or "reuses" in str(self.config.get("model"))
        return str(self.config.get("model_type", STUDENT if ours else None))

    @cached_property
    def preprocessor_file(self) -> str | None:
        """Name of the file that has the settings of the feature extractor, or None if there is none.

        Processors of transformers 5 are saved in one file with their feature extractor, which counts first, as in transformers.
        """
        if isinstance(self._json_if_there(PROCESSOR_FILE).get("feature_extractor"), dict):
            return PROCESSOR_FILE
        return EXTRACTOR_FILE if (self.path / EXTRACTOR_FILE).exists() else None

    @cached_property
    def preprocessor(self) -> dict[str, Any] | None:
        """Settings of the feature extractor, or None if no file has them. Its sampling rate must be 16 kHz, or MERT's own."""
        if self.preprocessor_file is None:
            return None
        content: dict[str, Any] = self._json_if_there(self.preprocessor_file)
        if self.preprocessor_file == PROCESSOR_FILE:
            content = content["feature_extractor"]
        expected = self.config.get("sample_rate", SAMPLE_RATE)  # Only MERT has it, and `huggingface` checks it.
        if (rate := content.get("sampling_rate", SAMPLE_RATE)) != expected:
            raise TeacherError(
                f"{self.path / self.preprocessor_file} has sampling_rate = {rate!r}, but teachers must take {expected} Hz; use a "
                "model that was trained on such audio"
            )
        return content

    def _json_if_there(self, name: str) -> dict[str, Any]:
        path = self.path / name
        return _read_json(path) if path.exists() else {}

    @property
    def size(self) -> tuple[int | None, int | None]:
        """Number of layers of the encoder and their width as config.json states them; None where it does not."""
        layers, width = (
            next((self.config[key] for key in keys if isinstance(self.config.get(key), int)), None)
            for keys in (("encoder_layers", "num_hidden_layers"), ("d_model", "hidden_size"))
        )
        return layers, width

    def weights(self) -> dict[str, Tensor]:
        """Return all tensors by name.

        They are read from the first of these that exists, as in transformers: model.safetensors, its shards, pytorch_model.bin,
        its shards. A ``.bin`` file is a pickle, which is read without running code. What wrappers such as torch.compile add to the
        names is left out.
        """
        for name, read in zip(WEIGHT_FILES, (_read_safetensors, _read_bin), strict=True):
            if (self.path / name).is_file():
                return without_wrappers(read(self.path / name), self.name)
            if (self.path / f"{name}.index.json").is_file():
                return without_wrappers(self._shards(f"{name}.index.json", read), self.name)
        raise TeacherError(
            f"{self.path} has neither model.safetensors nor pytorch_model.bin; a Hugging Face folder must have its weights in one "
            "of these, or in shards with model.safetensors.index.json or pytorch_model.bin.index.json"
        )

    def shard_names(self, index: str) -> list[str]:
        """Return the sorted names of the shards that an index file of this folder names.

        Raises:
            TeacherError: If the index is damaged, or names a file of another folder.
        """
        path = self.path / index
        names = sorted(set(self._weight_map(index).values()))
        for name in names:
            if Path(name).name != name:
                raise TeacherError(f"{path} names {name!r}, but shards must be files of the same folder")
        return names

    def _weight_map(self, index: str) -> dict[str, str]:
        weight_map = _read_json(self.path / index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise TeacherError(f"{self.path / index} has no weight_map from weights to files")
        return weight_map

    def _shards(self, index: str, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors of the shards that an index names, which must be the tensors that it lists."""
        names = self.shard_names(index)
        state: dict[str, Tensor] = {}
        for name in names:
            if not (self.path / name).is_file():
                raise TeacherError(
                    f"{self.path / name} is missing, one of the {len(names)} shards in {index}; download it again"
                )
            state |= read(self.path / name)
        if missing := sorted(set(self._weight_map(index)) - set(state)):
            raise TeacherError(f"{self.path} lacks {missing[0]!r}, which {index} lists; download its shards again")
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


def _instead(folder: Path) -> str:
    """Return what to give instead of a folder without config.json, after its message; an empty text if it has nothing like a model."""
    if (folder / "adapter_config.json").is_file():
        return "; this is an adapter, so merge it into its model and save that, as PEFT's merge_and_unload does"
    inner = sorted(
        path.parent for pattern in ("*/config.json", "snapshots/*/config.json") for path in folder.glob(pattern)
    )
    files = sorted(path for path in folder.iterdir() if path.suffix in (".pt", ".pth", ".ckpt"))
    found = [*inner, *files]
    if not found:
        return ""
    others = f" (or {len(found) - 1} more)" if len(found) > 1 else ""
    return f"; give {found[0]}{others}, which is in this folder"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        if what := what_instead(path):
            raise TeacherError(f"{path} {what}")
        state: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise TeacherError(
            f"{path} is not a readable safetensors file, so it may be cut off; download it again ({error})"
        ) from error
    return state


def _read_bin(path: Path) -> dict[str, Tensor]:
    state = load_untrusted(path)
    if wrong := next((key for key, value in state.items() if not isinstance(value, Tensor)), None):
        raise TeacherError(f"{path} has {wrong!r}, which is not a tensor; a file with the weights alone is needed")
    return state


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
