"""The planner: which shape, which chunk size, why, and how long it will take.  Pure.

Every kind of shape is tried at its best parameters; the quickest wins, but one that is nearly as
quick (`SLACK`) and simpler is preferred: a chain keeps one connection each way, crosses each
uplink once, and has the least to repair.  The alternatives stay in the plan, to be shown.

Multicast is considered only on a shared medium, where it alone does not send everything once for
each receiver; a switched network carries a chain as quickly, and reliably.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from common.broadcast.cost import (
    CHUNK_S,
    CHUNK_SIZES,
    Cost,
    Network,
    ideal_s,
    predict,
    shared_medium_s,
)
from common.broadcast.manifest import CHUNK_COUNT_MAX, CHUNK_SIZE_MAX
from common.broadcast.topology import Kind, Shape, Topology, build
from common.errors import Code, KaError

__all__ = ["Choice", "Plan", "Request", "make_plan"]

SLACK = 1.10
"""A simpler shape may take this much longer than the quickest one."""
SIMPLE_FIRST = (
    Kind.FLAT,
    Kind.CHAIN,
    Kind.LAMBDA,
    Kind.STRIPES,
    Kind.BINOMIAL,
    Kind.BINARY,
    Kind.KARY,
    Kind.MULTICAST,
)
FANOUTS = {Kind.KARY: (4, 8, 16), Kind.STRIPES: (2, 4, 8)}
assert set(SIMPLE_FIRST) == set(Kind)
MULTICAST_CHUNK_SIZE_MAX = 256 * 1024
"""Of a chunk that lacks a single datagram at the end of the pass, all is sent again."""
FLAT_COUNT_MAX = 64
"""Connections that a source is trusted to keep busy at once; asked for, it may be more."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be planned."""

    size: int
    racks: tuple[int, ...]
    """Receivers in each rack, the source's first (see `topology.Shape`)."""
    network: Network
    kind: Kind | None = None
    """None: the planner chooses."""
    fanout: int | None = None
    chunk_size: int | None = None
    shared_medium: bool = False
    """One wire for all, as a hub or a radio cell; it carries multicast."""

    @property
    def receiver_count(self) -> int:
        return sum(self.racks)


@dataclass(frozen=True, slots=True)
class Choice:
    """One shape with its best chunk size."""

    topology: Topology
    chunk_size: int
    cost: Cost

    @property
    def shape(self) -> Shape:
        return self.topology.shape

    @property
    def name(self) -> str:
        """Return the kind, with the parameter that was chosen for it."""
        shape = self.shape
        if shape.kind is Kind.KARY:
            return f"{shape.fanout}-ary"
        if shape.kind is Kind.STRIPES:
            return f"{len(self.topology.trees)} stripes"
        name: str = shape.kind.value
        return name


@dataclass(frozen=True, slots=True)
class Plan:
    """The choice, its reason in one sentence, and what else there was, quickest first."""

    chosen: Choice
    reason: str
    alternatives: tuple[Choice, ...]
    ideal_s: float
    """The data once over the narrowest link."""


def make_plan(request: Request) -> Plan:
    """Choose; raises KaError USAGE for what cannot be planned."""
    if request.size < 0:
        raise KaError(Code.USAGE, "a size cannot be negative")
    considered = request.shared_medium or request.kind is Kind.MULTICAST
    kinds = [kind for kind in Kind if kind is not Kind.MULTICAST or considered]
    choices = {kind: _best(kind, request) for kind in kinds}
    quickest = min(choices.values(), key=lambda choice: choice.cost.seconds)
    if request.kind is not None:
        chosen = choices[request.kind]
    else:
        chosen = next(
            choices[kind]
            for kind in SIMPLE_FIRST
            if kind in choices and _preferable(choices[kind], quickest, request)
        )
    others = [choice for choice in choices.values() if choice is not chosen]
    others.sort(key=lambda choice: choice.cost.seconds)
    return Plan(
        chosen,
        _reason(chosen, quickest, request),
        tuple(others),
        ideal_s(request.racks, request.size, request.network),
    )


def _preferable(choice: Choice, quickest: Choice, request: Request) -> bool:
    if choice.shape.kind is Kind.FLAT and request.receiver_count > FLAT_COUNT_MAX:
        return choice is quickest
    return choice.cost.seconds <= quickest.cost.seconds * SLACK


def _best(kind: Kind, request: Request) -> Choice:
    fanouts: Iterable[int] = FANOUTS.get(kind, (2,))
    if request.fanout is not None and kind in FANOUTS:
        fanouts = (request.fanout,)
    whole = max(1, request.size)
    tried: list[Choice] = []
    for fanout in fanouts:
        chunk_sizes = _chunk_sizes(request, fanout if kind is Kind.STRIPES else 1)
        if kind is Kind.MULTICAST and request.chunk_size is None:
            small = [size for size in chunk_sizes if size <= MULTICAST_CHUNK_SIZE_MAX]
            chunk_sizes = tuple(small) or chunk_sizes[:1]
        if kind is Kind.LAMBDA:
            topologies = {size: _lambda(min(size, whole), request) for size in chunk_sizes}
        else:
            topologies = dict.fromkeys(chunk_sizes, build(Shape(kind, request.racks, fanout)))
        for chunk_size, topology in topologies.items():
            cost = predict(topology, request.size, chunk_size, request.network)
            if request.shared_medium:
                seconds = shared_medium_s(topology, request.size, request.network)
                cost = Cost(seconds, cost.fill_s, "the shared medium")
            tried.append(Choice(topology, min(chunk_size, whole), cost))
    # Of equal ones the largest chunk: fewer to keep account of.
    return min(tried, key=lambda choice: (choice.cost.seconds, -choice.chunk_size))


def _chunk_sizes(request: Request, tree_count: int) -> tuple[int, ...]:
    """Return the chunk sizes to try: neither the manifest nor a chunk may become too large."""
    smallest = max(1, -(-request.size // CHUNK_COUNT_MAX))
    network = request.network
    rate = min(network.rate, network.uplink_rate or network.rate) / tree_count
    largest = max(CHUNK_SIZES[0], smallest, rate * CHUNK_S)
    if smallest > CHUNK_SIZE_MAX:
        raise KaError(Code.USAGE, "more than one transfer can hold (4TiB)")
    if request.chunk_size is not None:
        if not smallest <= request.chunk_size <= CHUNK_SIZE_MAX:
            raise KaError(
                Code.USAGE, f"the chunk size must be between {smallest} and {CHUNK_SIZE_MAX} bytes"
            )
        return (request.chunk_size,)
    rounded = 1 << (smallest - 1).bit_length()
    return tuple(size for size in CHUNK_SIZES if smallest <= size <= largest) or (rounded,)


def _lambda(chunk_size: int, request: Request) -> Topology:
    """Build the tree that is optimal for one chunk of this size.

    Only the ratio of the two times matters, so they may be rounded up to microseconds.
    """
    network = request.network
    gap_s = network.hop_overhead_s + chunk_size / network.rate
    gap_us = max(1, round(gap_s * 1e6))
    ready_us = max(gap_us, round((gap_s + network.latency_s) * 1e6))
    return build(Shape(Kind.LAMBDA, request.racks, gap_us=gap_us, ready_us=ready_us))


def _reason(chosen: Choice, quickest: Choice, request: Request) -> str:
    sentence = _REASONS[chosen.shape.kind]
    if request.receiver_count == 1:
        sentence = "there is one receiver, and one way to reach it"
    elif request.shared_medium and chosen.shape.kind is Kind.MULTICAST:
        sentence = "on a shared medium everything else sends the data once for each receiver"
    elif _is_pipeline(chosen) and request.size > chosen.chunk_size:
        share = chosen.cost.fill_s / chosen.cost.seconds if chosen.cost.seconds else 0
        sentence += f"; {100 * share:.1f} % of the time is filling the pipeline"
    if request.kind is not None:
        sentence = f"asked for; {sentence}"
    if chosen is not quickest:
        more = 100 * (chosen.cost.seconds / quickest.cost.seconds - 1)
        comparison = f"{more:.1f} % slower than {quickest.name}"
        if request.kind is None:
            sentence += f"; {comparison}, which is more to set up and to repair"
        else:
            sentence += f"; {comparison}"
    return sentence


def _is_pipeline(choice: Choice) -> bool:
    return choice.shape.kind is not Kind.MULTICAST and choice.topology.trees[0].depth > 0


_REASONS = {
    Kind.FLAT: "the source reaches the few receivers itself as quickly as any relay would",
    Kind.CHAIN: "every node sends and receives each byte once, so the links are used in full",
    Kind.LAMBDA: "the data are so small that the time to reach everyone is all that counts, "
    "and here whoever has them passes them on at once",
    Kind.STRIPES: "every node relays one stripe only, so links are used in full and the pipeline "
    "stays short",
    Kind.BINOMIAL: "everyone who has the data passes them on, twice as many each round",
    Kind.BINARY: "two copies from every relay, and few levels",
    Kind.KARY: "many copies from every relay, and very few levels",
    Kind.MULTICAST: "the network makes the copies; a chain brings what a node lacks then",
}
