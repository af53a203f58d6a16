"""Named tensors: reading them from a safetensors file, and loading them into a student with clear errors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ray_distill.student.model.student import Student
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.teacher_cache.shapes_only import shapes_only


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name, on the CPU.

    Raises:
        ValueError: the file is missing, or is not a safetensors file.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file ({error})") from error
    return tensors


def student_with_weights(config: StudentConfig, tensors: Mapping[str, Any], origin: Path) -> Student:
    """Build a student from all its named tensors.

    It is first built on the meta device, without memory, and compared with the tensors. So a configuration with absurd sizes is
    refused before anything is allocated.

    Args:
        config: architecture.
        tensors: tensors by the names of the student's ``state_dict``.
        origin: file that the tensors come from, for error messages.

    Raises:
        ValueError: a tensor is missing, unexpected, of another shape or not finite; the message names the first.
    """
    if (modules := config.encoder_layers + len(config.conv_layers) + config.conv_pos_depth) > len(tensors):
        raise ValueError(
            f"{origin} does not fit its configuration, which has {modules:,} layers and convolutions: it has only "
            f"{len(tensors):,} tensors"
        )
    with shapes_only():
        expected = Student(config).state_dict()
    _check(expected, tensors, origin, strict=True)
    student = Student(config)
    student.load_state_dict(tensors)
    return student


def load_weights(student: Student, tensors: Mapping[str, Any], origin: Path) -> None:
    """Copy named tensors into a student's parameters and buffers; those without a tensor keep their values.

    Args:
        student: the student to change in place.
        tensors: tensors by the names of the student's ``state_dict``.
        origin: file that the tensors come from, for error messages.

    Raises:
        ValueError: a tensor is unexpected, of another shape or not finite; the message names the first.
    """
    _check(student.state_dict(), tensors, origin, strict=False)
    student.load_state_dict(tensors, strict=False)


def _check(expected: Mapping[str, Tensor], tensors: Mapping[str, Any], origin: Path, *, strict: bool) -> None:
    """Raise ValueError if the tensors do not fit; with ``strict``, also if one is missing."""
    for name in sorted(expected.keys() ^ tensors.keys() if strict else tensors.keys() - expected.keys()):
        what = "lacks" if name in expected else "has an unexpected"
        raise ValueError(f"{origin} does not fit its configuration: it {what} tensor {name!r}")
    for name, found in tensors.items():
        tensor = expected[name]
        if not isinstance(found, Tensor) or found.shape != tensor.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise ValueError(f"{origin} does not fit its configuration: {name!r} is {shape}, not {tuple(tensor.shape)}")
        if not found.is_meta and not found.isfinite().all():
            raise ValueError(f"{origin} has a tensor that is not finite, {name!r}; use an earlier checkpoint or a copy")
