"""The models being served, by name; each can be replaced while requests run."""

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ray_distill.serve.api.errors import ServiceError
from ray_distill.serve.inference.backends import Backend, BackendOptions, OnnxBackend, TorchBackend
from ray_distill.serve.inference.engine import BatchLimits, BatchRecord, FeatureEngine
from ray_distill.student import Student, load_student

_LOG = logging.getLogger("serve.models")
Source = Student | Path | str
_UNUSABLE = (ValueError, OSError, RuntimeError)  # What a folder, or memory that is not enough, may raise.


@dataclass(frozen=True)
class ServedModel:
    """One revision of a model, and what runs it."""

    name: str
    engine: FeatureEngine

    @property
    def revision(self) -> str:
        """12 hexadecimal digits of its weights' SHA-256."""
        return self.engine.backend.revision


class Models:
    """Served models in order; the first is the default.

    Args:
        options: how each is run.
        limits, on_batch: as `FeatureEngine`, for each model.
        library: a folder of exported students, or of runs with an ``export`` in each; any of them is loaded when first asked
            for. Default None.
        library_loaded: how many of them stay loaded; the one not asked for longest leaves once another is there. Default 4.

    Raises:
        ValueError: the library is not a folder, or less than one may be loaded.
    """

    def __init__(
        self,
        options: BackendOptions,
        limits: BatchLimits,
        on_batch: Callable[[BatchRecord], None],
        library: str | Path | None = None,
        library_loaded: int = 4,
    ) -> None:
        self._options, self._limits, self._on_batch = options, limits, on_batch
        self._library = None if library is None else Path(library)
        if self._library is not None and not self._library.is_dir():
            raise ValueError(f"There is no folder of models at '{library}'.")
        if library_loaded < 1:
            raise ValueError(f"library_loaded must be at least 1, not {library_loaded}.")
        self._library_loaded = library_loaded
        self._models: dict[str, ServedModel] = {}
        self._folders: dict[str, Path] = {}
        self._of_library: set[str] = set()
        self._asked: dict[str, float] = {}  # When each of the library was asked for last.
        self._changing = threading.Lock()
        self.load: Callable[[str], Awaitable[object]] = self.load_from_library
        """What `find` awaits for a model of the library, loaded or not; Ray Serve puts its own count of models around it."""

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(list(self._models.values()))

    def put(self, name: str, source: Source) -> None:
        """Serves a model under a name, warmed up before the first request reaches it.

        One that had the name answers what it has queued, and is then gone; requests that come too late for it are sent to
        the new one, so none is lost. Blocks until then.

        Args:
            name: what requests call it.
            source: a student, the folder of one, or a file of ``export --format onnx``.

        Raises:
            ValueError: there is no such folder, nothing readable in it, or a backend that can't run it.
        """
        with self._changing:
            self._put(name, source, open_backend(source, self._options))

    def _put(self, name: str, source: Source, backend: Backend) -> None:
        engine = FeatureEngine(backend, self._limits, self._on_batch)
        old = self._models.get(name)
        self._models[name] = ServedModel(name, engine)
        if isinstance(source, Student):
            self._folders.pop(name, None)
        else:
            self._folders[name] = Path(source)
        if old is not None:
            old.engine.close()

    def reload(self) -> None:
        """Replaces each model whose files hold another revision now; one that can't be read stays as it is, and is logged."""
        with self._changing:
            for name, folder in list(self._folders.items()):
                try:
                    backend = open_backend(folder, self._options)
                    if backend.revision != self._models[name].revision:
                        self._put(name, folder, backend)
                        _LOG.info("model %s is revision %s now", name, backend.revision)
                except _UNUSABLE as error:
                    _LOG.error("model %s stays at revision %s: %s", name, self._models[name].revision, error)

    def get(self, name: str | None) -> ServedModel:
        """A loaded model by ``NAME`` or ``NAME@REVISION``; ServiceError ``model_not_found`` where it isn't served."""
        if name is None:
            return next(iter(self._models.values()))
        plain, _, revision = name.partition("@")
        found = self._models.get(plain)
        if found is None or revision not in ("", found.revision):
            raise ServiceError("model_not_found", f"There is no model {name[:80]!r}: /v1/models lists them.")
        return found

    async def find(self, name: str | None) -> ServedModel:
        """As `get`, and loads what the library has."""
        plain = (name or "").partition("@")[0]
        if plain in self._of_library or (
            plain and plain not in self._models and plain in await asyncio.to_thread(self.in_library)
        ):
            self._asked[plain] = time.monotonic()
            await self.load(plain)
            if plain not in self._models:  # Others made it leave in the meantime.
                await self.load_from_library(plain)
        return self.get(name)

    async def load_from_library(self, name: str) -> None:
        """Loads a model that isn't there yet; ServiceError ``not_ready`` where it can't be loaded, and the log has the reason."""
        if name not in self._models:
            await asyncio.to_thread(self._load, name)

    def in_library(self) -> dict[str, Path]:
        """What may be asked for beside the models that are always loaded, and where it is."""
        found = {}
        for folder in sorted(self._library.iterdir()) if self._library else ():
            model = next((path for path in (folder, folder / "export") if (path / "config.json").is_file()), None)
            if folder.suffix == ".onnx":
                found[folder.stem] = folder
            elif model and (folder.name not in self._models or folder.name in self._of_library):
                found[folder.name] = model
        return found

    def _load(self, name: str) -> None:
        with self._changing:
            if name in self._models:
                return
            try:
                folder = self.in_library()[name]
                self._put(name, folder, open_backend(folder, self._options))
            except (KeyError, *_UNUSABLE) as error:
                _LOG.error("model %s of the library can't be loaded: %s", name, error)
                message = f"The model {name[:80]!r} can't be loaded; the service's log says why."
                raise ServiceError("not_ready", message) from error
            self._of_library.add(name)
            while len(self._of_library) > self._library_loaded:
                oldest = min(self._of_library - {name}, key=lambda other: self._asked.get(other, 0.0))
                self._of_library.remove(oldest)
                self._folders.pop(oldest, None)
                # It answers what it has queued; the request that waits for the new one doesn't wait for that.
                threading.Thread(target=self._models.pop(oldest).engine.close, daemon=True).start()

    def close(self) -> None:
        """Finish what is queued everywhere."""
        for model in self._models.values():
            model.engine.close()


def open_backend(source: Source, options: BackendOptions) -> Backend:
    """Loads a model into what runs it.

    Args:
        source: a student, the folder of one, or a file of ``export --format onnx``.
        options: see `BackendOptions`.

    Raises:
        ValueError: there is no such folder, nothing readable in it, or a backend that can't run it.
    """
    if not isinstance(source, Student):
        path = Path(source)
        if path.suffix == ".onnx":
            if options.runtime == "torch":
                raise ValueError(f"PyTorch can't run '{path}': give the folder that the export stage wrote.")
            if not path.is_file():
                raise ValueError(f"There is no ONNX file at '{path}'.")
            return OnnxBackend(path, options)
        if path.is_file():
            raise ValueError(
                f"'{path}' is a file: give the folder that the export stage wrote, or an ONNX file named .onnx."
            )
        if not path.is_dir():
            raise ValueError(f"There is no model folder at '{path}': give the folder that the export stage wrote.")
        source = load_student(path)
    if source.config.patches is not None:
        raise ValueError(
            "This student sees patches of a spectrogram (AST), and the service gives frames of 20 ms; use it from Python."
        )
    return OnnxBackend(source, options) if options.runtime == "onnx" else TorchBackend(source, options)


def model_name(source: Source) -> str:
    """The name of its run (of ``NAME/export``: NAME), of an ONNX file that without .onnx, ``student`` of a student."""
    if isinstance(source, Student):
        return "student"
    path = Path(source).resolve()
    return (
        path.parent.name
        if path.name == "export" and path.parent.name
        else path.stem
        if path.suffix == ".onnx"
        else path.name
    )
