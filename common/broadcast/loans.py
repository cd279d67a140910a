"""Loans: who has all of one tree takes the last chunks of another from its parent there.  Sans-I/O.

With stripes every link is as busy as it can be, so a tree that has come behind, because a relay was
replaced or a connection was slow to find its rate, stays behind; at the end the others are done,
and their links idle.  So a node that has all of a tree tells its parent there what it lacks of
others (`Lack`).  The parent lends half of it at most, the latest first, and only what it has
itself: nobody ever waits for who waits for him (`Lend`).  The node tells the parent that would have
sent them (`Spare`).  The source has everything: it begins there, and goes down the idle tree.

A loan that does not come within `stall_s`, or whose lender is the parent no more, is given back:
the chunks are asked for where they belong (`Want`).  A chunk may come twice; it counts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.broadcast import chunkset
from common.broadcast.downstream import Downstream
from common.broadcast.node import Node
from common.broadcast.upstream import Upstream, UpstreamState
from common.broadcast.wire import Lack, Lend, Spare, Want

__all__ = ["Loans"]

LACK_COUNT_MIN = 4
"""For less it is not worth asking."""
LEND_COUNT_MAX = 64
"""Chunks of one loan."""


@dataclass(slots=True)
class _Loan:
    """What one parent has lent."""

    attempt: int
    """Of the attach to it."""
    chunks: int = 0
    """All that it was: who sends a chunk is owed an answer, though it comes late."""
    due: int = 0
    """What is waited for, if it has not come."""
    since_s: float = 0.0


class Loans:
    """What one hop borrows and lends, in its data trees."""

    def __init__(self, node: Node, ups: Sequence[Upstream], downs: Sequence[Downstream]) -> None:
        self._node = node
        self._ups = ups
        self._downs = downs
        self._loans: dict[int, _Loan] = {}
        """By the tree that brings it."""
        self._ask_s: dict[int, float] = {}
        """By tree: when the parent may be asked again."""

    def ups_of(self, chunk: int) -> list[Upstream]:
        """Return where a chunk may come from: its own tree first, and one that lends it."""
        found = [self._ups[self._node.tree_of(chunk)]]
        if self._loans:
            loans = self._loans.items()
            found.extend(self._ups[index] for index, loan in loans if loan.chunks >> chunk & 1)
        return found

    def consider(self, now: float) -> None:
        """Ask the parents in trees of which nothing is lacking."""
        if len(self._ups) < 2:
            return
        node = self._node
        lacking = node.everything & ~(node.have | node.coming)
        for loan in self._loans.values():
            lacking &= ~loan.due
        if lacking.bit_count() < LACK_COUNT_MIN:
            return
        for up in self._ups:
            index = up.index
            due = self._loans[index].due if index in self._loans else 0
            if (node.mask(index) | due) & ~node.have:
                continue
            fit = up.state is UpstreamState.ATTACHED and node.is_in_rack(up.parent)
            if fit and now >= self._ask_s.get(index, 0.0):
                self._ask_s[index] = now + node.options.attach_s
                node.send(up.parent, Lack(node.transfer, index, chunkset.encode(lacking)))

    def lend(self, peer: int, message: Lack, now: float) -> None:
        """Lend a child some of what it lacks, and say what."""
        node, down = self._node, self._downs[message.tree]
        lacking = chunkset.decode(message.chunks, node.chunk_count)
        count = min(lacking.bit_count() // 2, LEND_COUNT_MAX)
        if down.children[peer].demoted:
            count = 0  # it gets what its siblings leave
        lent = 0
        owed = self._loans[message.tree].due if message.tree in self._loans else 0
        left = lacking & (node.have | owed)
        while left and lent.bit_count() < count:
            highest = 1 << left.bit_length() - 1
            lent |= highest
            left ^= highest
        node.send(peer, Lend(node.transfer, message.tree, chunkset.encode(lent)))
        if lent:
            down.lent(peer, lent, now)

    def borrow(self, peer: int, message: Lend, now: float) -> None:
        """Take a loan: who would have sent the chunks need not."""
        node, up = self._node, self._ups[message.tree]
        if not up.is_parent(peer):
            return
        lent = chunkset.decode(message.chunks, node.chunk_count)
        self._ask_s[up.index] = now if lent else now + node.options.tick_s / 2
        loan = self._loans.get(up.index)
        if loan is None or loan.attempt != up.attempt:
            loan = self._loans[up.index] = _Loan(up.attempt)
        loan.chunks |= lent
        loan.due, loan.since_s = lent, now
        for other in self._ups:
            spared = lent & node.mask(other.index) & ~node.have
            if spared and other is not up and other.state is UpstreamState.ATTACHED:
                known = Spare(node.transfer, other.index, chunkset.encode(spared))
                node.send(other.parent, known)

    def tick(self, now: float) -> None:
        """Give back what does not come; ask for more."""
        node = self._node
        for index, loan in list(self._loans.items()):
            up, lacking = self._ups[index], loan.due & ~node.have
            is_late = now - max(loan.since_s, up.fed_s) > node.options.stall_s
            is_over = up.state is not UpstreamState.ATTACHED or up.attempt != loan.attempt
            if lacking and (is_late or is_over):
                loan.due = 0
                self._ask_s[index] = now + node.options.stall_s
                self._give_back(lacking)
            if is_over:
                del self._loans[index]
        self.consider(now)

    def _give_back(self, chunks: int) -> None:
        node = self._node
        for up in self._ups:
            wanted = chunks & node.mask(up.index)
            if wanted and up.state is UpstreamState.ATTACHED:
                node.send(up.parent, Want(node.transfer, up.index, chunkset.encode(wanted)))
