"""Standbys: who takes the place of a relay that is lost or slow in one tree.  Sans-I/O.

The relay's parent asks a node that has room, by the plan, to take the place (`Promote`); it gives
away what children it would have too many, attaches, and the orphans are referred to it.  So nobody
feeds more than links are planned for, and the tree is no deeper.  Meanwhile the orphans wait: when
nobody has come within `attach_s` their grandparent feeds them itself.

A node's *place* is that of the rank by whose position it is judged in a tree: its own, that of the
relay it stands in for, or `END`, behind everybody, for one that feeds nobody there.  It changes
only to an earlier place, before another parent is asked, or to `END`, when it has no children: so
who is fed is behind who feeds, always, and no circle can form.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from common.broadcast.node import Node
from common.broadcast.topology import SOURCE, Topology
from common.broadcast.wire import Alive, Attach, Promote

__all__ = ["Vacancies", "places", "rest", "standbys"]

STANDBY_COUNT_MAX = 3
"""Who is asked to take a place, one after the other."""


def places(topology: Topology, rank: int) -> int:
    """Return how many children a node can feed, in all trees: as many as the busiest relay."""
    planned = sum(len(tree.children[rank]) for tree in topology.trees)
    return planned if rank == SOURCE else max(planned, topology.relay_count)


def _free(topology: Topology, rank: int) -> int:
    planned = sum(len(tree.children[rank]) for tree in topology.trees)
    return places(topology, rank) - planned


def standbys(topology: Topology, index: int, place: int, without: Collection[int]) -> list[int]:
    """Return who could take a place, the best first: of the same rack, and not before it.

    Best is who can feed all the children there; then who need not give away others for it; then
    who is not below the place: behind a slow relay all have come to a stop.
    """
    tree = topology.trees[index]
    below = tree.below(place)

    def cost(rank: int) -> tuple[int, int, int, int]:
        need = sum(child != rank for child in tree.children[place])
        own = len(tree.children[rank])
        lacking = max(0, need - _free(topology, rank))
        return max(0, lacking - own), min(own, lacking), below >> rank & 1, -tree.positions[rank]

    fit = (
        rank
        for rank in range(1, topology.rank_count)
        if rank not in without
        and topology.rack_of[rank] == topology.rack_of[place]
        and tree.positions[rank] > tree.positions[place]
    )
    return heapq.nsmallest(STANDBY_COUNT_MAX, fit, key=cost)


def rest(
    topology: Topology, index: int, rank: int, without: Collection[int], guests: Counter[int]
) -> int:
    """Return who has room to feed *rank* at the end of a tree, or -1.

    *guests* counts who was sent to each before, and is counted up: all do not go to one.
    """
    positions = topology.trees[index].positions
    fit = (
        one
        for one in range(1, topology.rank_count)
        if one != rank
        and one not in without
        and topology.rack_of[one] == topology.rack_of[rank]
        and _free(topology, one) > 0
    )
    found = min(fit, key=lambda one: (guests[one], -positions[one]), default=-1)
    guests[found] += 1
    return found


@dataclass(slots=True)
class _Vacancy:
    asked: int
    others: list[int]
    reason: str
    until_s: float
    waiting: dict[int, Attach] = field(default_factory=dict)


class Vacancies:
    """The places below one node, in one tree, that were left by relays."""

    def __init__(self, node: Node, index: int) -> None:
        self._node = node
        self._index = index
        self._open: dict[int, _Vacancy] = {}
        self._in_vain: set[int] = set()
        """Places that nobody took: not offered again."""
        self.standbys: dict[int, int] = {}
        """By place: who has taken it."""

    def open(self, place: int, reason: str, without: Collection[int], now: float) -> None:
        """Ask somebody to take a place; `close` ends the wait."""
        found = standbys(self._node.topology, self._index, place, self.busy().union(without))
        if found and place not in self._open and place not in self._in_vain:
            until_s = now + self._node.options.attach_s
            vacancy = self._open[place] = _Vacancy(found[0], found[1:], reason, until_s)
            self._ask(place, vacancy)

    def busy(self) -> set[int]:
        """Return who has a place to take."""
        return {one.asked for one in self._open.values()}.union(self.standbys.values())

    def has_asked(self, peer: int, place: int) -> bool:
        return place in self._open and self._open[place].asked == peer

    def hold(self, peer: int, message: Attach, place: int) -> bool:
        """Let an orphan wait for who takes its parent's place; False if that is not open."""
        vacancy = self._open.get(place)
        if vacancy is None:
            return False
        vacancy.waiting[peer] = message
        return True

    def close(self, place: int) -> dict[int, Attach]:
        """Return who has waited, now that the place is taken, or nobody takes it."""
        return self._open.pop(place).waiting

    def declined(self, peer: int) -> dict[int, Attach]:
        """Ask the next one instead of *peer*; if there is none return who has waited."""
        for place, vacancy in self._open.items():
            if vacancy.asked == peer:
                if not vacancy.others:
                    self._in_vain.add(place)
                    return self.close(place)
                vacancy.asked = vacancy.others.pop(0)
                self._ask(place, vacancy)
                break
        return {}

    def tick(self, now: float) -> dict[int, Attach]:
        """Return who has waited long enough; let the others know that this node lives."""
        node, late = self._node, {}
        for place, vacancy in list(self._open.items()):
            if now > vacancy.until_s:
                self._in_vain.add(place)
                late.update(self.close(place))
        for vacancy in self._open.values():
            alive = Alive(node.transfer, self._index, node.have_count(self._index), 0)
            for peer in vacancy.waiting:
                node.send(peer, alive)
        return late

    def _ask(self, place: int, vacancy: _Vacancy) -> None:
        node = self._node
        node.send(vacancy.asked, Promote(node.transfer, self._index, place, vacancy.reason))
