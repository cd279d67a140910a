"""The metrics registry: what a daemon counts, for `status` and for Prometheus.

Metrics are declared at import time beside the code that counts; `serve_http` offers them to
Prometheus, `values` is a flat mapping for status answers.  Names start with `ka_` or the tool's
name and end with their unit; labels have few values.

Without prometheus_client nothing is counted: a node that takes part in a broadcast runs modules
that count, and nobody asks it what.
"""

from __future__ import annotations

from typing import Any

from common.errors import Code, KaError

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
except ImportError:
    PRESENT = False
else:
    PRESENT = True
    registry = CollectorRegistry()

__all__ = ["counter", "gauge", "registry", "serve_http", "values"]


class _Uncounted:
    """Takes what it is told, and forgets it."""

    def labels(self, *_values: str) -> _Uncounted:
        return self

    def inc(self, _amount: float = 1) -> None:
        pass

    def set(self, _value: float) -> None:
        pass


def counter(name: str, meaning: str, *labels: str) -> Counter:
    """Declare something that only grows."""
    return Counter(name, meaning, labels, registry=registry) if PRESENT else _uncounted()


def gauge(name: str, meaning: str, *labels: str) -> Gauge:
    """Declare something that goes up and down."""
    return Gauge(name, meaning, labels, registry=registry) if PRESENT else _uncounted()


def _uncounted() -> Any:
    return _Uncounted()


def serve_http(host: str, port: int) -> None:
    """Serve Prometheus' text format over HTTP, in a thread, until the process ends.

    Raises KaError BUSY when the address cannot be had.  There is no authentication: choose an
    address that only those see who may.
    """
    try:
        start_http_server(port, host, registry)
    except OSError as error:
        raise KaError(
            Code.BUSY, f"cannot serve metrics on {host}:{port}: {error.strerror}"
        ) from None


def values() -> dict[str, float]:
    """Return all samples by name, labels in braces."""
    result: dict[str, float] = {}
    for family in registry.collect():
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            result[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return result
