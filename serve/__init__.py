"""The feature service: a distilled student over HTTP. ``python -m serve --model FOLDER`` starts it.

A request's way: `app` (routes), `api.admission` (keys, limits), `api.request_handler`, `api.request_body`, `decoding`,
`inference.engine` (the queue; `batch_selection` chooses, `windows` cuts long audio), `inference.backends` (PyTorch, ONNX Runtime),
`api.formats` and `api.embeddings`, `api.streaming_response`. Around it: `inference.models` (what is loaded), `server` (signals),
`deployment` (Ray Serve), `api.observation` (metrics, log), `page`, and `client` for callers.
"""

from ray_distill.serve.app import create_app

__all__ = ["create_app"]
