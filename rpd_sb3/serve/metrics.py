"""What the service counts: for Prometheus, for the protocol's statistics and for the status page."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATENCY_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one service.

    :param model: name under which it is served
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.started = time.time()
        self.registry = CollectorRegistry()
        self.latency = self._histogram("request_seconds", "From a query's arrival to its answer", LATENCY_BUCKETS)
        self.queued = self._histogram("queue_seconds", "From a query's arrival to its batch", LATENCY_BUCKETS)
        self.inference = self._histogram("batch_seconds", "One call of the teacher", LATENCY_BUCKETS)
        self.batch_size = self._histogram("batch_size", "Rows of one call of the teacher", BATCH_BUCKETS)
        self.queue = Gauge("rpd_sb3_queue_length", "Queries that wait", registry=self.registry)
        self.requests = Counter("rpd_sb3_requests", "Inference requests", ["code"], registry=self.registry)
        self._lock = threading.Lock()
        self.last_inference = 0
        """Milliseconds since the epoch."""
        self._totals = {"success": [0, 0.0], "fail": [0, 0.0], "queue": [0, 0.0], "compute_infer": [0, 0.0]}
        self._batches: dict[int, list[float]] = {}
        self._rows = 0

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"rpd_sb3_{name}", text, buckets=buckets, registry=self.registry)

    def batch(self, rows: int, seconds: float, waits: Sequence[float]) -> None:
        """Count one call of the teacher.

        :param rows: of the batch
        :param seconds: that it took
        :param waits: seconds that each of its queries had waited
        """
        self.batch_size.observe(rows)
        self.inference.observe(seconds)
        with self._lock:
            self._rows += rows
            self.last_inference = int(time.time() * 1000)
            self._add("compute_infer", len(waits), seconds)
            self._add("queue", len(waits), sum(waits))
            count = self._batches.setdefault(rows, [0, 0.0])
            count[0] += 1
            count[1] += seconds
        for wait in waits:
            self.queued.observe(wait)

    def request(self, code: int, seconds: float) -> None:
        """Count one inference request.

        :param code: HTTP status of its answer
        :param seconds: from its arrival to its answer
        """
        self.requests.labels(str(code)).inc()
        self.latency.observe(seconds)
        with self._lock:
            self._add("success" if code == 200 else "fail", 1, seconds)

    def _add(self, key: str, count: int, seconds: float) -> None:
        self._totals[key][0] += count
        self._totals[key][1] += seconds

    def statistics(self) -> dict[str, Any]:
        """The protocol's statistics extension: counts, and times in nanoseconds."""
        apart = dict.fromkeys(("compute_input", "compute_output"), {"count": 0, "ns": 0})  # part of compute_infer here
        with self._lock:
            totals = {key: {"count": int(n), "ns": int(s * 1e9)} for key, (n, s) in self._totals.items()}
            totals.update(apart)
            batches = [
                {"batch_size": rows, "compute_infer": {"count": int(n), "ns": int(s * 1e9)}, **apart}
                for rows, (n, s) in sorted(self._batches.items())
            ]
            return {
                "name": self.model,
                "version": "1",
                "last_inference": self.last_inference,
                "inference_count": self._rows,
                "execution_count": int(sum(count for count, _ in self._batches.values())),
                "inference_stats": totals,
                "batch_stats": batches,
            }

    def prometheus(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)
