"""A teacher without its weights: shapes, names and settings, checked as `load_teacher` checks them."""

import warnings
import zipfile
from pathlib import Path

import torch
from torch.utils.serialization import config as serialization

from ray_distill.teacher_cache.teachers import (
    Teacher,
    TeacherError,
    check_supported,
    load_teacher,
    resolve_teacher,
    split_options,
    teacher_of_package,
)
from ray_distill.teacher_cache.teachers.bundles import bundle_names
from ray_distill.teacher_cache.teachers.hub.hub_model import HubModel, open_hub_model
from ray_distill.teacher_cache.teachers.hub.hub_name import parse_hub_name


def load_header(spec: str) -> Teacher | None:
    """Load a teacher on PyTorch's meta device: everything but the values of its weights.

    The configuration of the checkpoint is read, and the names and shapes of its weights are compared with the model. The weights
    are memory-mapped and not read, except from a checkpoint in PyTorch's format of before 1.6. Of a model on the hub that is not in
    the hub's cache, the configuration is downloaded, and the headers of safetensors files are read.

    Args:
        spec: Specification of a teacher as for `load_teacher`.

    Returns:
        The teacher, which can't be called; one with seeded random weights or of another package is
        complete. None for a torchaudio bundle and for a
        model on the hub without safetensors, which would have to be downloaded; see `hub_model_of`.

    Raises:
        TeacherError, UntrustedCheckpointError: The same as from `load_teacher`.
    """
    spec = resolve_teacher(spec)
    _, name = split_options(spec)
    kind, _, rest = name.partition(":")
    if kind == "torchaudio":
        if rest not in bundle_names():
            raise TeacherError(f"torchaudio has no pre-trained bundle {rest!r}; it has {', '.join(bundle_names())}")
        return None
    if kind == "random" or teacher_of_package(name) is not None:  # A package's loader need not know the meta device.
        return load_teacher(spec)
    model = hub_model_of(spec)
    if model is not None and any(path.endswith(".bin") for path in model.missing):
        check_supported(model.description)
        return None
    path = Path(name).expanduser() if model is None else model.folder
    pickles = sorted(path.glob("*.bin")) if path.is_dir() else [path] if path.is_file() else []
    with (
        torch.device("meta"),
        # Installed when the module is imported, so mypy does not see it.
        serialization.patch({"load.mmap": all(map(zipfile.is_zipfile, pickles))}),  # type: ignore[attr-defined]
        warnings.catch_warnings(),
    ):
        # PyTorch warns that loading weights into a model on the meta device has no effect.
        warnings.filterwarnings("ignore", message=".*no-op")
        return load_teacher(spec, "meta")


def hub_model_of(spec: str) -> HubModel | None:
    """Return the model on the hub that a specification names, with its configuration downloaded, or None if it names no such model.

    Raises:
        TeacherError: If the hub has no such model, or can't be reached and the model is not in its cache.
    """
    name = parse_hub_name(split_options(spec)[1])
    return None if name is None else open_hub_model(name)
