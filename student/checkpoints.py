"""Students on disk: a folder with model.safetensors and config.json, or a published ``.ckpt``."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pydantic
from safetensors.torch import save

from ray_distill.student.model.student import Student
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.published import load_published
from ray_distill.student.training import run_files
from ray_distill.student.weights import load_tensors, student_with_weights
from ray_distill.teacher_cache.storage.json_record import SEAL, decode_record, encode_record

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_WEIGHTS_DIGEST = "weights_sha256"
"""Key of CONFIG with the SHA-256 of WEIGHTS. Earlier versions stored no checksums."""


def save_student(student: Student, folder: Path, metadata: dict[str, Any] | None = None) -> None:
    """Save a student's weights and configuration, with checksums of both that `load_student` compares.

    Args:
        student: the student to save.
        folder: receives ``model.safetensors`` and ``config.json``; created if missing.
        metadata: JSON values stored beside the configuration, such as the step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors' save_file creates files that only their owner can read, but a service may run as another user.
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in student.state_dict().items()})
    record = {
        "student": student.config.model_dump(mode="json"),
        "metadata": metadata or {},
        _WEIGHTS_DIGEST: hashlib.sha256(data).hexdigest(),
    }
    temporary = folder / f".{CONFIG}.tmp"
    temporary.write_bytes(encode_record(record))
    weights = folder / f".{WEIGHTS}.tmp"
    weights.write_bytes(data)
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
            what = f"the file {needed} is missing" if path.exists() else "there is no such file or folder"
            raise ValueError(
                f"{path} is not a student: {what}; give the folder of a run, of an export or of a checkpoint"
            )
    record = _read_config(described)
    if "model_type" in record:
        raise ValueError(
            f"{path} is a model for transformers (model_type {str(record['model_type'])[:40]!r}); give the folder of a run, or of its "
            "export, from which such models are made"
        )
    if "student" not in record:
        raise ValueError(f"{described} does not describe a student (it lacks the key 'student')")
    try:
        student_config = StudentConfig.model_validate(record["student"])
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "student"
        raise ValueError(f"{described} does not describe a student ({place}: {first['msg']})") from error
    student = student_with_weights(student_config, load_tensors(weights), weights)
    if record.get(_WEIGHTS_DIGEST, digest := _sha256(weights)) != digest:
        raise ValueError(
            f"{weights} is damaged: its SHA-256 is not that in {described}; restore both from a copy, or export the student again"
        )
    return student.eval()


def _read_config(path: Path) -> dict[str, Any]:
    """Return the content of our ``config.json``, after comparing its checksum if it has one."""
    data = path.read_bytes()
    try:
        record = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path} does not describe a student ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} does not describe a student (it has a {type(record).__name__}, not an object)")
    if SEAL in record:
        try:
            return decode_record(data)
        except ValueError as error:
            raise ValueError(
                f"{path} was changed after it was written ({error}); restore it from a copy, or remove its line {SEAL!r} if "
                "the change is intended"
            ) from error
    return record


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
