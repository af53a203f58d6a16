"""What operators see: Prometheus metrics, one JSON log line a request, and request ids."""

import json
import logging
import re
import time
import uuid

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ray_distill.serve.api.errors import ServiceError
from ray_distill.serve.inference.engine import BatchRecord, Features

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_LOG = logging.getLogger("serve.requests")


class Metrics:
    """The counters of one application, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("serve_requests", "Requests answered", ["route", "status"], registry=registry)
        self.errors = Counter("serve_errors", "Requests refused or failed", ["error_type"], registry=registry)
        self.open = Gauge("serve_open_requests", "Requests being answered", registry=registry)
        self.queue = Histogram("serve_queue_seconds", "Time in the queue", buckets=_SECONDS, registry=registry)
        self.inference = Histogram("serve_inference_seconds", "Time of a batch", buckets=_SECONDS, registry=registry)
        sizes = (0.5, 1, 2.5, 5, 10, 20, 40, 80)
        self.batch = Histogram("serve_batch_audio_seconds", "Real audio of a batch", buckets=sizes, registry=registry)
        self.real = Counter("serve_audio_seconds", "Audio run, without padding", registry=registry)
        self.padded = Counter("serve_padding_seconds", "Padding run: what batching wastes", registry=registry)

    def record_batch(self, batch: BatchRecord) -> None:
        """Called by the inference thread after each batch."""
        self.inference.observe(batch.inference_seconds)
        self.batch.observe(batch.real_seconds)
        self.real.inc(batch.real_seconds)
        self.padded.inc(batch.padded_seconds - batch.real_seconds)

    def record_features(self, features: Features) -> None:
        """Called for each utterance answered."""
        self.queue.observe(features.queue_seconds)


class Observed:
    """ASGI middleware: a request id on every answer, one log line and one count for each request.

    An ``x-request-id`` of up to 64 letters, digits, dots, dashes and underscores is kept; any other is replaced.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        request_id = given if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else uuid.uuid4().hex
        started, status = time.monotonic(), 499  # as nginx: the client left first

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        self._metrics.open.inc()
        try:
            await self._app(scope, receive, observed)
        except Exception:
            if status != 499:  # The answer has begun: the server breaks it off, and logs this.
                raise
            # Here and not in a handler of the framework's, whose answers pass no middleware.
            _LOG.exception(json.dumps({"request_id": request_id, "message": "failed"}))
            error = ServiceError("internal", "The service failed on this request; its log holds the cause.")
            self._metrics.errors.labels(error.error_type).inc()
            await error.response()(scope, receive, observed)
        finally:
            self._metrics.open.dec()
            # Only routes that exist: a label for each path ever tried would fill the memory.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            line = {"request_id": request_id, "method": scope["method"], "route": route, "status": status}
            _LOG.info(json.dumps(line | {"seconds": round(time.monotonic() - started, 4)}))
