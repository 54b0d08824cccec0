"""What the server counts, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_CONFIDENCE = tuple(tenth / 10 for tenth in range(1, 11))


class Metrics:
    """One registry for each application: several in one process do not mix."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        names = ("method", "route", "status")
        self.requests = Counter(
            "gravity_http_requests", "Requests answered.", names, registry=self.registry
        )
        self.latency = Histogram(
            "gravity_http_seconds",
            "Seconds from a request's headers to the end of its answer.",
            ("route",),
            registry=self.registry,
            buckets=_SECONDS,
        )
        self.tokens = Counter(
            "gravity_tokens", "Tokens read and written.", ("kind",), registry=self.registry
        )
        self.finished = Counter(
            "gravity_texts", "Texts by how they ended.", ("reason",), registry=self.registry
        )
        self.confidence = Histogram(
            "gravity_confidence",
            "Calibrated confidence of answers.",
            registry=self.registry,
            buckets=_CONFIDENCE,
        )
        self.waiting = self._gauge("gravity_queue_waiting", "Texts waiting for the model.")
        self.active = self._gauge("gravity_rows_active", "Texts being written.")
        self.beliefs = self._gauge("gravity_beliefs", "Active beliefs of the store.")
        self.revision = self._gauge("gravity_store_revision", "Revision of the store.")
        self.verified = self._gauge(
            "gravity_base_verified", "1: the base was as pinned when last verified."
        )

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one response."""
        # A method is whatever the client writes: unknown ones share a label.
        method = method if method in ("GET", "POST", "PATCH", "DELETE", "HEAD") else "other"
        self.requests.labels(method, route, str(status)).inc()
        self.latency.labels(route).observe(seconds)

    def render(self) -> bytes:
        """The text that /metrics answers."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self.registry)
