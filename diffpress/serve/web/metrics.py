"""What the server counts and times, in the text format of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._requests = Counter(
            "diffpress_requests", "Answered requests", ("route", "status"), registry=self._registry
        )
        self._latency = Histogram(
            "diffpress_request_seconds",
            "Time from a request to the end of its response",
            ("route",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self._running = Gauge("diffpress_requests_in_progress", "Requests in progress", registry=self._registry)
        self._images = Counter("diffpress_images", "Sampled images", ("model",), registry=self._registry)
        self._sampling = Histogram(
            "diffpress_batch_seconds",
            "Time to sample a batch",
            ("model",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self._batches = Histogram(
            "diffpress_batch_images", "Images of a batch", ("model",), buckets=SIZES, registry=self._registry
        )
        self._waiting = Gauge("diffpress_waiting_images", "Images in the queue", ("model",), registry=self._registry)
        self._open = Gauge("diffpress_model_open", "Whether a model is open", ("model",), registry=self._registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def running(self, count: int) -> None:
        """Set the number of requests in progress."""
        self._running.set(count)

    def batch(self, model: str, size: int, seconds: float) -> None:
        """Count a sampled batch."""
        self._images.labels(model).inc(size)
        self._batches.labels(model).observe(size)
        self._sampling.labels(model).observe(seconds)

    def waiting(self, model: str, count: int) -> None:
        """Set the number of images in the queue of a model."""
        self._waiting.labels(model).set(count)

    def text(self, open_models: dict[str, bool]) -> bytes:
        """Return all metrics; `open_models` says which models are open."""
        for name, is_open in open_models.items():
            self._open.labels(name).set(is_open)
        return generate_latest(self._registry)
