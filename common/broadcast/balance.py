"""Balance: no tree of the source runs ahead of the others.  Sans-I/O.

TCP shares a link between two connections as it happens.  What one tree gets beyond its share only
waits in its relays; and when it has all, the other tree is alone with relays that can pass on half
of what the link brings.  So whoever is ahead waits for who is not: a chunk for a chunk, by what has
been sent, for acks come in lumps.

A tree that has lost its relay comes behind by no fault of the link, and cannot make up for it: its
other relays have their hands full.  Meanwhile the others go on as fast as before, and no faster,
for the link is needed by who takes the relay's place.  They keep the lead that they win, for what
the new relay got beyond would only wait there, and be missing in the others: so they are done
early, and their relays can lend theirs to the tree that is behind (`loans`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Balance", "Balanced"]

LEAD_COUNT_MAX = 2
"""So many chunks one tree may be ahead of another."""
PATIENCE_S = 0.1
"""Who has acknowledged nothing for longer is not waited for."""


class Balanced(Protocol):
    """A tree, as the source sees it."""

    @property
    def acked_s(self) -> float:
        """When a child last acknowledged a chunk."""

    @property
    def acked_count(self) -> int:
        """How many chunks children have acknowledged."""

    @property
    def settled_s(self) -> float:
        """When who takes the place of a child should have found its rate."""

    def unsent_count(self) -> int:
        """Return how many chunks are still to be sent to the child that lacks most."""

    def pump(self, now: float) -> None: ...


class Balance:
    """All data trees of one source."""

    def __init__(self, trees: Sequence[Balanced], now: float) -> None:
        self._trees = trees
        self._started_s = now
        self._kept: dict[tuple[int, int], int] = {}
        """By two trees: the lead of one over the other, in chunks, that should remain."""
        self._freed: dict[tuple[int, int], tuple[float, int]] = {}
        """By the same: since when one does not wait for the other, and its lead then."""

    def holds(self, tree: Balanced, now: float) -> bool:
        """Return whether a tree should wait for others."""
        unsent_count, index = tree.unsent_count(), self._trees.index(tree)
        return any(
            self._is_too_far((index, at), other.unsent_count() - unsent_count, now)
            for at, other in enumerate(self._trees)
            if other is not tree and other.unsent_count()
        )

    def _is_too_far(self, pair: tuple[int, int], lead: int, now: float) -> bool:
        tree, other = self._trees[pair[0]], self._trees[pair[1]]
        if now < other.settled_s:
            kept = max(self._kept.get(pair, 0), lead)
            self._kept[pair], self._kept[pair[::-1]] = kept, -kept
        elif now - other.acked_s < PATIENCE_S:
            self._freed.pop(pair, None)
            return lead > self._kept.get(pair, 0) + LEAD_COUNT_MAX
        since_s, had = self._freed.setdefault(pair, (now, lead))
        rate = tree.acked_count / max(now - self._started_s, PATIENCE_S)
        return lead > had + LEAD_COUNT_MAX + rate * (now - since_s)

    def pump(self, now: float) -> None:
        """One tree has come nearer: the others may go on."""
        for tree in self._trees:
            tree.pump(now)
