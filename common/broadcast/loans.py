"""Loans: who has all of one tree takes the last chunks of another from its parent there.  Sans-I/O.

With stripes every link is as busy as it can be, so a tree that has come behind, because a relay was
replaced or a connection was slow to find its rate, stays behind; at the end the others are done,
and their links idle.  So a node that has all of a tree tells its parent there what it lacks of
others (`Lack`).  The parent lends half of it at most, the latest first, and only what it has or is
lent itself in that tree (`Lend`): who waits, waits for its ancestors there, up to the source, which
has everything; never in a circle.  The node tells the parent that would have sent them (`Spare`).

A loan that has not come in time, or whose lender is the parent no more, is given back: the chunks
are asked for where they belong (`Want`).  A chunk may come twice; it counts once.
"""

from __future__ import annotations

import math
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
LEND_COUNT_MAX = 16
"""Chunks of one loan: what a link carries in less than a second, by the plan."""
TERM_COUNT = 2
"""So many times `stall_s` is a loan waited for."""


@dataclass(slots=True)
class _Account:
    """What one parent has lent."""

    attempt: int
    """Of the attach to it."""
    chunks: int = 0
    """All that it was: who sends a chunk is owed an answer, though it comes late."""
    due: int = 0
    """What is waited for, if it has not come."""
    until_s: float = 0.0
    """And until when."""
    asked: bool = False
    """A `Lack` waits for its answer; a `Lend` that answers nothing is not listened to."""
    ask_s: float = 0.0
    """When it may be asked again; never, once it was late."""


class Loans:
    """What one hop borrows and lends, in its data trees."""

    def __init__(self, node: Node, ups: Sequence[Upstream], downs: Sequence[Downstream]) -> None:
        self._node = node
        self._ups = ups
        self._downs = downs
        self._accounts: dict[int, _Account] = {}
        """By the tree that brings the chunks."""

    def ups_of(self, chunk: int) -> list[Upstream]:
        """Return where a chunk may come from: its own tree first, and one that lends it."""
        found = [self._ups[self._node.tree_of(chunk)]]
        if self._accounts:
            accounts = self._accounts.items()
            found.extend(self._ups[index] for index, one in accounts if one.chunks >> chunk & 1)
        return found

    def consider(self, now: float) -> None:
        """Ask the parents in trees of which nothing is lacking."""
        if len(self._ups) < 2:
            return
        node = self._node
        lacking = node.everything & ~(node.have | node.coming)
        for account in self._accounts.values():
            lacking &= ~account.due
        if lacking.bit_count() < LACK_COUNT_MIN:
            return
        for up in self._ups:
            if up.state is not UpstreamState.ATTACHED or not node.is_in_rack(up.parent):
                continue
            account = self._account(up)
            is_due = now >= account.ask_s and not account.asked
            if is_due and not (node.mask(up.index) | account.due) & ~node.have:
                account.asked = True
                node.send(up.parent, Lack(node.transfer, up.index, chunkset.encode(lacking)))

    def lend(self, peer: int, message: Lack, now: float) -> None:
        """Lend a child some of what it lacks, and say what."""
        node, down = self._node, self._downs[message.tree]
        lacking = chunkset.decode(message.chunks, node.chunk_count)
        count = min(lacking.bit_count() // 2, LEND_COUNT_MAX)
        if down.children[peer].demoted:
            count = 0  # it gets what its siblings leave
        lent = 0
        owed = self._accounts[message.tree].due if message.tree in self._accounts else 0
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
        account = self._account(up)
        if not account.asked:
            return
        account.asked = False
        account.chunks |= lent
        account.due, account.until_s = lent, now + TERM_COUNT * node.options.stall_s
        account.ask_s = now if lent else now + node.options.tick_s / 2
        for other in self._ups:
            spared = lent & node.mask(other.index) & ~node.have
            if spared and other is not up and other.state is UpstreamState.ATTACHED:
                known = Spare(node.transfer, other.index, chunkset.encode(spared))
                node.send(other.parent, known)

    def tick(self, now: float) -> None:
        """Give back what does not come; ask for more."""
        node = self._node
        for index in list(self._accounts):
            account = self._account(self._ups[index])
            is_over = self._ups[index].state is not UpstreamState.ATTACHED
            if account.due & ~node.have and (is_over or now > account.until_s):
                self._give_back(account)
                account.ask_s = math.inf
        self.consider(now)

    def _account(self, up: Upstream) -> _Account:
        """Return the account with the present parent."""
        account = self._accounts.get(up.index)
        if account is None or account.attempt != up.attempt:
            if account is not None:
                self._give_back(account)
            account = self._accounts[up.index] = _Account(up.attempt)
        return account

    def _give_back(self, account: _Account) -> None:
        node = self._node
        chunks, account.due = account.due & ~node.have, 0
        for up in self._ups:
            wanted = chunks & node.mask(up.index)
            if wanted and up.state is UpstreamState.ATTACHED:
                node.send(up.parent, Want(node.transfer, up.index, chunkset.encode(wanted)))
