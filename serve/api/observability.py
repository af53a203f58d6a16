"""Prometheus metrics, one JSON log line per request, and request IDs."""

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
_LOG = logging.getLogger(__name__)
_REQUEST_LOG = logging.getLogger("ray_distill.serve.requests")


class Metrics:
    """The metrics of one application, in their own registry."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("serve_requests", "Responses sent", ["route", "status"], registry=registry)
        self.errors = Counter("serve_errors", "Error responses", ["error_type"], registry=registry)
        self.open = Gauge("serve_open_requests", "Open requests", registry=registry)
        self.queue = Histogram(
            "serve_queue_seconds", "Time of an utterance in the queue", buckets=_SECONDS, registry=registry
        )
        self.inference = Histogram(
            "serve_inference_seconds", "Inference time of a batch", buckets=_SECONDS, registry=registry
        )
        sizes = (0.5, 1, 2.5, 5, 10, 20, 40, 80)
        self.batch = Histogram(
            "serve_batch_audio_seconds", "Audio in a batch without padding", buckets=sizes, registry=registry
        )
        self.real = Counter("serve_audio_seconds", "Audio processed, without padding", registry=registry)
        self.padded = Counter("serve_padding_seconds", "Padding processed", registry=registry)

    def record_batch(self, batch: BatchRecord) -> None:
        """Record a batch; called by the inference thread."""
        self.inference.observe(batch.inference_seconds)
        self.batch.observe(batch.real_seconds)
        self.real.inc(batch.real_seconds)
        self.padded.inc(batch.padded_seconds - batch.real_seconds)

    def record_features(self, features: Features) -> None:
        """Record an utterance whose features were computed."""
        self.queue.observe(features.queue_seconds)


class ObservabilityMiddleware:
    """ASGI middleware that logs and counts every request, and gives every response a request ID.

    An ``x-request-id`` header of up to 64 letters, digits, dots, dashes and underscores is kept; any other is replaced.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent_id = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        request_id = sent_id if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", sent_id) else uuid.uuid4().hex
        started, status = time.monotonic(), 499  # nginx's status for a client that disconnects before the response

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        self._metrics.open.inc()
        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            if status != 499:  # The response has begun; the server cuts it off and logs the error.
                raise
            # This is not an exception handler of the framework, because the responses of those bypass middleware.
            _LOG.exception("Request %s failed", request_id)
            error = ServiceError("internal", "The service failed on this request; the cause is in its log.")
            self._metrics.errors.labels(error.error_type).inc()
            await error.response()(scope, receive, send_with_id)
        finally:
            self._metrics.open.dec()
            # Only existing routes are labels; a label for every path that clients try would fill the memory.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            line = {"request_id": request_id, "method": scope["method"], "route": route, "status": status}
            _REQUEST_LOG.info(json.dumps(line | {"seconds": round(time.monotonic() - started, 4)}))
