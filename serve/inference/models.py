"""The models being served, by name; each can be replaced while requests run."""

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ray_distill.serve.api.errors import ServiceError
from ray_distill.serve.inference.backends import Backend, OnnxBackend, TorchBackend
from ray_distill.serve.inference.engine import BatchRecord, FeatureEngine
from ray_distill.serve.inference.model_files import can_be_named, check_model_path, model_folder, model_name, models_in
from ray_distill.serve.settings import AppSettings, BackendOptions
from ray_distill.student import Student, load_student

_LOG = logging.getLogger(__name__)
Source = Student | Path | str
_LOAD_ERRORS = (ValueError, OSError, RuntimeError)  # Errors of damaged files and of insufficient memory.


@dataclass(frozen=True)
class ServedModel:
    """One revision of a model, and the engine that runs it."""

    name: str
    engine: FeatureEngine

    @property
    def revision(self) -> str:
        """First 12 hexadecimal digits of the SHA-256 hash of configuration and weights."""
        return self.engine.backend.revision


class Models:
    """Served models in order; the first is the default.

    Args:
        settings: How models run, the bounds of their batches and queues, the library of further models (``library``), and how many
            of those stay loaded (``library_loaded``).
        on_batch: Called in the inference threads after each batch.
        on_load: Called with ``loaded`` or ``failed`` after each attempt to load a model. Default: nothing is called.

    Raises:
        ValueError: the library is not a folder.
    """

    def __init__(
        self,
        settings: AppSettings,
        on_batch: Callable[[BatchRecord], None],
        on_load: Callable[[str], object] = lambda outcome: None,
    ) -> None:
        self._settings, self._on_batch, self._on_load = settings, on_batch, on_load
        if settings.library is not None and not settings.library.is_dir():
            raise ValueError(f"There is no folder of models at '{settings.library}'.")
        for unusable in models_in(settings.library, named=False) if settings.library else ():
            _LOG.warning("The library's %r is not served, since NAME@REVISION names a revision: rename it", unusable)
        self._models: dict[str, ServedModel] = {}
        self._folders: dict[str, Path] = {}
        self._from_library: set[str] = set()
        self._last_used: dict[str, float] = {}  # Time of the last request for each model of the library.
        self._changing = threading.Lock()
        self.load: Callable[[str], Awaitable[object]] = self.load_from_library
        """Called by `find` for every model of the library, loaded or not. Ray Serve replaces it to track which models are loaded."""

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(list(self._models.values()))

    def put(self, name: str, source: Source) -> None:
        """Serve a model under a name, after it is loaded and warmed up; blocks until then.

        A previous model of that name completes its queue and is closed. Requests that reach it too late are sent to the new model, so
        that none is lost.

        Args:
            name: Name of the model in requests.
            source: Student, folder of one, or file written by ``export --format onnx``.

        Raises:
            ValueError: the folder or file is missing or unreadable, the backend can't run the model, or requests can't name it.
        """
        if not can_be_named(name):
            raise ValueError(f"A model can't be named {name!r}: requests name models as NAME or NAME@REVISION.")
        _LOG.info("Loading the model %s%s", name, "" if isinstance(source, Student) else f" from {source}")
        with self._changing:
            self._put(name, source, open_backend(source, self._settings))

    def _put(self, name: str, source: Source, backend: Backend) -> None:
        _LOG.info("Warming up the model %s", name)
        engine = FeatureEngine(backend, self._settings, self._on_batch)
        old = self._models.get(name)
        self._models[name] = ServedModel(name, engine)
        if isinstance(source, Student):
            self._folders.pop(name, None)
        else:
            self._folders[name] = Path(source)
        self._on_load("loaded")
        if old is not None:
            old.engine.close()

    def reload(self) -> None:
        """Replace each model whose files have changed.

        A model is kept, and the error is logged, if its files can't be read or give features that are not finite.
        """
        with self._changing:
            for name, folder in list(self._folders.items()):
                try:
                    backend = open_backend(folder, self._settings)
                    if backend.revision != self._models[name].revision:
                        self._put(name, folder, backend)
                        _LOG.info("Model %s now has revision %s", name, backend.revision)
                except _LOAD_ERRORS as error:
                    self._on_load("failed")
                    _LOG.error("Model %s keeps revision %s: %s", name, self._models[name].revision, error)

    def get(self, name: str | None) -> ServedModel:
        """Return a loaded model by ``NAME`` or ``NAME@REVISION``, the default for None.

        Raises:
            ServiceError: ``model_not_found`` if no such model is loaded.
        """
        if name is None:
            return next(iter(self))  # A copy, since another thread may load a model meanwhile.
        plain, _, revision = name.partition("@")
        found = self._models.get(plain)
        if found is None or revision not in ("", found.revision):
            raise ServiceError("model_not_found", f"There is no model {name[:80]!r}; /v1/models lists the models.")
        return found

    async def find(self, name: str | None) -> ServedModel:
        """Return a model as `get` does, after loading it from the library if necessary."""
        plain = (name or "").partition("@")[0]
        if plain in self._from_library or (
            plain and plain not in self._models and plain in await asyncio.to_thread(self.in_library)
        ):
            self._last_used[plain] = time.monotonic()
            await self.load(plain)
            if plain not in self._models:  # Requests for other models have unloaded it in the meantime.
                await self.load_from_library(plain)
        return self.get(name)

    async def load_from_library(self, name: str) -> None:
        """Load a model of the library if it isn't loaded.

        Raises:
            ServiceError: ``not_ready`` if it can't be loaded; the reason is logged.
        """
        if name not in self._models:
            await asyncio.to_thread(self._load, name)

    def in_library(self) -> dict[str, Path]:
        """Return the models of the library by name, without those whose names belong to models that are always loaded."""
        found = models_in(self._settings.library) if self._settings.library else {}
        return {name: path for name, path in found.items() if name not in self._models or name in self._from_library}

    def _load(self, name: str) -> None:
        with self._changing:
            if name in self._models:
                return
            try:
                folder = self.in_library()[name]
                self._put(name, folder, open_backend(folder, self._settings))
            except (KeyError, *_LOAD_ERRORS) as error:
                self._on_load("failed")
                _LOG.error("Model %s of the library can't be loaded: %s", name, error)
                message = f"The model {name[:80]!r} can't be loaded; the reason is in the service's log."
                raise ServiceError("not_ready", message) from error
            self._from_library.add(name)
            while len(self._from_library) > self._settings.library_loaded:
                oldest = min(self._from_library - {name}, key=lambda other: self._last_used.get(other, 0.0))
                self._from_library.remove(oldest)
                self._folders.pop(oldest, None)
                # Closed in a thread: it completes its queue, and the request for the new model does not wait for that.
                threading.Thread(target=self._models.pop(oldest).engine.close, daemon=True).start()

    def close(self) -> None:
        """Complete the queues of all models and stop their threads."""
        for model in self:  # A copy, since a request may still be loading a model.
            model.engine.close()


def open_backend(source: Source, options: BackendOptions) -> Backend:
    """Load a model into a backend.

    Args:
        source: Student, folder of one, or file written by ``export --format onnx``.
        options: Backend to use, and its options.

    Raises:
        ValueError: the folder or file is missing or unreadable, or the backend can't run the model.
    """
    if not isinstance(source, Student):
        path = Path(source)
        check_model_path(path, options.runtime)
        if path.suffix == ".onnx":
            return OnnxBackend(path, options)
        source = load_student(model_folder(path))
    if source.config.patches is not None:
        raise ValueError(
            "The service can't run this student: it reads patches of a spectrogram (AST), and the service returns frames of 20 ms. "
            "Use it from Python."
        )
    return OnnxBackend(source, options) if options.runtime == "onnx" else TorchBackend(source, options)


def default_name(source: Source) -> str:
    """Return the name of a model's run or file, or ``student`` for a student in memory."""
    return "student" if isinstance(source, Student) else model_name(Path(source))
