"""OpenTelemetry spans of a request, without a collector."""

import sys
from typing import Any

import pytest

from ray_distill.serve.api.observability import RequestRecord
from ray_distill.serve.api.traces import Traces

memory = pytest.importorskip(
    "opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="needs the extra named otel"
)


def test_a_request_is_a_span_of_its_caller_with_a_span_for_each_step() -> None:
    exporter = memory.InMemorySpanExporter()
    traces = Traces(exporter)
    record = RequestRecord("a" * 32, "b" * 16, "c" * 16, model="tiny", error_type="deadline", audio_seconds=2.0)
    record.steps = [("decode", 100.1, 0.2), ("inference", 100.3, 0.5)]
    traces.send(record, "/v1/features", 504, 100.0, 1.0)
    alone = RequestRecord("d" * 32, span_id="e" * 16)
    traces.send(alone, "/healthz", 200, 200.0, 0.1)
    traces.close()
    decode, inference, whole, health = exporter.get_finished_spans()
    for span, name, seconds in ((decode, "decode", 0.2), (inference, "inference", 0.5)):
        assert span.name == name and span.parent.span_id == int("c" * 16, 16)
        assert (span.end_time - span.start_time) / 1e9 == pytest.approx(seconds, abs=1e-5)
    assert whole.name == "POST /v1/features" and whole.context.span_id == int("c" * 16, 16)
    assert whole.context.trace_id == int("a" * 32, 16) and whole.parent.span_id == int("b" * 16, 16)
    assert whole.attributes["error.type"] == "deadline" and whole.attributes["http.response.status_code"] == 504
    assert (decode.start_time - whole.start_time) / 1e9 == pytest.approx(0.1, abs=1e-5)
    assert health.parent is None and health.context.trace_id == int("d" * 32, 16)
    assert health.context.span_id == int("e" * 16, 16)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    missing: Any = None
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", missing)
    with pytest.raises(ValueError, match="install the extra named otel"):
        Traces()
