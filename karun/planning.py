"""What `karun plan` asks and shows: options to a planner's request, a plan to text or JSON.

Decides nothing about broadcasts; that is `common.broadcast.planner`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from common import nodeset
from common.broadcast.cost import Network
from common.broadcast.planner import Choice, Plan, Request
from common.broadcast.topology import SOURCE, Kind, Tree
from common.config import format_size, parse_size
from common.errors import Code, KaError

__all__ = ["describe", "make_request", "parse_rate", "rack_sizes", "to_json"]

SOURCE_NAME = "(source)"
TREE_COUNT_MAX = 64
"""Receivers up to which a plan is drawn unasked: about a screen."""

_RATE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([kKMGT]?)(bit|bps|B)(?:/s)?")
_SCALE = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def make_request(
    node_count: int,
    size: int,
    *,
    link: str,
    latency_ms: float,
    rack_size: int | None,
    uplink: str | None,
    topology: str | None,
    multicast: bool,
    fanout: int | None,
    chunk_size: str | None,
    shared_medium: bool,
) -> Request:
    """Return what the options of `karun plan` ask for; raises KaError USAGE."""
    rate = parse_rate(link)
    return Request(
        size=size,
        racks=rack_sizes(node_count, rack_size),
        network=Network(
            up_rate=rate,
            down_rate=rate,
            latency_s=latency_ms / 1000,
            uplink_rate=parse_rate(uplink) if uplink else 0,
        ),
        kind=kind_of(topology, multicast),
        fanout=fanout,
        chunk_size=parse_size(chunk_size) if chunk_size else None,
        shared_medium=shared_medium,
    )


def kind_of(topology: str | None, multicast: bool) -> Kind | None:
    """Return the kind that is asked for; raises KaError USAGE when two are."""
    if multicast and topology not in (None, Kind.MULTICAST.value):
        raise KaError(Code.USAGE, f"--multicast is a topology: not together with {topology}")
    return Kind(topology or Kind.MULTICAST.value) if topology or multicast else None


def parse_rate(text: str) -> float:
    """Return the bytes a second in "1Gbit", "200Mbit/s" or "125MB/s"; raises KaError USAGE.

    Rates count in 1000, as networks do.
    """
    match = _RATE.fullmatch(text.strip())
    if match is None or not Fraction(match[1]):
        raise KaError(Code.USAGE, f"not a rate (such as 1Gbit): {text[:60]!r}")
    number, scale, unit = match.groups()
    return float(Fraction(number) * _SCALE[scale] / (1 if unit == "B" else 8))


def rack_sizes(node_count: int, rack_size: int | None) -> tuple[int, ...]:
    """Return the receivers of each rack: the nodes in order, *rack_size* in each."""
    if node_count == 0:
        raise KaError(Code.USAGE, "no nodes: -w names an empty set")
    if rack_size is None:
        return (node_count,)
    full, rest = divmod(node_count, rack_size)
    return (rack_size,) * full + ((rest,) if rest else ())


def to_json(plan: Plan, names: Sequence[str], size: int, *, tree: bool) -> dict[str, Any]:
    """Return the plan as what JSON can hold; times in seconds, sizes in bytes."""
    found: dict[str, Any] = {
        "nodes": len(names),
        "size": size,
        "ideal_s": plan.ideal_s,
        "choice": _choice_json(plan.chosen),
        "reason": plan.reason,
        "alternatives": [_choice_json(choice) for choice in plan.alternatives],
    }
    if tree or len(names) <= TREE_COUNT_MAX:
        found["trees"] = [
            {names[rank - 1]: _name(names, parent) for rank, parent in _edges(one)}
            for one in plan.chosen.topology.trees
        ]
    return found


def _choice_json(choice: Choice) -> dict[str, Any]:
    trees = choice.topology.trees
    return {
        "topology": choice.shape.kind.value,
        "name": choice.name,
        "chunk_size": choice.chunk_size,
        "seconds": choice.cost.seconds,
        "fill_s": choice.cost.fill_s,
        "bottleneck": choice.cost.bottleneck,
        "trees": len(trees),
        "depth": max(tree.depth for tree in trees),
        "fanout": max(tree.fanout for tree in trees),
    }


def describe(plan: Plan, names: Sequence[str], size: int, *, tree: bool) -> Iterator[str]:
    """Yield the plan line by line, for people."""
    chosen = plan.chosen
    yield f"{format_size(size)} to {len(names)} nodes ({nodeset.fold(names)})"
    yield f"topology   {chosen.name}, chunks of {format_size(chosen.chunk_size)}"
    yield f"because    {plan.reason}"
    limit = f"limited by {chosen.cost.bottleneck}"
    yield f"predicted  {_seconds(chosen.cost.seconds)} ({limit}; ideal {_seconds(plan.ideal_s)})"
    yield ""
    yield "alternative      time    chunk  depth  fan-out"
    for choice in (chosen, *plan.alternatives):
        trees = choice.topology.trees
        yield (
            f"{choice.name:12} {_seconds(choice.cost.seconds):>8} "
            f"{format_size(choice.chunk_size):>8} {max(one.depth for one in trees):6} "
            f"{max(one.fanout for one in trees):8}"
        )
    if tree or len(names) <= TREE_COUNT_MAX:
        for index, one in enumerate(chosen.topology.trees):
            yield ""
            if len(chosen.topology.trees) > 1:
                yield f"tree of stripe {index}"
            yield from _draw(one, names)


def _draw(tree: Tree, names: Sequence[str]) -> Iterator[str]:
    """Draw a tree; a relay with one child goes on in the same line, so that a chain is one."""
    waiting = [(SOURCE, "", "")]
    while waiting:
        rank, first, indent = waiting.pop()
        line = first + _name(names, rank)
        while len(children := tree.children[rank]) == 1 and len(line) < 88:
            rank = children[0]
            line += f" > {_name(names, rank)}"
        yield line
        last = len(children) - 1
        for turn in range(last, -1, -1):
            if last == 0:  # the line was full
                waiting.append((children[turn], f"{indent}> ", indent))
            else:
                rail = "   " if turn == last else "|  "
                waiting.append((children[turn], f"{indent}+- ", indent + rail))


def _edges(tree: Tree) -> Iterator[tuple[int, int]]:
    return ((rank, parent) for rank, parent in enumerate(tree.parents) if parent >= 0)


def _name(names: Sequence[str], rank: int) -> str:
    return SOURCE_NAME if rank == SOURCE else names[rank - 1]


def _seconds(seconds: float) -> str:
    if seconds < 0.1:
        return f"{1000 * seconds:.1f} ms"
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:,.0f} s"
