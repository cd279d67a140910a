"""How kaboot shows things: tables for people, objects for programs.

Decides nothing and reads nothing; `now_ns` is an argument.  Times in JSON are nanoseconds since
1970, ages in tables are round.  What machines said of themselves is printable before it gets here,
and is made so once more.

Not here: where the facts come from (control.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from kaboot.control import NodeStatus
from kaboot.store import Event, MachineRow
from kaboot.words import printable

__all__ = [
    "age",
    "event_json",
    "event_lines",
    "machine_json",
    "machine_lines",
    "node_json",
    "node_lines",
]


def age(then_ns: int, now_ns: int) -> str:
    """Return how long ago something was: 5s, 3m, 7h, 2d."""
    seconds = max(now_ns - then_ns, 0) // 10**9
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "m"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds // size}{unit}"
    return f"{seconds // 86400}d"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with columns as wide as they need."""
    cells = [list(head), *([printable(cell, 80) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def node_lines(nodes: Sequence[NodeStatus], now_ns: int) -> list[str]:
    """Return the table of nodes."""
    head = ("NODE", "STEP", "SINCE", "MAC", "ADDRESS", "LAST SEEN", "STAGE")
    rows = []
    for status in nodes:
        node, seen = status.node, status.seen
        address = str(node.address) if node.address else (seen.machine.address if seen else "")
        rows.append(
            (
                node.name,
                str(status.assignment),
                age(status.since_ns, now_ns) if status.since_ns else "-",
                (seen.machine.mac if seen else node.macs[0]) if node.macs else "not learned",
                address or "-",
                age(seen.last_ns, now_ns) if seen else "never",
                f"{seen.stage} {seen.detail}" if seen else "-",
            )
        )
    return _table(head, rows)


def machine_lines(machines: Sequence[MachineRow], now_ns: int) -> list[str]:
    """Return the table of unknown machines."""
    head = ("UNKNOWN MACHINE", "ADDRESS", "PRODUCT", "SERIAL", "LAST SEEN", "STAGE")
    return _table(
        head,
        [
            (
                row.machine.mac,
                row.machine.address or "-",
                row.machine.product or "-",
                row.machine.serial or "-",
                age(row.last_ns, now_ns),
                f"{row.stage} {row.detail}",
            )
            for row in machines
        ],
    )


def event_lines(events: Sequence[Event]) -> list[str]:
    """Return events, a line each: UTC time, node or MAC, stage, detail."""
    return [
        f"{datetime.fromtimestamp(event.at_ns / 1e9, UTC):%Y-%m-%d %H:%M:%S}Z"
        f"  {event.node or event.mac:<17}  {event.stage:<12}"
        f" {printable(event.detail, 200)}".rstrip()
        for event in events
    ]


def node_json(status: NodeStatus) -> dict[str, Any]:
    node = status.node
    return {
        "name": node.name,
        "macs": list(node.macs),
        "address": str(node.address) if node.address else None,
        "arch": node.arch.value,
        "firmware": node.firmware.value,
        "loader": node.loader.value,
        "rack": node.rack,
        "serial": node.serial,
        "step": status.assignment.step.value,
        "profile": status.assignment.profile,
        "since_ns": status.since_ns,
        "seen": machine_json(status.seen) if status.seen else None,
    }


def machine_json(row: MachineRow) -> dict[str, Any]:
    machine = row.machine
    return {
        "mac": machine.mac,
        "platform": machine.platform,
        "arch": machine.arch,
        "serial": machine.serial,
        "product": machine.product,
        "address": machine.address,
        "stage": row.stage,
        "detail": row.detail,
        "first_ns": row.first_ns,
        "last_ns": row.last_ns,
    }


def event_json(event: Event) -> dict[str, Any]:
    return {
        "id": event.id,
        "at_ns": event.at_ns,
        "mac": event.mac,
        "node": event.node,
        "stage": event.stage,
        "detail": event.detail,
    }
