"""Request IDs, trace contexts, one JSON log line per request, and what the metrics and traces know of a request."""

import json
import logging
import re
import secrets
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ray_distill.serve.api.errors import STATUS, ErrorType, ServiceError
from ray_distill.serve.api.metrics import Metrics
from ray_distill.serve.api.traces import Traces
from ray_distill.serve.streams import CLOSE_CODE

_LOG = logging.getLogger(__name__)
_REQUEST_LOG = logging.getLogger("ray_distill.serve.requests")
_TRACE_PARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")


@dataclass
class RequestRecord:
    """What is known of a request, filled in while it is handled.

    Attributes:
        trace_id: Trace that the request belongs to, 32 hexadecimal digits: that of its ``traceparent`` header, or a new one.
        parent_id: Span of the caller, 16 hexadecimal digits; empty if it sent none.
        span_id: Span of this request.
        model: Name of the model; empty if none was chosen.
        error_type: Type of the error; empty if there was none.
        num_bytes: Size of the body.
        audio_seconds: Decoded audio.
        steps: Name, start and duration of each step, by `time.monotonic`, in seconds.
    """

    trace_id: str
    parent_id: str = ""
    span_id: str = field(default_factory=lambda: secrets.token_hex(8))
    model: str = ""
    error_type: ErrorType | Literal[""] = ""
    num_bytes: int = 0
    audio_seconds: float = 0.0
    steps: list[tuple[str, float, float]] = field(default_factory=list)


def record_of(request: HTTPConnection) -> RequestRecord:
    """Return the record of a request or WebSocket."""
    state = request.scope.setdefault("state", {})
    if "record" not in state:
        state["record"] = RequestRecord(uuid.uuid4().hex)
    record: RequestRecord = state["record"]
    return record


class ObservabilityMiddleware:
    """ASGI middleware that logs, counts and traces every request, and gives every response a request ID and a ``traceparent``.

    A WebSocket is a request whose response ends when it is closed; its status is 200, or that of the error that ended it.

    An ``x-request-id`` header of up to 64 letters, digits, dots, dashes and underscores is kept; any other is replaced. A
    ``traceparent`` header (W3C Trace Context) is continued.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, traces: Traces | None = None) -> None:
        self._app, self._metrics, self._traces = app, metrics, traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        sent_id = headers.get("x-request-id", "")
        request_id = sent_id if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", sent_id) else uuid.uuid4().hex
        parent = _TRACE_PARENT.fullmatch(headers.get("traceparent", ""))
        record = RequestRecord(parent[1], parent[2]) if parent else RequestRecord(uuid.uuid4().hex)
        scope.setdefault("state", {})["record"] = record
        started, status = time.monotonic(), 499  # nginx's status for a client that disconnects before the response

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "websocket.close":
                status = 200 if message["code"] == 1000 else message["code"] - CLOSE_CODE
            if message["type"] in ("http.response.start", "websocket.accept"):
                added = MutableHeaders(scope=message)
                added["x-request-id"] = request_id
                added["traceparent"] = f"00-{record.trace_id}-{record.span_id}-{parent[3] if parent else '00'}"
            await send(message)

        self._metrics.open.inc()
        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            # If the response has begun, the server cuts it off and logs the error.
            if status != 499 or scope["type"] == "websocket":
                raise
            # This is not an exception handler of the framework, because the responses of those bypass middleware.
            _LOG.exception("Request %s failed", request_id)
            error = ServiceError("internal", "The service failed on this request; the cause is in its log.")
            record.error_type = error.error_type
            self._metrics.errors.labels(error.error_type).inc()
            await error.response()(scope, receive, send_with_id)
        finally:
            self._metrics.open.dec()
            if scope["type"] == "websocket" and status == 499 and record.error_type:
                status = STATUS[record.error_type]  # The server has closed it, since it is stopping.
            # Only existing routes are labels; a label for every path that clients try would fill the memory.
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.monotonic() - started
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.latency.labels(route, record.model, str(status)).observe(seconds)
            if record.audio_seconds:
                self._metrics.request_audio.observe(record.audio_seconds)
            if self._traces:
                self._traces.send(record, route, status, started, seconds)
            line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "request_id": request_id,
                "trace_id": record.trace_id,
                "method": scope.get("method", "WEBSOCKET"),
                "route": route,
                "status": status,
                "error_type": record.error_type or None,
                "model": record.model or None,
                "bytes": record.num_bytes,
                "audio_seconds": round(record.audio_seconds, 3),
                "seconds": round(seconds, 4),
            }
            _REQUEST_LOG.info(json.dumps(line))
