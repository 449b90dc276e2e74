"""Prometheus metrics of one server, in a registry of its own.

With several workers each counts for itself into files of PROMETHEUS_MULTIPROC_DIR, and any of them can tell the sum.
"""

import os
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

from matryo.serving.batching import Watch

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)


class Metrics:
    """What this server counts. Labels come from lists made at start-up, so that no caller can add any."""

    def __init__(self, trained: tuple[int, ...]) -> None:
        """`trained` are the widths that get a label of their own; all others share 'other'."""
        self._trained = frozenset(trained)
        registry = self._registry = CollectorRegistry()
        more: Any = {"registry": registry}
        live: Any = {"multiprocess_mode": "livesum", **more}
        self.requests = Counter("matryo_requests", "Answers sent", ["endpoint", "status"], **more)
        self.latency = Histogram(
            "matryo_request_seconds",
            "From first byte to answer",
            ["endpoint", "width", "depth"],
            buckets=SECONDS,
            **more,
        )
        self.inputs = Counter("matryo_inputs", "Texts encoded for callers", **more)
        self.tokens = Counter("matryo_tokens", "Tokens of those texts", **more)
        self.shared = Counter("matryo_inputs_shared", "Texts that another text in flight was encoded for", **more)
        self.batch = Histogram("matryo_batch_inputs", "Texts in one run of the model", buckets=SIZES, **more)
        self.batch_seconds = Histogram("matryo_batch_seconds", "Seconds of one run", buckets=SECONDS, **more)
        self.run_tokens = Counter("matryo_batch_tokens", "Tokens run, without padding", **more)
        self.padded_tokens = Counter("matryo_batch_tokens_padded", "Tokens run, with padding", **more)
        self.queue = Gauge("matryo_queue_tokens", "Tokens that wait for the model", **live)
        self.flying = Gauge("matryo_requests_in_flight", "Requests being answered", **live)
        self._latencies: dict[tuple[str, str, str], Any] = {}
        self._answers: dict[tuple[str, int], Any] = {}

    def answered(self, endpoint: str, status: int, seconds: float, width: int | None, depth: int | None = None) -> None:
        """Count one answer."""
        counter = self._answers.get((endpoint, status))
        if counter is None:
            counter = self._answers[endpoint, status] = self.requests.labels(endpoint, str(status))
        counter.inc()
        label = "none" if width is None else str(width) if width in self._trained else "other"
        layers = "full" if depth is None else str(depth)
        timer = self._latencies.get((endpoint, label, layers))
        if timer is None:
            timer = self._latencies[endpoint, label, layers] = self.latency.labels(endpoint, label, layers)
        timer.observe(seconds)

    def watch(self) -> Watch:
        """What the batcher calls."""

        def ran(inputs: int, tokens: int, padded: int, seconds: float) -> None:
            self.batch.observe(inputs)
            self.batch_seconds.observe(seconds)
            self.run_tokens.inc(tokens)
            self.padded_tokens.inc(padded)

        return Watch(ran, lambda inputs: self.shared.inc(inputs) if inputs else None)

    def text(self) -> bytes:
        """Everything in Prometheus' text format; of all workers where there are several."""
        registry = self._registry
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return bytes(generate_latest(registry))
