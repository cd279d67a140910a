"""The load of many nodes as a table in which nodes that do the same share a row.  Pure.

Two samples of a node (karun/sampler.py) make its rates; rates are rounded to what is shown, and
nodes whose row would read the same are one row under their node set.  Ten thousand idle nodes are
one line; the one that swaps stands out.

Invariants
  * every node is in exactly one row, those without data by their reason;
  * a counter that went backwards (the node rebooted) gives no rate, never a wrong one;
  * an alarm is part of what a row reads: nodes with it and without it do not share one.

Not here: sampling, the tree, drawing with colours (karun/top_table.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from common.errors import Code, KaError
from karun.naming import Folding
from karun.results import printable
from karun.sampler import FIELDS, UNKNOWN

__all__ = ["COLUMNS", "Monitor", "Rates", "Row", "Thresholds", "rates", "to_text"]

STALE_PERIODS = 3
"""Periods without a sample after which a node has no data."""
DASH = "-"

_AT = {name: index for index, name in enumerate(FIELDS)}


@dataclass(frozen=True, slots=True)
class Rates:
    """What a node did between two samples; None where the node does not tell."""

    load: float | None
    load_per_core: float | None
    cpu: float | None
    """Busy share of all cores, 0 to 1."""
    memory: float | None
    """Share of memory that is not available to programs, 0 to 1."""
    swap_used: float | None
    """Bytes."""
    received: float | None
    sent: float | None
    disk_read: float | None
    disk_written: float | None
    """Bytes a second, as the three above."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """From where on a value is an alarm."""

    load_per_core: float = 1.5
    cpu: float = 0.95
    memory: float = 0.9
    swap_used: float = 256 << 20


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table."""

    key: str
    """The field of Rates, and the name to sort by."""
    title: str
    show: Callable[[float], str]
    alarm: str = ""
    """The field of Rates that Thresholds are asked for, if any."""


@dataclass(frozen=True, slots=True)
class Row:
    """Nodes that read the same."""

    nodes: tuple[int, ...]
    cells: tuple[str, ...]
    """As COLUMNS; empty for nodes without data."""
    alarms: tuple[bool, ...]
    reason: str = ""
    """Why there are no data."""


def rates(before: Sequence[int], after: Sequence[int]) -> Rates | None:
    """Return what happened between two samples of a node; None when they do not belong together."""
    seconds = (after[0] - before[0]) / 1000
    if seconds <= 0 or UNKNOWN in (before[0], after[0]):
        return None

    def value(name: str) -> int | None:
        found = after[_AT[name]]
        return None if found == UNKNOWN else found

    def gain(name: str) -> int | None:
        old, new = before[_AT[name]], after[_AT[name]]
        return None if UNKNOWN in (old, new) or new < old else new - old

    def rate(name: str) -> float | None:
        found = gain(name)
        return None if found is None else found / seconds

    load, cores, swap = value("load_milli"), value("core_count"), value("swap_used_kib")
    total, available = value("memory_total_kib"), value("memory_available_kib")
    busy, ticks = gain("cpu_busy_ticks"), gain("cpu_total_ticks")
    return Rates(
        load=None if load is None else load / 1000,
        load_per_core=None if load is None or not cores else load / 1000 / cores,
        cpu=None if busy is None or not ticks else min(1.0, busy / ticks),
        memory=None if available is None or not total else max(0.0, 1 - available / total),
        swap_used=None if swap is None else swap * 1024,
        received=rate("net_received_bytes"),
        sent=rate("net_sent_bytes"),
        disk_read=rate("disk_read_bytes"),
        disk_written=rate("disk_written_bytes"),
    )


class Monitor:
    """The latest of every node, by rank."""

    def __init__(self, node_count: int, period_s: float) -> None:
        self._stale_s = period_s * STALE_PERIODS
        self._samples: list[Sequence[int] | None] = [None] * node_count
        self._rates: list[Rates | None] = [None] * node_count
        self._heard = [0.0] * node_count
        self._reasons = ["no data yet"] * node_count

    def take(self, rank: int, counters: Sequence[int], now: float) -> None:
        """A node sent a sample."""
        before = self._samples[rank]
        found = rates(before, counters) if before is not None else None
        self._samples[rank], self._rates[rank], self._heard[rank] = counters, found, now
        self._reasons[rank] = "no second sample yet"

    def failed(self, rank: int, reason: str) -> None:
        """A node cannot be asked, or can no longer."""
        self._samples[rank] = self._rates[rank] = None
        self._reasons[rank] = printable(reason)

    def of(self, rank: int, now: float) -> Rates | str:
        """Return a node's rates, or why there are none."""
        if self._samples[rank] is not None and now - self._heard[rank] > self._stale_s:
            return f"no data for more than {self._stale_s:.0f} s"
        return self._rates[rank] or self._reasons[rank]

    def rows(
        self,
        now: float,
        *,
        sort: str = "load",
        thresholds: Thresholds | None = None,
        only_alarms: bool = False,
    ) -> list[Row]:
        """Return the table: the highest of a column first, nodes without data at the end.

        Raises KaError USAGE for a column that there is not.
        """
        if sort not in {column.key for column in COLUMNS}:
            keys = ", ".join(column.key for column in COLUMNS)
            raise KaError(Code.USAGE, f"no such column: {sort[:40]!r} (there are {keys})")
        limits = thresholds or Thresholds()
        found: dict[Row, tuple[float, list[int]]] = {}
        for rank in range(len(self._samples)):
            row, weight = _row(self.of(rank, now), sort, limits)
            heaviest, ranks = found.setdefault(row, (weight, []))
            ranks.append(rank)
            found[row] = (max(heaviest, weight), ranks)
        ordered = sorted(found.items(), key=lambda one: (-one[1][0], one[1][1][0]))
        return [
            Row(tuple(ranks), row.cells, row.alarms, row.reason)
            for row, (_, ranks) in ordered
            if not only_alarms or any(row.alarms) or row.reason
        ]

    def total(self, now: float) -> tuple[str, ...]:
        """Return the cells of the whole: means of shares and loads, sums of rates and swap."""
        known = [
            one for rank in range(len(self._rates)) if isinstance(one := self.of(rank, now), Rates)
        ]
        cells = []
        for column in COLUMNS:
            values = [value for one in known if (value := _value(one, column.key)) is not None]
            is_mean = column.key in ("load", "cpu", "memory")
            whole = sum(values) / (len(values) if is_mean else 1) if values else None
            cells.append(DASH if whole is None else column.show(whole))
        return tuple(cells)


def to_text(
    rows: Iterable[Row], total: Sequence[str], names: Folding, *, width: int = 100
) -> Iterator[str]:
    """Yield the table as plain lines; a value in alarm has an exclamation mark."""
    yield _line([column.title for column in COLUMNS], "nodes", width)
    for row in rows:
        label = f"{names.fold(row.nodes)} ({len(row.nodes)})"
        if row.reason:
            yield f"{label}: {row.reason}"
        else:
            marks = zip(row.cells, row.alarms, strict=True)
            yield _line([cell + "!" * alarm for cell, alarm in marks], label, width)
    yield _line(total, f"all ({len(names)})", width)


def _line(cells: Sequence[str], label: str, width: int) -> str:
    text = " ".join(f"{cell:>9}" for cell in cells)
    room = max(20, width - len(text) - 2)
    return f"{text}  {label if len(label) <= room else label[: room - 3] + '...'}"


def _row(found: Rates | str, sort: str, limits: Thresholds) -> tuple[Row, float]:
    """Return a row without its nodes, and what it is sorted by."""
    if isinstance(found, str):
        return Row((), (), (), found), -2.0
    cells, alarms = [], []
    for column in COLUMNS:
        value = _value(found, column.key)
        cells.append(DASH if value is None else column.show(value))
        alarms.append(_is_alarm(found, column, limits))
    weight = _value(found, sort)
    return Row((), tuple(cells), tuple(alarms)), -1.0 if weight is None else weight


def _value(found: Rates, key: str) -> float | None:
    value: float | None = getattr(found, key)
    return value


def _is_alarm(found: Rates, column: Column, limits: Thresholds) -> bool:
    value = _value(found, column.alarm) if column.alarm else None
    if value is None:
        return False
    limit: float = getattr(limits, column.alarm)
    return value >= limit


def _share(value: float) -> str:
    return f"{5 * round(20 * value)}%"


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _amount(value: float) -> str:
    """Two digits and a unit: fine enough to see, coarse enough to fold."""
    if value < 1000:
        return "0"
    for unit in "KMGTP":
        value /= 1000
        if value < 9.95:
            return f"{value:.0f}{unit}" if value >= 2 else f"{round(2 * value) / 2:g}{unit}"
        if value < 995:
            return f"{_two_digits(value):.0f}{unit}"
    return f"{value:.0f}E"


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")


COLUMNS = (
    Column("load", "load", _number, "load_per_core"),
    Column("cpu", "cpu", _share, "cpu"),
    Column("memory", "memory", _share, "memory"),
    Column("swap_used", "swap", _amount, "swap_used"),
    Column("received", "net in", _amount),
    Column("sent", "net out", _amount),
    Column("disk_read", "disk rd", _amount),
    Column("disk_written", "disk wr", _amount),
)
