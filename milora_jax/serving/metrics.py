"""The metrics of a server, for Prometheus. Labels are names of tenants, layers and experts, never a text."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)

COMPILED = "/jax/core/compile/backend_compile_duration"
"""The event that JAX reports for every program that it compiles."""


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "milora_requests_total", "Requests by tenant and status", ["tenant", "status"], registry=registry
        )
        self.tokens = Counter(
            "milora_tokens_total", "Tokens by tenant and kind", ["tenant", "kind"], registry=registry
        )
        self.first_token = Histogram(
            "milora_time_to_first_token_seconds", "From admission", buckets=SECONDS, registry=registry
        )
        self.between_tokens = Histogram(
            "milora_time_between_tokens_seconds", "Mean within a chunk", buckets=SECONDS, registry=registry
        )
        self.experts = Counter(
            "milora_expert_weight_total", "Sum of routing weights", ["layer", "expert"], registry=registry
        )
        self.compiled = Counter(
            "milora_compiled_programs_total",
            "Programs compiled since the start",
            registry=registry,
        )

    def gauge(self, name: str, help: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is read at every scrape."""
        Gauge(name, help, registry=self.registry).set_function(value)

    def count(self, name: str, help: str, value: Callable[[], float]) -> None:
        """Add a counter whose value is read at every scrape."""
        self.registry.register(_ReadCounter(name, help, value))

    def text(self) -> bytes:
        """Return all metrics in the format of Prometheus."""
        return generate_latest(self.registry)


@dataclass(frozen=True)
class _ReadCounter:
    """A counter whose value is kept elsewhere, as a collector."""

    name: str
    help: str
    value: Callable[[], float]

    def collect(self) -> list[Metric]:
        """The counter as it is now."""
        return [CounterMetricFamily(self.name, self.help, value=self.value())]


class _Compilations:
    """Counts compilations of this process: one listener for all, because JAX cannot remove a listener."""

    def __init__(self) -> None:
        self._lock, self._counters = threading.Lock(), list[Counter]()
        self._registered = False

    def add(self, counter: Counter) -> None:
        """Count compilations from now on."""
        with self._lock:
            self._counters.append(counter)
            if not self._registered:
                jax.monitoring.register_event_duration_secs_listener(self._on_event)
                self._registered = True

    def remove(self, counter: Counter) -> None:
        """Stop counting."""
        with self._lock:
            self._counters.remove(counter)

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event == COMPILED:
            for counter in list(self._counters):
                counter.inc()


COMPILATIONS = _Compilations()
"""The compilations of this process."""
