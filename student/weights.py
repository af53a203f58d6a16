"""Named tensors: reading them from a safetensors file, and loading them into a student with clear errors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ray_distill.student.model.student import Student


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


def load_weights(student: Student, tensors: Mapping[str, Any], origin: Path, *, strict: bool = True) -> None:
    """Copy named tensors into a student's parameters and buffers.

    Args:
        student: the student to change in place.
        tensors: tensors by the names of the student's ``state_dict``.
        origin: file that the tensors come from, for error messages.
        strict: whether every tensor of the student must be given. Default True.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape; the message names the first.
    """
    expected = student.state_dict()
    for name in sorted(expected.keys() ^ tensors.keys() if strict else tensors.keys() - expected.keys()):
        what = "lacks" if name in expected else "has an unexpected"
        raise ValueError(f"{origin} does not fit its configuration: it {what} tensor {name!r}")
    for name, found in tensors.items():
        tensor = expected[name]
        if not isinstance(found, Tensor) or found.shape != tensor.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise ValueError(f"{origin} does not fit its configuration: {name!r} is {shape}, not {tuple(tensor.shape)}")
    student.load_state_dict(tensors, strict=strict)
