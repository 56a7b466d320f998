"""What a server counts, for Prometheus. Labels are names of tenants, adapters and layers: never a text."""

from __future__ import annotations

import threading
from collections.abc import Callable

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)

COMPILED = "/jax/core/compile/backend_compile_duration"
"""The event that JAX reports for every program that it compiles."""


class Metrics:
    """The counters of one server."""

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
            "Programs compiled since it was ready",
            registry=registry,
        )

    def gauge(self, name: str, help: str, value: Callable[[], float]) -> None:
        """Add a value that is read when it is asked for."""
        Gauge(name, help, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """All of it in Prometheus' format."""
        return generate_latest(self.registry)


class _Compilations:
    """Compilations of this process, for whoever listens: JAX takes listeners and never gives them back."""

    def __init__(self) -> None:
        self._lock, self._listeners = threading.Lock(), list[Counter]()
        self._known = False

    def tell(self, counter: Counter) -> None:
        """Count compilations from now on."""
        with self._lock:
            self._listeners.append(counter)
            if not self._known:
                jax.monitoring.register_event_duration_secs_listener(self._heard)
                self._known = True

    def forget(self, counter: Counter) -> None:
        """Count them no more."""
        with self._lock:
            self._listeners.remove(counter)

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event == COMPILED:
            for counter in list(self._listeners):
                counter.inc()


COMPILATIONS = _Compilations()
"""Of this process."""
