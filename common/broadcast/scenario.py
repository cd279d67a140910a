"""Scenarios for the simulator: a broadcast, a network, and what goes wrong and when.  Pure.

A scenario is data and prints itself: its text, or the seed that `draw` was given, is all that it
takes to run it again.  Faults stop at `calm_s` at the latest; what is not lasting is over by then.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from common.broadcast.node import HopOptions
from common.broadcast.topology import Kind, Shape

__all__ = ["Fault", "FaultKind", "Rng", "Scenario", "draw"]

LINK_RATE = 125e6


class Rng(Protocol):
    """What is needed of `random.Random`."""

    def random(self) -> float: ...
    def uniform(self, a: float, b: float) -> float: ...
    def randint(self, a: int, b: int) -> int: ...
    def choice(self, seq: Sequence[Kind]) -> Kind: ...


class FaultKind(enum.Enum):
    KILL = "kill"
    """The process dies; its connections are reset.  Comes back at `until_s`, if that is set."""
    POWER_OFF = "power off"
    """The machine is gone without a word.  Comes back at `until_s`, if that is set."""
    PAUSE = "pause"
    """SIGSTOP until `until_s`."""
    CUT = "cut"
    """Nothing passes between `rank` and `other` until `until_s`."""
    SLOW = "slow"
    """The node's link has a twentieth of its rate, for good."""
    SINK_FULL = "sink full"
    SINK_HANGS = "sink hangs"
    """Until `until_s`."""


@dataclass(frozen=True, slots=True)
class Fault:
    kind: FaultKind
    rank: int
    at_s: float
    until_s: float = 0.0
    """0: for good."""
    other: int = -1


@dataclass(frozen=True, slots=True)
class Scenario:
    shape: Shape
    chunk_count: int = 64
    chunk_size: int = 1 << 18
    link_rate: float = LINK_RATE
    latency_s: float = 0.0002
    uplink_rate: float = 0.0
    """Of each rack, each way; 0 for "not a limit"."""
    disk_rate: float = 4e8
    damaged_share: float = 0.0
    """Of chunks on the wire."""
    spoilt_share: float = 0.0
    """Of chunks written to a sink."""
    faults: tuple[Fault, ...] = ()
    calm_s: float = 0.0
    options: HopOptions = field(default_factory=HopOptions)


def draw(rng: Rng, *, receiver_count: int, chunk_count: int, kind: Kind | None = None) -> Scenario:
    """Return a scenario with some of every fault; one node in thirty has one."""
    if kind is None:
        kind = rng.choice([one for one in Kind if one is not Kind.FLAT or receiver_count < 100])
    chunk_size = 1 << 18
    link_rate = LINK_RATE / rng.randint(1, 10)
    ideal_s = chunk_count * chunk_size / link_rate
    calm_s = ideal_s + 4
    faults = tuple(
        _draw_fault(rng, receiver_count, ideal_s, calm_s)
        for _ in range(max(1, round(receiver_count / 30)))
    )
    return Scenario(
        shape=Shape(kind, _draw_racks(rng, receiver_count), fanout=rng.randint(2, 4)),
        chunk_count=chunk_count,
        chunk_size=chunk_size,
        link_rate=link_rate,
        latency_s=rng.uniform(0.00005, 0.002),
        damaged_share=rng.random() * 0.01,
        spoilt_share=rng.random() * 0.002,
        faults=faults,
        calm_s=calm_s,
        options=HopOptions(
            expected_rate=link_rate,
            lost_grace_s=calm_s + 2,  # the source waits for whoever may come back
            quiet_s=calm_s + 5,
            verify_count_max=6,
        ),
    )


def _draw_racks(rng: Rng, receiver_count: int) -> tuple[int, ...]:
    racks: list[int] = []
    left = receiver_count
    while left:
        size = min(left, rng.randint(1, max(1, receiver_count // 2)))
        racks.append(size)
        left -= size
    return tuple(racks)


def _draw_fault(rng: Rng, receiver_count: int, ideal_s: float, calm_s: float) -> Fault:
    kinds = list(FaultKind)
    kind = kinds[rng.randint(0, len(kinds) - 1)]
    rank = rng.randint(1, receiver_count)
    at_s = rng.uniform(0, ideal_s * 1.2)
    until_s = rng.uniform(at_s + 0.05, calm_s)
    other = -1
    match kind:
        case FaultKind.KILL | FaultKind.POWER_OFF:
            until_s = until_s if rng.random() < 0.5 else 0.0
        case FaultKind.CUT:
            other = (rank + rng.randint(1, receiver_count)) % (receiver_count + 1)
            if rng.random() < 0.7:  # the edge of a chain: a cut between strangers hurts nobody
                other = rank - 1
        case FaultKind.SLOW | FaultKind.SINK_FULL:
            until_s = 0.0
        case _:
            pass
    return Fault(kind, rank, at_s, until_s, other)
