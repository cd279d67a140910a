"""Pace: which of a node's children is a slow relay.  Sans-I/O.

A child's pace is what it acknowledges while its window is full, times the number of children whose
windows are full, and that share this node's link, meanwhile: so it is an estimate of the whole
link, the same for all children however many there are, unless the child itself is slow.  It is
compared with the best that another child has shown, and with what this node is fed itself.

Judged only over at least `slow_s`, and when a child at the reference pace would have acknowledged
two windows: the first window's acks come in a lump.  A child in another rack is compared with what
the plan says of the uplink, and with nothing else: the link there is not this node's.  The source,
which is fed by nobody and may have one child, compares with the plan, but once: if the whole
network were slower than planned it would make leaves of all its nodes.  For the same reason a node
makes few (`DEMOTE_COUNT_MAX`).

That takes a second and two windows: too long where the whole copy takes ten.  So a child is also
found *stuck*: for a fiftieth of the time that the copy needs it has taken next to nothing
(`STUCK_SHARE`), while this node itself was fed, or another child has taken, several chunks that it
lacks.  Only what happened in the same span counts: when the network stands still nobody is stuck.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from common.broadcast.node import Node
from common.broadcast.topology import SOURCE

__all__ = ["RAMP_S", "STUCK_COUNT", "Pace", "Paces"]

DEMOTE_COUNT_MAX = 2
LEAST_S = 0.25
"""Busy for less, a child's pace is no reference for others."""
STUCK_COUNT = 3
"""Chunks that were due: fewer tell nothing."""
STUCK_SHARE = 0.15
"""Of what was due: who takes less is stuck.  A link at a twentieth shared by two shows a tenth."""
RAMP_S = 0.5
"""A connection that is new, on links that are full, needs as long to find its rate."""
PATIENCE_SHARE = 0.02
"""Of the time that the copy needs: what those behind a slow relay may lose before it is found."""


class _Stock(NamedTuple):
    """How far everybody was at a tick."""

    at_s: float
    own_count: int
    taken: dict[int, int]
    """What each child had, as far as was known."""


class Pace:
    """The account of one child."""

    __slots__ = (
        "acked_count",
        "acked_total",
        "began_s",
        "busy",
        "busy_s",
        "have_count",
        "owed_s",
        "own_count",
        "primed",
        "shared_s",
        "shared_since_s",
        "since_s",
    )

    def __init__(self, have_count: int, now: float) -> None:
        """*have_count*: what the child had when it came."""
        self.began_s = -1.0
        """When the account began; before the first full window: never."""
        self.busy = False
        """The window is full."""
        self.primed = False
        """And something was acknowledged since: only then a time is measured between two acks.
        The first one comes soon, of what was sent long before."""
        self.since_s = 0.0
        self.busy_s = 0.0
        """How long it was full and primed, before `since_s`."""
        self.acked_count = 0
        """What was acknowledged out of a full window."""
        self.own_count = 0
        """What this node had itself when the account began."""
        self.shared_s = self.shared_since_s = 0.0
        """All children's busy time while this one was busy too; and when it became so."""
        self.have_count = have_count
        """What it has acknowledged, or says it has: its sink may be behind."""
        self.acked_total = have_count
        self.owed_s = now
        """When it was last owed nothing that this node has; till then it is not found stuck."""


class Paces:
    """The accounts of the children in one tree."""

    def __init__(self, node: Node, index: int) -> None:
        self._node = node
        self._index = index
        self._best: dict[int, float] = {}
        """The best pace of each child."""
        self._own_best = 0.0
        """The best that this node was fed itself."""
        self._busy_count = 0
        self._shared_s = 0.0
        """The busy times of all children, added up, until `_since_s`."""
        self._since_s = 0.0
        self._plan_was_used = False
        self._demote_count = 0
        self._started_s = 0.0
        self._stocks: deque[_Stock] = deque()
        """Of the last ticks, as far back as patience goes."""

    def start(self, now: float) -> None:
        self._since_s = self._started_s = now

    def began(self, pace: Pace, now: float) -> None:
        """A child's window is full."""
        if pace.busy:
            return
        self._add_up(now)
        self._busy_count += 1
        pace.busy, pace.primed = True, False
        if pace.began_s < 0:
            self._open(pace, now)

    def ended(self, peer: int, pace: Pace, now: float) -> None:
        """A child could take more, and there is no more; or it is gone."""
        if not pace.busy:
            return
        self._add_up(now)
        pace.busy = False
        self._busy_count -= 1
        if pace.primed:
            pace.busy_s += now - pace.since_s
            pace.shared_s += self._shared_s - pace.shared_since_s
        if pace.busy_s >= LEAST_S and pace.acked_count >= self._node.options.window_count:
            self._found(peer, pace, pace.busy_s, pace.shared_s)

    def acked(self, pace: Pace, now: float) -> None:
        pace.acked_total += 1
        pace.have_count = max(pace.have_count, pace.acked_total)
        if pace.primed:
            pace.acked_count += pace.busy
        elif pace.busy:
            self._add_up(now)
            pace.primed = True
            pace.since_s, pace.shared_since_s = now, self._shared_s

    def restart(self, pace: Pace, now: float) -> None:
        """This node itself did not run: what was measured means nothing."""
        self._open(pace, now)

    def is_slow(self, peer: int, pace: Pace, now: float) -> bool:
        """Judge a child whose window is full."""
        options = self._node.options
        if not (pace.busy and pace.primed):
            return False
        busy_s = pace.busy_s + now - pace.since_s
        if busy_s < options.slow_s:
            return False
        self._add_up(now)
        shared_s = pace.shared_s + self._shared_s - pace.shared_since_s
        reference = self._reference(peer, pace, now)
        if reference * busy_s * busy_s / shared_s < 2 * options.window_count:
            return False
        found = self._found(peer, pace, busy_s, shared_s)
        self._open(pace, now)
        if found >= options.slow_fraction * reference or self._demote_count >= DEMOTE_COUNT_MAX:
            return False
        self._demote_count += 1
        self._plan_was_used = True
        return True

    def take_stock(self, paces: Mapping[int, Pace], now: float) -> None:
        """Remember how far everybody is, at each tick."""
        if not paces:
            self.forget()
            return
        if self._stocks and now - self._stocks[-1].at_s > 2.5 * self._node.options.tick_s:
            self.forget()  # this node itself was late
        while self._stocks and now - self._stocks[0].at_s > 1.5 * self._node.options.slow_s:
            self._stocks.popleft()
        taken = {peer: pace.have_count for peer, pace in paces.items()}
        self._stocks.append(_Stock(now, self._node.have_count(self._index), taken))

    def forget(self) -> None:
        """Judge by nothing that was before."""
        self._stocks.clear()

    def is_stuck(self, peer: int, pace: Pace, now: float) -> bool:
        """Judge a child that is owed chunks: whether others moved on without it."""
        options, patience_s = self._node.options, self._patience_s(now)
        if not self._node.is_in_rack(peer) or self._demote_count >= DEMOTE_COUNT_MAX:
            return False
        if not self._stocks or now - self._stocks[-1].at_s > 2.5 * options.tick_s:
            return False
        for since in reversed(self._stocks):
            if since.at_s < pace.owed_s or peer not in since.taken:
                break
            if since.at_s <= now - patience_s and self._stood_still(peer, pace, since, now):
                self._demote_count += 1
                self._plan_was_used = True
                return True
        return False

    def _stood_still(self, peer: int, pace: Pace, since: _Stock, now: float) -> bool:
        due = self._due(peer, since, now)
        return due >= STUCK_COUNT and pace.have_count - since.taken[peer] < STUCK_SHARE * due

    def _due(self, peer: int, since: _Stock, now: float) -> float:
        """Return what a child should have taken, by what others did meanwhile."""
        node = self._node
        sharing = max(1, len(node.fed[self._index]))
        due = (node.have_count(self._index) - since.own_count) / sharing
        taken = self._stocks[-1].taken
        for other, count in since.taken.items():
            if other != peer and other in taken:
                due = max(due, taken[other] - count)
        if node.rank == SOURCE and not self._plan_was_used:
            planned = node.options.expected_rate / node.chunk_size / len(node.topology.trees)
            due = max(due, planned * (now - since.at_s) / sharing)
        return due

    def _patience_s(self, now: float) -> float:
        """Return how long a child may be stuck: by how long the copy will take, so far as known."""
        node, options = self._node, self._node.options
        done = node.have_count(self._index)
        if node.rank == SOURCE:
            latest = self._stocks[-1].taken.values() if self._stocks else ()
            done = max(latest, default=0)
        whole = node.mask(self._index).bit_count()
        if done:
            needs_s = (now - self._started_s) * whole / done
        elif options.expected_rate:
            needs_s = node.chunk_count * node.chunk_size / options.expected_rate
        else:
            needs_s = math.inf
        return max(0.3 * options.silence_s, min(PATIENCE_SHARE * needs_s, options.slow_s))

    def _reference(self, peer: int, pace: Pace, now: float) -> float:
        """Return what the link could do, in chunks a second, as far as anything tells."""
        node = self._node
        tree_count = len(node.topology.trees)
        if not node.is_in_rack(peer):
            return node.options.expected_uplink_rate / node.chunk_size / tree_count
        gained = node.have_count(self._index) - pace.own_count
        self._own_best = max(self._own_best, gained / (now - pace.began_s))
        best = [self._own_best]
        best.extend(found for rank, found in self._best.items() if rank != peer)
        if node.rank == SOURCE and not self._plan_was_used:
            best.append(node.options.expected_rate / node.chunk_size / tree_count)
        return max(best)

    def _found(self, peer: int, pace: Pace, busy_s: float, shared_s: float) -> float:
        """Return the child's pace: what it took, times those that shared the link meanwhile."""
        found = pace.acked_count / busy_s * (shared_s / busy_s)
        self._best[peer] = max(found, self._best.get(peer, 0.0))
        return found

    def _open(self, pace: Pace, now: float) -> None:
        pace.began_s = pace.since_s = now
        pace.busy_s, pace.acked_count = 0.0, 0
        pace.shared_s, pace.shared_since_s = 0.0, self._shared_s
        pace.own_count = self._node.have_count(self._index)

    def _add_up(self, now: float) -> None:
        self._shared_s += self._busy_count * (now - self._since_s)
        self._since_s = now
