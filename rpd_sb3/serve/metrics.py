"""What the service counts: for Prometheus and for the status page."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATENCY_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one service."""

    def __init__(self) -> None:
        self.started = time.time()
        self.last_batch: float | None = None
        """time.time() of the teacher's last answer; None before the first one."""
        self.registry = CollectorRegistry()
        self.latency = self._histogram(
            "request_seconds", "From an answered query's arrival to its answer", LATENCY_BUCKETS
        )
        self.queued = self._histogram("queue_seconds", "From a query's arrival to its batch", LATENCY_BUCKETS)
        self.inference = self._histogram("batch_seconds", "One call of the teacher", LATENCY_BUCKETS)
        self.batch_size = self._histogram("batch_size", "Rows of one call of the teacher", BATCH_BUCKETS)
        self.queue = Gauge("rpd_sb3_queue_length", "Queries that wait", registry=self.registry)
        self.requests = Counter("rpd_sb3_requests", "Inference requests", ["code"], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"rpd_sb3_{name}", text, buckets=buckets, registry=self.registry)

    def batch(self, rows: int, seconds: float, waits: Sequence[float]) -> None:
        """Count one call of the teacher.

        :param rows: of the batch
        :param seconds: that it took
        :param waits: seconds that each of its queries had waited
        """
        self.last_batch = time.time()
        self.batch_size.observe(rows)
        self.inference.observe(seconds)
        for wait in waits:
            self.queued.observe(wait)

    def request(self, code: int, seconds: float) -> None:
        """Count one inference request.

        :param code: HTTP status of its answer
        :param seconds: from its arrival to its answer
        """
        self.requests.labels(str(code)).inc()
        if code == 200:
            self.latency.observe(seconds)

    def total(self, sample: str, **labels: str) -> float:
        """A sample, summed over the labels that are not given, e.g. ``total("requests_total", code="200")``."""
        return sum(
            found.value
            for family in self.registry.collect()
            for found in family.samples
            if found.name == f"rpd_sb3_{sample}" and labels.items() <= found.labels.items()
        )

    def prometheus(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)
