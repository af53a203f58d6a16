"""The models being served, by name; each can be replaced while requests run."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from serve.engine import BatchLimits, BatchRecord, FeatureEngine
from serve.errors import ServiceError
from student import Student, load_student


@dataclass(frozen=True)
class ServedModel:
    """One revision of a model: 12 hexadecimal digits of its weights' SHA-256."""

    name: str
    revision: str
    engine: FeatureEngine


class Models:
    """Served models in order; the first is the default.

    Args:
        device, limits, on_batch: as `FeatureEngine`, for each model.
    """

    def __init__(
        self, device: str | torch.device, limits: BatchLimits, on_batch: Callable[[BatchRecord], None]
    ) -> None:
        self._device, self._limits, self._on_batch = device, limits, on_batch
        self._models: dict[str, ServedModel] = {}

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(list(self._models.values()))

    def put(self, name: str, student: Student) -> None:
        """Serves a student under a name, warmed up before the first request reaches it.

        One that had the name answers what it has queued, and is then gone; requests that come too late for it are sent to
        the new one, so none is lost. Blocks until then.
        """
        digest = hashlib.sha256()
        for key, tensor in sorted(student.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        engine = FeatureEngine(student, self._device, self._limits, self._on_batch)
        old = self._models.get(name)
        self._models[name] = ServedModel(name, digest.hexdigest()[:12], engine)
        if old is not None:
            old.engine.close()

    def get(self, name: str | None) -> ServedModel:
        """A model by ``NAME`` or ``NAME@REVISION``; ServiceError ``model_not_found`` where it isn't served."""
        if name is None:
            return next(iter(self._models.values()))
        plain, _, revision = name.partition("@")
        found = self._models.get(plain)
        if found is None or revision not in ("", found.revision):
            raise ServiceError("model_not_found", f"There is no model {name[:80]!r}: /v1/models lists them.")
        return found

    def close(self) -> None:
        """Finish what is queued everywhere."""
        for model in self._models.values():
            model.engine.close()


def load_model(folder: str | Path) -> tuple[str, Student]:
    """A student and the name of its run (of ``NAME/export``: NAME); ValueError where the folder has none."""
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"There is no model folder at '{path}': give the folder that the export stage wrote.")
    student = load_student(path)
    path = path.resolve()
    return (path.parent.name if path.name == "export" and path.parent.name else path.name), student
