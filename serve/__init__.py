"""The feature service: a distilled student over HTTP. ``ray-distill serve --model FOLDER`` starts it.

A request passes through `app` (routes), `api.admission` (API keys and limits), `api.request_handler`, `api.request_body`, `decoding`,
`inference.engine` (the queue; `batch_selection` forms batches, `windows` splits long audio), `inference.backends` (PyTorch, ONNX
Runtime), `api.formats` or `api.embeddings`, and `api.streaming_response`. `streams` answers audio that is still arriving. Around it:
`settings`, `command`, `inference.models` (loaded models), `server` (signals), `deployment` and `ray_proxy` (Ray Serve),
`api.observability` (metrics and logs), `page`, and `client` for callers.

Importing this package imports neither PyTorch nor FastAPI; each name is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray_distill.serve.app import create_app
    from ray_distill.serve.client import AsyncClient, Client, RefusedError
    from ray_distill.serve.settings import AppSettings, BackendOptions, BatchLimits, Limits, ServeSettings

_MODULES = {
    "AppSettings": "settings",
    "AsyncClient": "client",
    "BackendOptions": "settings",
    "BatchLimits": "settings",
    "Client": "client",
    "Limits": "settings",
    "RefusedError": "client",
    "ServeSettings": "settings",
    "create_app": "app",
}
__all__ = [
    "AppSettings",
    "AsyncClient",
    "BackendOptions",
    "BatchLimits",
    "Client",
    "Limits",
    "RefusedError",
    "ServeSettings",
    "create_app",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"ray_distill.serve.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
