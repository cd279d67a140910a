"""The metrics registry: what a daemon counts, for `status` and for Prometheus.

Metrics are declared at import time beside the code that counts; `serve_http` offers them to
Prometheus, `values` is a flat mapping for status answers.  Names start with `ka_` or the tool's
name and end with their unit; labels have few values.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from common.errors import Code, KaError

__all__ = ["counter", "gauge", "registry", "serve_http", "values"]

registry = CollectorRegistry()


def counter(name: str, meaning: str, *labels: str) -> Counter:
    """Declare something that only grows."""
    return Counter(name, meaning, labels, registry=registry)


def gauge(name: str, meaning: str, *labels: str) -> Gauge:
    """Declare something that goes up and down."""
    return Gauge(name, meaning, labels, registry=registry)


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
