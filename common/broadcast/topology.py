"""Topologies: who feeds whom in a broadcast.  Pure.

Ranks: 0 is the source, 1 .. n the receivers, numbered rack by rack (`rack_order`), the source's
rack first.  A `Shape` is the compact form that travels; `build` turns it into a `Topology` of one
or more trees, the same on every node.  With m trees, chunk c goes down tree c % m.

Invariants of every tree, whatever the shape:
  * every rank appears once, 0 is the root, there are no cycles;
  * `position` is the place in breadth-first order: a parent's is lower than its children's.  A
    node is only ever fed by one of a lower position, also after repairs: so no cycle can form;
  * each rack is entered once, so each of m trees brings 1/m of the data over its uplink.

Shapes: flat (the source feeds all), binomial, binary, k-ary, lambda (Bar-Noy and Kipnis' postal
model: a call occupies the caller for a gap, and makes the called one a caller after a longer
time), chain, stripes (m trees of fan-out m in which a node relays in one tree and is a leaf in the
others: SplitStream, and Sanders, Speck and Träff's two trees for m = 2), multicast (a
chain, for what is lacking after the pass).  Not here: times (`cost`) and the choice (`planner`).
"""

from __future__ import annotations

import enum
import heapq
from collections import deque
from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from dataclasses import dataclass

from common.errors import Code, KaError

__all__ = ["SOURCE", "Kind", "Shape", "Topology", "Tree", "build", "rack_order"]

SOURCE = 0
FANOUT_MAX = 64
"""Of k-ary trees and stripes; a node that feeds more should be planned flat."""
CONTROL_FANOUT = 16
"""Of the control tree: 10,000 nodes in four levels, and few reports at once for each to merge."""

Children = list[list[int]]


class Kind(enum.Enum):
    """The shapes, by the name that users type."""

    FLAT = "flat"
    BINOMIAL = "binomial"
    BINARY = "binary"
    KARY = "k-ary"
    LAMBDA = "lambda"
    CHAIN = "chain"
    STRIPES = "stripes"
    MULTICAST = "multicast"


@dataclass(frozen=True, slots=True)
class Shape:
    """All that it takes to build a topology."""

    kind: Kind
    racks: tuple[int, ...]
    """Receivers in each rack, in rank order; the first rack is the source's and may have none."""
    fanout: int = 2
    """Of k-ary; the number of trees of stripes."""
    gap_us: int = 1
    ready_us: int = 1
    """Of lambda: how long a call occupies the caller; when the called one can call."""

    def __post_init__(self) -> None:
        if not self.racks or min(self.racks) < 0 or 0 in self.racks[1:] or not sum(self.racks):
            raise KaError(Code.USAGE, "a broadcast needs receivers in every rack but the source's")
        if not 1 <= self.fanout <= FANOUT_MAX:
            raise KaError(Code.USAGE, f"the fan-out must be between 1 and {FANOUT_MAX}")
        if not 0 < self.gap_us <= self.ready_us:
            raise KaError(Code.USAGE, "a call must take time, and be over before it has an effect")

    @property
    def receiver_count(self) -> int:
        return sum(self.racks)


@dataclass(frozen=True, slots=True)
class Tree:
    """One tree over the ranks 0 .. n."""

    parents: tuple[int, ...]
    """By rank; -1 for the source."""
    children: tuple[tuple[int, ...], ...]
    """By rank, in the order in which they are fed."""
    positions: tuple[int, ...]
    """By rank: the place in breadth-first order."""
    depths: tuple[int, ...]
    """By rank: edges from the source."""

    @property
    def depth(self) -> int:
        return max(self.depths)

    @property
    def fanout(self) -> int:
        return max(map(len, self.children))

    def ancestors(self, rank: int) -> Iterator[int]:
        """Yield who may feed *rank* when its parent is lost, nearest first, the source last."""
        while (rank := self.parents[rank]) >= 0:
            yield rank

    def below(self, rank: int) -> int:
        """Return the set of ranks in the part of the tree that begins with *rank*."""
        found, waiting = 0, [rank]
        while waiting:
            one = waiting.pop()
            found |= 1 << one
            waiting.extend(self.children[one])
        return found

    def foster(self, rank: int, lost: Container[int]) -> int:
        """Return the nearest ancestor of *rank* that is not lost; the source always counts."""
        return next((one for one in self.ancestors(rank) if one not in lost), SOURCE)

    def successors(self, rank: int, lost: Container[int]) -> list[int]:
        """Return whom *rank* feeds: its children, those of a lost one in the place of that one."""
        found: list[int] = []
        waiting = deque(self.children[rank])
        while waiting:
            one = waiting.popleft()
            if one in lost:
                waiting.extendleft(reversed(self.children[one]))
            else:
                found.append(one)
        return found


@dataclass(frozen=True, slots=True)
class Topology:
    """The trees of a shape."""

    shape: Shape
    trees: tuple[Tree, ...]
    control: Tree
    """Reports go up and the end comes down here: it is shallow where the data go down a chain."""
    rack_of: tuple[int, ...]
    """By rank."""
    relay_count: int
    """How many children the busiest relay has, in all data trees: what links are planned for."""

    @property
    def kind(self) -> Kind:
        return self.shape.kind

    @property
    def rank_count(self) -> int:
        return len(self.trees[0].parents)


def rack_order(racks: Sequence[Hashable]) -> list[int]:
    """Return the indexes of nodes, given the rack of each, rack by rack.

    Racks come in the order of their first node, nodes keep theirs: put the source's rack first.
    """
    members: dict[Hashable, list[int]] = {}
    for index, rack in enumerate(racks):
        members.setdefault(rack, []).append(index)
    return [index for rack in members.values() for index in rack]


def build(shape: Shape) -> Topology:
    """Return the trees of a shape."""
    count = shape.receiver_count
    match shape.kind:
        case Kind.FLAT:
            forest = [[list(range(1, count + 1)), *([] for _ in range(count))]]
        case Kind.CHAIN | Kind.MULTICAST:
            forest = [_chain(count)]
        case Kind.STRIPES:
            forest = _stripes(shape.racks, shape.fanout)
        case Kind.BINOMIAL:
            forest = [_by_rack(_binomial, shape.racks)]
        case Kind.BINARY:
            forest = [_by_rack(lambda size: _k_ary(size, 2), shape.racks)]
        case Kind.KARY:
            forest = [_by_rack(lambda size: _k_ary(size, shape.fanout), shape.racks)]
        case Kind.LAMBDA:
            gap, ready = shape.gap_us, shape.ready_us
            forest = [_by_rack(lambda size: _postal(size, gap, ready), shape.racks)]
    control = _by_rack(lambda size: _k_ary(size, CONTROL_FANOUT), shape.racks)
    rack_of = (0, *(rack for rack, size in enumerate(shape.racks) for _ in range(size)))
    rows = list(zip(*forest, strict=True))[1:]
    relay_count = max(1, *(sum(map(len, children)) for children in rows))
    return Topology(shape, tuple(map(_tree, forest)), _tree(control), rack_of, relay_count)


def _tree(children: Children) -> Tree:
    parents = [-1] * len(children)
    depths = [0] * len(children)
    positions = [0] * len(children)
    order = [SOURCE]
    for rank in order:  # grows while it is walked
        for child in children[rank]:
            parents[child] = rank
            depths[child] = depths[rank] + 1
        order.extend(children[rank])
    for position, rank in enumerate(order):
        positions[rank] = position
    return Tree(tuple(parents), tuple(map(tuple, children)), tuple(positions), tuple(depths))


def _chain(count: int) -> Children:
    return [[rank + 1] for rank in range(count)] + [[]]


def _by_rack(grow: Callable[[int], Children], racks: tuple[int, ...]) -> Children:
    """Build a tree of the racks' heads, and below each head one of its rack.

    *grow* builds a tree over 0 .. size - 1.  What leaves the rack is fed first.
    """
    sizes = (racks[0] + 1, *racks[1:])
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    heads = grow(len(sizes))
    children: Children = []
    for index, size in enumerate(sizes):
        start = starts[index]
        children.extend([start + child for child in row] for row in grow(size))
        children[start][:0] = [starts[head] for head in heads[index]]
    return children


def _binomial(size: int) -> Children:
    """In round t each of the 2**t ranks that have it informs the one 2**t above."""
    children: Children = [[] for _ in range(size)]
    step = 1
    while step < size:
        for rank in range(min(step, size - step)):
            children[rank].append(rank + step)
        step *= 2
    return children


def _k_ary(size: int, fanout: int) -> Children:
    return [
        list(range(rank * fanout + 1, min((rank + 1) * fanout + 1, size))) for rank in range(size)
    ]


def _postal(size: int, gap: int, ready: int) -> Children:
    """Whoever is free calls next: the greedy rule is optimal in the postal model."""
    children: Children = [[] for _ in range(size)]
    free = [(0, 0)]
    for rank in range(1, size):
        now, caller = free[0]
        children[caller].append(rank)
        heapq.heapreplace(free, (now + gap, caller))
        heapq.heappush(free, (now + ready, rank))
    return children


def _stripes(racks: tuple[int, ...], stripe_count: int) -> list[Children]:
    """Build m trees of fan-out m, rack after rack, in which no rank sends more than it receives.

    The ranks of a rack are dealt into m groups of equal size; group s are the relays of tree s.
    Up to m - 1 ranks are left over: as spares they feed leaves wherever a tree lacks a place.
    """
    stripe_count = min(stripe_count, sum(racks))
    if stripe_count == 1:
        return [_chain(sum(racks))]
    blocks = _blocks(racks, stripe_count)
    trees: list[Children] = [[[] for _ in range(sum(racks) + 1)] for _ in range(stripe_count)]
    feeders = [SOURCE] * stripe_count
    for index, block in enumerate(blocks):
        group_size = len(block) // stripe_count
        groups = [block[s * group_size : (s + 1) * group_size] for s in range(stripe_count)]
        spares = block[stripe_count * group_size :]
        left = {rank: stripe_count for rank in spares}
        for stripe, children in enumerate(trees):
            relays = groups[stripe]
            children[feeders[stripe]].insert(0, relays[0])
            leaves = spares + [r for g in groups[:stripe] + groups[stripe + 1 :] for r in g]
            # The head of the next block takes one place of this block's head.
            reserved = 1 if index + 1 < len(blocks) else 0
            _fill(children, relays, leaves, stripe_count, reserved, left)
            feeders[stripe] = relays[0]
    return trees


def _blocks(racks: tuple[int, ...], stripe_count: int) -> list[list[int]]:
    """Return the ranks of each rack; a rack too small to relay every stripe joins its neighbour."""
    blocks: list[list[int]] = []
    start = 1
    for size in racks:
        ranks = list(range(start, start + size))
        start += size
        if blocks and (len(ranks) < stripe_count or len(blocks[-1]) < stripe_count):
            blocks[-1].extend(ranks)
        elif ranks:
            blocks.append(ranks)
    return blocks


def _fill(
    children: Children,
    relays: list[int],
    leaves: list[int],
    fanout: int,
    reserved: int,
    left: dict[int, int],
) -> None:
    """Hang a block's ranks below its head, `relays[0]`, breadth first.

    *left* counts the places that spares have left in all trees; it is used up here.
    """
    places = deque(
        relay for relay in relays for _ in range(fanout - (reserved if relay == relays[0] else 0))
    )
    for rank in relays[1:] + leaves:
        if places:
            children[places.popleft()].append(rank)
        else:
            spare = next(one for one, count in left.items() if count and one != rank)
            children[spare].append(rank)
            left[spare] -= 1
