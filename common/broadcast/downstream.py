"""Downstream: whom this node feeds in one tree.  Sans-I/O.

A child says what it has when it attaches; from then on `needs` is what it lacks and has not been
sent.  Chunks go out lowest first, at most `window_count` beyond what the child has acknowledged,
and an ack means that the child's sink has the chunk: so a slow sink holds back its own feeding,
and nobody else's.  Children take turns, in the order in which they can take more.

A child that is lost is replaced by its own children (`Adopt`).  One that makes no progress, or is
much slower than its place needs, is made a leaf: its children are adopted, and it is fed with
what its siblings leave of the link.

The control tree is a `Downstream` without chunks.
"""

from __future__ import annotations

from collections import deque

from common.broadcast import chunkset
from common.broadcast.node import Node
from common.broadcast.pace import Pace, Paces
from common.broadcast.upstream import REDIRECT_COUNT_MAX
from common.broadcast.wire import Accept, Adopt, Alive, Attach, Demote, Leave, Refuse

__all__ = ["Budget", "Child", "Downstream"]

DEMOTED_WINDOW_COUNT = 2
"""Enough to keep a slow link busy; what is under way to it cannot be taken back."""


class Budget:
    """The rate limit of a node, over all its trees: a token bucket."""

    def __init__(self, rate: float, chunk_size: int, burst_s: float) -> None:
        self.rate = rate
        self._burst = max(2.0 * chunk_size, rate * burst_s)
        self._left = self._burst
        self._filled_s = 0.0

    def take(self, size: int, now: float) -> bool:
        """Return whether *size* bytes may be sent now."""
        if not self.rate:
            return True
        self._left = min(self._burst, self._left + (now - self._filled_s) * self.rate)
        self._filled_s = now
        if self._left < size:
            return False
        self._left -= size
        return True


class Child:
    """What a parent knows of one child."""

    __slots__ = (
        "attempt",
        "child_count",
        "count",
        "demoted",
        "in_flight",
        "needs",
        "pace",
        "progress_s",
    )

    def __init__(self, attempt: int, needs: int, now: float) -> None:
        self.attempt = attempt
        self.needs = needs
        self.in_flight: set[int] = set()
        self.count = 0
        """Chunks it says it has; on the control tree: its whole subtree."""
        self.child_count = 0
        self.demoted = False
        self.progress_s = now
        """When it last acknowledged or took bytes, or had nothing to take."""
        self.pace = Pace()


class Downstream:
    """This node's children in one tree."""

    def __init__(self, node: Node, index: int, budget: Budget) -> None:
        self.node = node
        self.index = index
        self.children: dict[int, Child] = {}
        self._budget = budget
        self._expected: dict[int, float] = {}
        """Who should attach, and until when."""
        self._turns: deque[int] = deque()
        self._any_demoted = False
        self._paces = Paces(node, index)

    @property
    def is_control(self) -> bool:
        return self.index == self.node.control_index

    def start(self, now: float) -> None:
        self._paces.start(now)
        for child in self.node.tree(self.index).children[self.node.rank]:
            if child not in self.children:
                self._expect(child, now)

    # ------------------------------------------------------------ who is a child

    def attach(self, peer: int, message: Attach, now: float) -> None:
        """Take on a child, or say whom to ask instead."""
        node = self.node
        have = chunkset.decode(message.have, node.chunk_count)
        reason, instead = "", -1
        if not self.is_control and not node.relays:
            reason = "feeds nobody"
        elif not node.tree(self.index).positions[node.rank] < node.tree(self.index).positions[peer]:
            reason = "comes later in the plan"
        elif self._is_full(peer) and message.redirect_count < REDIRECT_COUNT_MAX:
            instead = self._referral(peer)
            reason = "has children enough" if instead >= 0 else ""
        if reason:
            refusal = Refuse(node.transfer, self.index, message.attempt, instead, reason)
            node.send(peer, refusal)
            return
        self._expected.pop(peer, None)
        self._remove(peer, now)
        child = Child(message.attempt, node.mask(self.index) & ~have, now)
        self.children[peer] = child
        if peer not in self._turns:
            self._turns.append(peer)
        node.ledger.join(peer, message.attempt)
        count = node.have_count(self.index)
        node.send(peer, Accept(node.transfer, self.index, message.attempt, count))
        self.pump(now)

    def left(self, peer: int, message: Leave, now: float) -> None:
        """The child has another parent now, or was never going to come."""
        child = self.children.get(peer)
        if child is None:
            self._expected.pop(peer, None)
        elif message.attempt in (0, child.attempt):
            self._remove(peer, now)

    def lost(self, peer: int, reason: str, now: float) -> None:
        """The connection to a child, or to one who should have come, is gone."""
        child = self._remove(peer, now)
        if child is None and self._expected.pop(peer, None) is None:
            return
        self.node.ledger.lose(peer, child.attempt if child else 0, reason)
        self._adopt_children_of(peer, False, reason, now)

    def release(self, reason: str, now: float) -> None:
        """Feed nobody any more."""
        for peer, child in list(self.children.items()):
            self._remove(peer, now)
            leave = Leave(self.node.transfer, self.index, child.attempt, reason)
            self.node.send(peer, leave)
        self._expected.clear()
        self._turns.clear()

    def _remove(self, peer: int, now: float) -> Child | None:
        child = self.children.pop(peer, None)
        if child is not None:
            self._paces.ended(peer, child.pace, now)
        return child

    def _is_full(self, peer: int) -> bool:
        if peer in self.children:
            return False
        planned = self.node.tree(self.index).children[self.node.rank]
        if peer in planned:
            return False
        return len(self.children) >= len(planned) + self.node.options.spare_child_count

    def _referral(self, peer: int) -> int:
        """Return the child that has the fewest children and may feed *peer*, or -1."""
        positions = self.node.tree(self.index).positions
        fit = [
            rank
            for rank, child in self.children.items()
            if positions[rank] < positions[peer] and not child.demoted
        ]
        if not fit:
            return -1
        found = min(fit, key=lambda rank: self.children[rank].child_count)
        self.children[found].child_count += 1  # until it says so itself
        return found

    def _expect(self, peer: int, now: float) -> None:
        self._expected[peer] = now + self.node.options.join_s

    def _adopt_children_of(self, peer: int, lives: bool, reason: str, now: float) -> None:
        for orphan in self.node.tree(self.index).children[peer]:
            if orphan not in self.children:
                self._expect(orphan, now)
                adopt = Adopt(self.node.transfer, self.index, peer, lives, reason)
                self.node.send(orphan, adopt)

    # ------------------------------------------------------------ chunks

    def pump(self, now: float) -> None:
        """Send what children can take; one chunk each in turn."""
        if self.is_control:
            return
        for _ in range(len(self._turns)):
            peer = self._turns[0]
            self._turns.rotate(-1)
            if peer not in self.children:
                self._turns.pop()
            elif not self.feed(peer, now):
                break

    def feed(self, peer: int, now: float) -> bool:
        """Send one child what it can take; False when the rate limit is reached."""
        child, node = self.children[peer], self.node
        window_count = node.options.window_count
        if child.demoted:
            # It gets what the link has left: were it slow, or not, others would pay for it.
            if any(one.pace.busy for one in self.children.values()):
                return True
            window_count = min(window_count, DEMOTED_WINDOW_COUNT)
        while len(child.in_flight) < window_count:
            ready = child.needs & (node.have | node.coming)
            if not ready:
                return True
            if not self._budget.take(node.chunk_size, now):
                child.progress_s = now
                return False
            low = ready & -ready
            chunk = low.bit_length() - 1
            child.needs ^= low
            if not child.in_flight:
                child.progress_s = now
            child.in_flight.add(chunk)
            node.send_chunk(peer, chunk)
        if not child.demoted:
            self._paces.began(child.pace, now)
        return True

    def acked(self, peer: int, chunk: int, now: float) -> None:
        child = self.children[peer]
        if chunk in child.in_flight:
            child.in_flight.remove(chunk)
            self._paces.acked(child.pace, now)
        child.progress_s = now
        self.feed(peer, now)
        if len(child.in_flight) < self.node.options.window_count:
            self._paces.ended(peer, child.pace, now)
        if self._budget.rate or self._any_demoted:
            self.pump(now)

    def wanted(self, peer: int, chunks: int, now: float) -> None:
        """The child has lost what it was sent."""
        child = self.children[peer]
        child.needs |= chunks & self.node.mask(self.index)
        child.in_flight.difference_update(chunkset.indexes(chunks))
        self.feed(peer, now)
        if len(child.in_flight) < self.node.options.window_count:
            self._paces.ended(peer, child.pace, now)

    def took_bytes(self, peer: int, now: float) -> None:
        if peer in self.children:
            self.children[peer].progress_s = now

    def heard_alive(self, peer: int, message: Alive) -> None:
        child = self.children[peer]
        child.count = message.have_count
        child.child_count = message.child_count

    def total(self) -> int:
        """Return what the subtrees of all children have, as they say."""
        return sum(child.count for child in self.children.values())

    # ------------------------------------------------------------ clocks

    def tick(self, now: float) -> None:
        for peer in [peer for peer, until_s in self._expected.items() if now > until_s]:
            del self._expected[peer]
            reason = "did not attach in time"
            self.node.ledger.lose(peer, 0, reason)
            self._adopt_children_of(peer, False, reason, now)
        if self.is_control:
            return
        if self._budget.rate or self._any_demoted:
            self.pump(now)
        options = self.node.options
        for peer, child in self.children.items():
            if not self._relays(peer, child):
                continue
            if not any(self.node.have >> chunk & 1 for chunk in child.in_flight):
                child.progress_s = now  # what has not come here yet is not the child's fault
            elif now - child.progress_s > options.stall_s:
                self._demote(peer, child, "no progress", now)
            elif self._paces.is_slow(peer, child.pace, now):
                self._demote(peer, child, "slow", now)

    def asleep(self, now: float) -> None:
        """This node itself did not run for a while: nobody else is to blame."""
        for child in self.children.values():
            child.progress_s = now
            self._paces.restart(child.pace, now)
        for peer in self._expected:
            self._expect(peer, now)

    def _relays(self, peer: int, child: Child) -> bool:
        planned = self.node.tree(self.index).children[peer]
        return not child.demoted and bool(child.child_count or planned)

    def _demote(self, peer: int, child: Child, reason: str, now: float) -> None:
        """Make a child a leaf and take its children."""
        child.demoted = self._any_demoted = True
        self._paces.ended(peer, child.pace, now)
        self.node.ledger.note(peer, f"{reason}: made a leaf by rank {self.node.rank}")
        self.node.send(peer, Demote(self.node.transfer, self.index, reason))
        self._adopt_children_of(peer, True, reason, now)
