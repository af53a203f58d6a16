"""OpenTelemetry traces, sent after each request. They need the extra named otel, and nothing of it is loaded without the setting."""

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_distill.serve.api.observability import RequestRecord


class Traces:
    """Sends a span for each request, with one for each of its steps.

    Args:
        exporter: Exporter of OpenTelemetry. Default: OTLP over HTTP, set up by the usual environment variables, such as
            ``OTEL_EXPORTER_OTLP_ENDPOINT`` and ``OTEL_SERVICE_NAME``.

    Raises:
        ValueError: the packages are not installed.
    """

    def __init__(self, exporter: Any = None) -> None:
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter()
        except ImportError as error:
            raise ValueError(
                f"Traces need packages that are not installed ({error}): install the extra named otel."
            ) from error
        resource = Resource({"service.name": "ray-distill-serve"}).merge(Resource.create())
        self._ids = _GivenIds()
        self._provider = TracerProvider(resource=resource, id_generator=self._ids)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("ray_distill.serve")

    def send(self, record: "RequestRecord", route: str, status: int, started: float, seconds: float) -> None:
        """Send the spans of a request that is complete; called on the event loop.

        Args:
            record: What is known of the request.
            route: Path of its route.
            status: Status of the response.
            started: Start, by `time.monotonic`.
            seconds: Duration.
        """
        from opentelemetry import trace

        offset = time.time() - time.monotonic()

        def nanoseconds(moment: float) -> int:
            return int((moment + offset) * 1e9)

        context = None
        if record.parent_id:
            flags = trace.TraceFlags(trace.TraceFlags.SAMPLED)
            parent = trace.SpanContext(int(record.trace_id, 16), int(record.parent_id, 16), True, flags)
            context = trace.set_span_in_context(trace.NonRecordingSpan(parent))
        self._ids.trace_id, self._ids.span_id = int(record.trace_id, 16), int(record.span_id, 16)
        span = self._tracer.start_span(
            f"POST {route}" if route in ("/v1/features", "/v1/embeddings") else route,
            context,
            kind=trace.SpanKind.SERVER,
            start_time=nanoseconds(started),
            attributes={
                "http.route": route,
                "http.response.status_code": status,
                "model": record.model,
                "audio_seconds": record.audio_seconds,
                **({"error.type": record.error_type} if record.error_type else {}),
            },
        )
        inside = trace.set_span_in_context(span)
        for name, start, duration in record.steps:
            step = self._tracer.start_span(name, inside, start_time=nanoseconds(start))
            step.end(nanoseconds(start + duration))
        span.end(nanoseconds(started + seconds))

    def close(self) -> None:
        """Send what has not been sent yet."""
        self._provider.shutdown()


class _GivenIds:
    """Generator of IDs that uses the given ones for the next span, since a response names its span before the span exists."""

    trace_id = 0
    span_id = 0

    def generate_trace_id(self) -> int:
        """Return the given trace ID."""
        return self.trace_id

    def generate_span_id(self) -> int:
        """Return the given ID once, and then random ones."""
        import secrets

        given, self.span_id = self.span_id, 0
        return given or secrets.randbits(64) or 1

    def is_trace_id_random(self) -> bool:
        """Return False, since callers may choose the trace ID."""
        return False
