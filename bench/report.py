"""The tables of a run, from its samples.  Pure.

A rate is the median of the runs; the spread behind it is half the distance between the fastest and
the slowest run, so that noise can be seen.  Processor time is summed over the runs before it is
divided by the work, because one run's may be a few clock ticks only.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.model import Failure, Sample, Unit

__all__ = ["Figure", "best_peer", "elsewhere", "ratio", "render", "summarise"]

OURS = "nfsp"
BASELINE = "local"
_NONE = "-"


@dataclass(frozen=True, slots=True)
class Figure:
    """One workload on one system, over all runs."""

    rate: float
    """Median, in the unit's own measure (MB/s, files/s, reads/s)."""
    spread: float
    """Half the range, as a share of the median."""
    servers_cpu: float
    """Seconds for one GB, or for 1,000 files or reads."""
    client_cpu: float
    load_cpu: float


Figures = Mapping[tuple[str, str], Figure]
"""By (workload, system)."""


def summarise(
    samples: Iterable[Sample], units: Mapping[str, Unit]
) -> dict[tuple[str, str], Figure]:
    """Return one figure for each workload and system that has samples."""
    by_key: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        by_key.setdefault((sample.workload, sample.system), []).append(sample)
    return {key: _figure(group, units[key[0]]) for key, group in by_key.items()}


def _figure(samples: Sequence[Sample], unit: Unit) -> Figure:
    rates = [sample.amount / sample.seconds / unit.rate_divisor for sample in samples]
    rate = statistics.median(rates)
    work = sum(sample.amount for sample in samples) / unit.cpu_divisor
    return Figure(
        rate=rate,
        spread=(max(rates) - min(rates)) / 2 / rate,
        servers_cpu=sum(sample.cpu_servers_s for sample in samples) / work,
        client_cpu=sum(sample.cpu_client_s for sample in samples) / work,
        load_cpu=sum(sample.cpu_load_s for sample in samples) / work,
    )


def elsewhere(samples: Sequence[Sample], processor_count: int) -> float:
    """Return the share of the machine that others used while something was timed."""
    seconds = sum(sample.seconds for sample in samples) * processor_count
    return sum(sample.cpu_elsewhere_s for sample in samples) / seconds if seconds else 0.0


def best_peer(figures: Figures, workload: str) -> str | None:
    """Return the fastest system that is neither ours nor the local disk."""
    peers = {
        system: figure.rate
        for (name, system), figure in figures.items()
        if name == workload and system not in (OURS, BASELINE)
    }
    return max(peers, key=lambda system: peers[system], default=None)


def ratio(figures: Figures, workload: str, system: str, to: str) -> float | None:
    """Return how many times as fast *system* is as *to*; None where one was not measured."""
    above, below = figures.get((workload, system)), figures.get((workload, to))
    if above is None or below is None:
        return None
    return above.rate / below.rate


def render(
    samples: Sequence[Sample],
    units: Mapping[str, Unit],
    *,
    systems: Sequence[str],
    facts: Mapping[str, str],
    failures: Sequence[Failure],
) -> str:
    """Return the whole report; *units* gives the workloads in the order of the rows."""
    figures = summarise(samples, units)
    workloads = [name for name in units if any((name, system) in figures for system in systems)]
    systems = [system for system in systems if any((name, system) in figures for name in workloads)]
    runs = len({sample.run for sample in samples})
    parts = [_facts(facts)]
    if workloads:
        parts += [
            f"Rates: median of {_plural(runs, 'run')}, ± half the range; MB = 10^6 bytes",
            _rates(figures, units, workloads, systems),
            "Processor seconds: servers + client (and the load generator's own)",
            _cpu(figures, units, workloads, systems),
        ]
    if failures:
        lines = [f"  {failure.system}, {failure.where}: {failure.reason}" for failure in failures]
        parts.append("\n".join(["FAILED", *lines]))
    return "\n\n".join(parts) + "\n"


def _facts(facts: Mapping[str, str]) -> str:
    width = max(map(len, facts), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def _rates(
    figures: Figures, units: Mapping[str, Unit], workloads: Sequence[str], systems: Sequence[str]
) -> str:
    header = ["workload", "unit", *systems, f"{OURS}/best peer", f"{OURS}/{BASELINE}"]
    rows = []
    for name in workloads:
        row = [name, units[name].rate_name]
        for system in systems:
            figure = figures.get((name, system))
            row.append(_NONE if figure is None else f"{_number(figure.rate)} ±{figure.spread:.0%}")
        peer = best_peer(figures, name)
        to_peer = None if peer is None else ratio(figures, name, OURS, peer)
        row.append(_NONE if to_peer is None else f"{to_peer:.2f} ({peer})")
        to_local = ratio(figures, name, OURS, BASELINE)
        row.append(_NONE if to_local is None else f"{to_local:.2f}")
        rows.append(row)
    return _table(header, rows)


def _cpu(
    figures: Figures, units: Mapping[str, Unit], workloads: Sequence[str], systems: Sequence[str]
) -> str:
    rows = []
    for name in workloads:
        row = [name, units[name].cpu_name]
        for system in systems:
            figure = figures.get((name, system))
            if figure is None:
                row.append(_NONE)
            elif system == BASELINE:  # no daemon: the kernel works for the load generator
                row.append(f"({figure.load_cpu:.2f})")
            else:
                used = f"{figure.servers_cpu:.2f} + {figure.client_cpu:.2f}"
                row.append(f"{used} ({figure.load_cpu:.2f})")
        rows.append(row)
    return _table(["workload", "unit", *systems], rows)


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns: names to the left, figures to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rendered = []
    for line in lines:
        texts = [
            f"{text:<{width}}" if column < 2 else f"{text:>{width}}"
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        rendered.append("  ".join(texts).rstrip())
    rendered.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(rendered)
