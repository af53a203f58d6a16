"""The feature service: a distilled student over HTTP. ``python -m serve --model FOLDER`` starts it.

A request's way: `serve.app` (routes) → `serve.admission` (keys, limits) → `serve.ask` → `serve.body`, `serve.decoding` →
`serve.engine` (the queue; `serve.batching` chooses, `serve.windows` cuts long audio) → `serve.backends` (PyTorch, ONNX Runtime) →
`serve.formats`, `serve.embeddings` → `serve.sending`. Around it: `serve.models` (what is loaded), `serve.server` (signals),
`serve.deployment` (Ray Serve), `serve.observation` (metrics, log), `serve.page`, and `serve.client` for callers.
"""

from serve.app import create_app

__all__ = ["create_app"]
