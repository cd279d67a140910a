"""The metrics registry: what a daemon counts, for `status` and for Prometheus.

Metrics are declared at import time beside the code that counts; `render` gives Prometheus' text
format, `values` a flat mapping for status answers.  Names start with `ka_` or the tool's name and
end with their unit; labels have few values.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

__all__ = ["counter", "gauge", "registry", "render", "values"]

registry = CollectorRegistry()


def counter(name: str, meaning: str, *labels: str) -> Counter:
    """Declare something that only grows."""
    return Counter(name, meaning, labels, registry=registry)


def gauge(name: str, meaning: str, *labels: str) -> Gauge:
    """Declare something that goes up and down."""
    return Gauge(name, meaning, labels, registry=registry)


def render() -> bytes:
    """Return all metrics in Prometheus' text format."""
    return generate_latest(registry)


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
