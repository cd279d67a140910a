"""Balance: no tree of the source runs ahead of the others.  Sans-I/O.

TCP shares a link between two connections as it happens.  What one tree gets beyond its share only
waits in its relays; and when it has all, the other tree is alone with relays that can pass on half
of what the link brings.  So whoever is ahead waits for who is not.
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

    def lacking_count(self) -> int:
        """Return how many chunks the child lacks that lacks most."""

    def pump(self, now: float) -> None: ...


class Balance:
    """All data trees of one source."""

    def __init__(self, trees: Sequence[Balanced]) -> None:
        self._trees = trees

    def holds(self, tree: Balanced, now: float) -> bool:
        """Return whether a tree should wait for others."""
        enough = tree.lacking_count() + LEAD_COUNT_MAX
        return any(
            now - other.acked_s < PATIENCE_S and other.lacking_count() > enough
            for other in self._trees
            if other is not tree
        )

    def pump(self, now: float) -> None:
        """One tree has come nearer: the others may go on."""
        for tree in self._trees:
            tree.pump(now)
