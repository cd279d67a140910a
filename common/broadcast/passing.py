"""A multicast pass as a hop sees it: until it is over, data trees are not used.

While the pass is on, only the control tree is in use: so nodes join, live and are lost as ever, and
nobody is fed.  What comes by multicast the shell tells the hop (`Hop.chunk_heard`).  When the pass
is over, here or as the control parent says (`PassOver`), the data trees are started: a node then
attaches with what it has, and the chain brings what is lacking.  Sans-I/O.

Without a pass it is over from the beginning, and nobody is told.
"""

from __future__ import annotations

from common.broadcast.downstream import Downstream
from common.broadcast.node import Node
from common.broadcast.upstream import Upstream
from common.broadcast.wire import PassOver

__all__ = ["Pass"]


class Pass:
    """The pass of one hop."""

    def __init__(
        self, node: Node, ups: list[Upstream], downs: list[Downstream], *, is_on: bool
    ) -> None:
        self.is_on = is_on
        self._is_told = is_on
        """Whether control children are told of its end."""
        self._node = node
        self._trees = list(zip(ups, downs, strict=True))

    def trees(self) -> list[tuple[Upstream, Downstream]]:
        """Return the trees in use, the control tree last."""
        return self._trees[-1:] if self.is_on else self._trees

    def start(self, now: float) -> None:
        """Start the trees in use, and say what is lacking."""
        node = self._node
        if self.is_on:
            node.ledger.ready |= 1 << node.rank & ~1  # the source needs nothing
            node.ledger.lacking |= node.everything & ~node.have
        for up, down in self.trees():
            up.start(now)
            down.start(now)

    def greet(self, peer: int) -> None:
        """A node has attached in the control tree: it may not have heard of the end."""
        if self._is_told and not self.is_on:
            self._node.send(peer, PassOver(self._node.transfer))

    def end(self, now: float) -> None:
        """Tell the children, and go on as hops do."""
        node = self._node
        if not self.is_on:
            return
        self.is_on = False
        lacking_count = (node.everything & ~node.have).bit_count()
        if lacking_count:
            percent = max(1, round(100 * lacking_count / node.chunk_count))
            node.ledger.note(node.rank, f"multicast did not bring {percent} % of the data")
        for peer in self._trees[-1][1].children:
            self.greet(peer)
        for up, down in self._trees[:-1]:
            up.start(now)
            if node.relays:
                down.start(now)
