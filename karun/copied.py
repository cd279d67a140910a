"""What copies and gathers are asked and what came of them: options, results, exit codes.  Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from common.broadcast.topology import Kind
from common.errors import Code, KaError
from karun.naming import Folding

__all__ = ["Copied", "CopyOptions", "Step", "exit_code", "racks_of", "report", "with_latecomers"]

ALL, NONE, SOME = 0, 1, 2


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """How a copy is sent; what is not said is planned."""

    topology: Kind | None = None
    shared_medium: bool = False
    """All nodes share one wire or radio cell, which carries multicast."""
    fanout: int | None = None
    chunk_size: int | None = None
    link_rate: float = 0.0
    """Bytes a second of a node's link, each way.  0: not known, and nobody is measured by it."""
    rate_limit: float = 0.0
    """Bytes a second that a node may send; 0: no limit."""
    rack_size: int | None = None
    """Nodes in each rack, in the order of the nodes; the source is in the first."""
    uplink_rate: float = 0.0
    """Bytes a second of a rack's uplink; 0: not a limit."""
    address: str = ""
    """Where nodes reach this machine.  Empty: the address from which it reaches them."""
    command: str = ""
    """A line for the node's shell, whose standard input takes what comes: no destination then."""
    sudo: bool = False
    """On the nodes as root, by `sudo -n`."""
    ride_size_max: int | None = None
    """Files of no more bytes in all go by the connections of the run.  None: as is sensible."""


@dataclass(frozen=True, slots=True)
class Copied:
    """What became of one node."""

    rank: int
    node: str
    reason: str | None = None
    """Why it does not have everything, in one line; None: it has, and it was verified there."""
    note: str = ""
    """What its keeper should know all the same: that it was slow, say."""


@dataclass(frozen=True, slots=True)
class Step:
    """How far a copy or a gather is."""

    name: str
    """What is on its way."""
    size: int
    """Bytes for each node; 0: not known."""
    node_count: int
    done_count: int
    """Nodes that have it all, verified."""
    total_size: int
    """Bytes that all nodes together have."""
    sent_size: int = 0
    """Bytes that have left this machine."""


def with_latecomers(results: Iterable[Copied], came_s: Mapping[int, float]) -> list[Copied]:
    """Return the results with a note of who came late; *came_s*: by rank, after how long."""
    return [_noted(result, came_s.get(result.rank)) for result in results]


def _noted(result: Copied, seconds: float | None) -> Copied:
    if seconds is None:
        return result
    note = f"was reached only after {seconds:.0f} s"
    return dataclasses.replace(result, note=f"{note}; {result.note}" if result.note else note)


def exit_code(results: Iterable[Copied]) -> int:
    """Return 0 when all nodes have it, 2 when some have, 1 when none has."""
    good = [result.reason is None for result in results]
    if all(good):
        return ALL
    return SOME if any(good) else NONE


def report(results: Sequence[Copied], names: Folding) -> list[str]:
    """Return a line for each reason, and for each note, with its nodes."""
    found: dict[str, list[int]] = {}
    for result in results:
        if result.reason is not None:
            found.setdefault(result.reason, []).append(result.rank)
        elif result.note:
            found.setdefault(f"note: {result.note}", []).append(result.rank)
    return [f"{names.fold(ranks)}: {reason}" for reason, ranks in found.items()]


def racks_of(ranks: Sequence[int], rack_size: int | None) -> tuple[int, ...]:
    """Return how many of *ranks*, which are in order, are in each rack; the first may have none."""
    if rack_size is None:
        return (len(ranks),)
    if rack_size < 1:
        raise KaError(Code.USAGE, "a rack has at least one node")
    counts: dict[int, int] = {0: 0}
    for rank in ranks:
        counts[rank // rack_size] = counts.get(rank // rack_size, 0) + 1
    return tuple(counts[rack] for rack in sorted(counts))
