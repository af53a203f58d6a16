"""Prometheus metrics of one application."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ray_distill.serve.inference.engine import BatchRecord, Features

if TYPE_CHECKING:
    from ray_distill.serve.inference.models import Models

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_AUDIO_SECONDS = (0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)


class Metrics:
    """The metrics, in their own registry.

    Labels have few values: routes, statuses, error types, and the names of models that have been loaded.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("serve_requests", "Responses sent", ["route", "status"], registry=registry)
        self.errors = Counter("serve_errors", "Error responses", ["error_type"], registry=registry)
        self.open = Gauge("serve_open_requests", "Open requests", registry=registry)
        self.latency = Histogram(
            "serve_request_seconds",
            "Time until the response was sent; the model is empty where none was chosen",
            ["route", "model", "status"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.request_audio = Histogram(
            "serve_request_audio_seconds", "Audio of a request", buckets=_AUDIO_SECONDS, registry=registry
        )
        self.decoding = Histogram("serve_decode_seconds", "Time to decode a file", buckets=_SECONDS, registry=registry)
        self.queue = Histogram(
            "serve_queue_seconds", "Time of an utterance in the queue", buckets=_SECONDS, registry=registry
        )
        self.inference = Histogram(
            "serve_inference_seconds", "Inference time of a batch", buckets=_SECONDS, registry=registry
        )
        self.batch = Histogram(
            "serve_batch_audio_seconds", "Audio in a batch without padding", buckets=_AUDIO_SECONDS, registry=registry
        )
        self.batch_size = Histogram(
            "serve_batch_utterances", "Utterances in a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.real = Counter("serve_audio_seconds", "Audio processed, without padding", registry=registry)
        self.padded = Counter("serve_padding_seconds", "Padding processed", registry=registry)
        self.loads = Counter("serve_model_loads", "Attempts to load a model", ["outcome"], registry=registry)

    def watch(self, models: "Models", held_bytes: Callable[[], int], decoding_seconds: Callable[[], float]) -> None:
        """Add gauges that are read when the metrics are shown: the queues of the models, held memory and waiting decoding."""
        self.registry.register(_Watcher(models, held_bytes, decoding_seconds))

    def record_batch(self, batch: BatchRecord) -> None:
        """Record a batch; called by the inference thread."""
        self.inference.observe(batch.inference_seconds)
        self.batch.observe(batch.real_seconds)
        self.batch_size.observe(batch.size)
        self.real.inc(batch.real_seconds)
        self.padded.inc(batch.padded_seconds - batch.real_seconds)

    def record_features(self, features: Features) -> None:
        """Record an utterance whose features were computed."""
        self.queue.observe(features.queue_seconds)


class _Watcher(Collector):
    def __init__(self, models: "Models", held_bytes: Callable[[], int], decoding_seconds: Callable[[], float]) -> None:
        self._models, self._held_bytes, self._decoding_seconds = models, held_bytes, decoding_seconds

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the present values."""
        utterances = GaugeMetricFamily("serve_queued_utterances", "Utterances in the queue", labels=["model"])
        audio = GaugeMetricFamily("serve_queued_audio_seconds", "Audio in the queue", labels=["model"])
        wait = GaugeMetricFamily("serve_expected_wait_seconds", "Expected time of the admitted work", labels=["model"])
        for model in self._models:
            utterances.add_metric([model.name], model.engine.queued_utterances)
            audio.add_metric([model.name], model.engine.queued_seconds)
            wait.add_metric([model.name], model.engine.expected_wait)
        yield from (utterances, audio, wait)
        yield GaugeMetricFamily("serve_held_bytes", "Memory that open requests hold", value=self._held_bytes())
        waiting = self._decoding_seconds()
        yield GaugeMetricFamily(
            "serve_decoding_waiting_seconds", "Expected work that waits to be decoded", value=waiting
        )
