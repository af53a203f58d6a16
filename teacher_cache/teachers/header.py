"""A teacher without its weights: shapes, names and settings, checked as `load_teacher` checks them."""

import warnings
import zipfile
from pathlib import Path

import torch
from torch.utils.serialization import config as serialization

from ray_distill.teacher_cache.teachers import Teacher, TeacherError, load_teacher, split_options
from ray_distill.teacher_cache.teachers.bundles import bundle_names


def load_header(spec: str) -> Teacher | None:
    """Load a teacher on PyTorch's meta device: everything but the values of its weights.

    The configuration of the checkpoint is read, and the names and shapes of its weights are compared with the model. The weights
    are memory-mapped and not read, except from a checkpoint in PyTorch's format of before 1.6.

    Args:
        spec: Specification of a teacher as for `load_teacher`.

    Returns:
        The teacher, which can't be called; one with seeded random weights is complete. None for a torchaudio bundle, which
        would have to be downloaded.

    Raises:
        TeacherError, UntrustedCheckpointError: The same as from `load_teacher`.
    """
    _, name = split_options(spec)
    kind, _, rest = name.partition(":")
    if kind == "torchaudio":
        if rest not in bundle_names():
            raise TeacherError(f"torchaudio has no pre-trained bundle {rest!r}; it has {', '.join(bundle_names())}")
        return None
    if kind == "random":
        return load_teacher(spec)
    path = Path(name).expanduser()
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
