"""Downstream: whom this node feeds in one tree.  Sans-I/O.

A child says what it has when it attaches; from then on `needs` is what it lacks and has not been
sent.  Chunks go out lowest first, at most `window_count` beyond what the child has acknowledged,
and an ack means that the child's sink has the chunk: so a slow sink holds back its own feeding,
and nobody else's.  Children take turns, in the order in which they can take more.

A child that is lost is replaced by a standby (`standby`), or by its own children (`Adopt`).  One
that makes no progress, or is much slower than its place needs, is made a leaf as well, and sent
where there is room at the end of the tree; where there is none it is fed with what its siblings
leave of the link.

The control tree is a `Downstream` without chunks.
"""

from __future__ import annotations

from collections import Counter, deque

from common.broadcast import chunkset
from common.broadcast.balance import Balance
from common.broadcast.node import END, BreakOff, Node, SendPast
from common.broadcast.pace import RAMP_S, STUCK_COUNT, Pace, Paces
from common.broadcast.standby import Vacancies, places, rest
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
        "place",
        "present",
        "progress_s",
    )

    def __init__(
        self, rank: int, attempt: int, place: int, needs: int, count: int, now: float
    ) -> None:
        self.attempt = attempt
        self.place = place
        self.present = 1 << rank
        """Ranks of its subtree that it hears of, and itself; on the control tree."""
        self.needs = needs
        self.in_flight: set[int] = set()
        self.count = count
        """Chunks it says it has; on the control tree: its whole subtree."""
        self.child_count = 0
        self.demoted = place == END
        self.progress_s = now
        """When it last acknowledged or took bytes, or had nothing to take."""
        self.pace = Pace(count, now)


class Downstream:
    """This node's children in one tree."""

    def __init__(self, node: Node, index: int, budget: Budget) -> None:
        self.node = node
        self.index = index
        self.children: dict[int, Child] = {}
        node.fed[index] = self.children
        self._budget = budget
        self._expected: dict[int, float] = {}
        """Who should attach, and until when."""
        self._turns: deque[int] = deque()
        self._any_demoted = False
        self._paces = Paces(node, index)
        self._vacancies = Vacancies(node, index)
        self._guests: Counter[int] = Counter()
        self.balance: Balance | None = None
        """With the other data trees; at the source."""
        self.acked_s = 0.0
        """When a child last acknowledged a chunk."""
        self.acked_count = 0
        """How many chunks children have acknowledged."""
        self.settled_s = 0.0
        """When the child in another's place should have found its rate."""
        self._unfit: set[int] = set()
        """Who was lost, or is slow: not asked to feed others."""

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
        node, index = self.node, self.index
        have = chunkset.decode(message.have, node.chunk_count)
        self._expected.pop(peer, None)
        if not self.is_control and not node.relays:
            self._refuse(peer, message, "feeds nobody")
        elif node.own_position(index) >= node.position(index, message.place):
            self._refuse(peer, message, "comes later in the plan")
        elif not self._is_put_off(peer, message, now):
            self._remove(peer, now)
            needs, count = node.mask(index) & ~have, (node.mask(index) & have).bit_count()
            child = Child(peer, message.attempt, message.place, needs, count, now)
            child.child_count = message.child_count
            if message.attempt > 1:  # it comes from another parent: the others are ahead
                child.pace.owed_s = now + RAMP_S
                if not child.demoted:
                    self.settled_s = now + RAMP_S
            self._any_demoted |= child.demoted
            self.children[peer] = child
            if not child.demoted:
                self._unfit.discard(peer)
            if peer not in self._turns:
                self._turns.append(peer)
            node.ledger.join(peer, message.attempt)
            count = node.have_count(index)
            node.send(peer, Accept(node.transfer, index, message.attempt, count))
            self.pump(now)
            if self._vacancies.has_asked(peer, message.place):
                self._let_take(peer, message.place, now)

    def _let_take(self, standby: int, place: int, now: float) -> None:
        """A standby has come: refer those to it that wait, or have been taken in meanwhile."""
        self._vacancies.standbys[place] = standby
        waiting = self._vacancies.close(place)
        waiting.pop(standby, None)
        self._attach_all(waiting, now)
        parents = self.node.tree(self.index).parents
        for peer, child in list(self.children.items()):
            if child.place != END and parents[child.place] == place:
                self._send_on(peer, standby, place, "another took its parent's place", now)

    def _attach_all(self, waiting: dict[int, Attach], now: float) -> None:
        for peer, message in waiting.items():
            self.attach(peer, message, now)

    def _refuse(
        self, peer: int, message: Attach, reason: str, instead: int = -1, place: int = END
    ) -> None:
        refusal = Refuse(self.node.transfer, self.index, message.attempt, instead, place, reason)
        self.node.send(peer, refusal)

    def _is_put_off(self, peer: int, message: Attach, now: float) -> bool:
        """Let a node wait for its parent's standby, or tell it whom to ask."""
        place, redirect_count = message.place, message.redirect_count
        if place == END or redirect_count >= REDIRECT_COUNT_MAX:
            return False
        if self._vacancies.has_asked(peer, place):
            return False
        if not self.is_control and self._waits_for_standby(peer, message, now):
            return True
        if peer in self.children or not self._is_full(place):
            return False
        instead = -1
        if not (self.is_control or message.child_count or redirect_count):
            instead = its_place = self._rest(peer)
        elif self._feeds_count() >= self._places() + self.node.options.spare_child_count:
            instead = self._referral(place)
            its_place = self.children[instead].place if instead >= 0 else END
        if instead >= 0:
            self._refuse(peer, message, "has children enough", instead, its_place)
        return instead >= 0

    def _waits_for_standby(self, peer: int, message: Attach, now: float) -> bool:
        parent = self.node.tree(self.index).parents[message.place]
        standby = self._vacancies.standbys.get(parent, -1)
        if standby != peer and standby in self.children:
            self._refuse(peer, message, "another took its parent's place", standby, parent)
            return True
        orphan = message.child_count and self._is_vacant(parent)
        if orphan and peer not in self.children and self._is_full(message.place):
            self._vacancies.open(parent, "did not come", self._unfit | {self.node.rank}, now)
        return self._vacancies.hold(peer, message, parent)

    def left(self, peer: int, message: Leave, now: float) -> None:
        """The child has another parent now, or was never going to come."""
        child = self.children.get(peer)
        self._attach_all(self._vacancies.declined(peer), now)
        if child is None:
            self._expected.pop(peer, None)
        elif message.attempt in (0, child.attempt):
            self._remove(peer, now)

    def lost(self, peer: int, reason: str, now: float) -> None:
        """The connection to a child, or to one who should have come, is gone."""
        self._unfit.add(peer)
        self._attach_all(self._vacancies.declined(peer), now)
        child = self._remove(peer, now)
        if child is None and self._expected.pop(peer, None) is None:
            return
        self.node.ledger.lose(peer, child.attempt if child else 0, reason)
        self._replace(peer, child.place if child else peer, False, reason, now)

    def release(self, reason: str, now: float) -> None:
        """Feed nobody any more."""
        for peer, child in list(self.children.items()):
            self._remove(peer, now)
            leave = Leave(self.node.transfer, self.index, child.attempt, reason)
            self.node.send(peer, leave)
        self._expected.clear()
        self._turns.clear()

    def make_room(self, place: int, now: float) -> None:
        """Send away, latest first, who would be too many with the children of a place."""
        node, positions = self.node, self.node.tree(self.index).positions
        coming = sum(one != node.rank for one in node.tree(self.index).children[place])
        surplus = max(0, self._feeds_count() + coming - places(node.topology, node.rank))
        leaving = sorted(self.children, key=lambda one: -positions[one])[:surplus]
        for peer in leaving:
            instead = self._rest(peer, place)
            self._send_on(peer, instead, instead, "takes another place", now)

    def _rest(self, peer: int, *without: int) -> int:
        """Return who else could feed *peer*, at the end of the tree."""
        unfit = self._unfit.union(without, self._vacancies.busy(), {self.node.rank})
        return rest(self.node.topology, self.index, peer, unfit, self._guests)

    def _send_on(self, peer: int, instead: int, place: int, reason: str, now: float) -> None:
        """End an edge, and say who has room."""
        child = self._remove(peer, now)
        assert child is not None
        node = self.node
        node.send(peer, Refuse(node.transfer, self.index, child.attempt, instead, place, reason))

    def _remove(self, peer: int, now: float) -> Child | None:
        child = self.children.pop(peer, None)
        if child is not None:
            self._paces.ended(peer, child.pace, now)
            half = (one for one in child.in_flight if self.node.coming >> one & 1)
            self.node.actions.extend(BreakOff(peer, chunk) for chunk in half)
        return child

    def _planned(self, place: int) -> tuple[int, ...]:
        return () if place == END else self.node.tree(self.index).children[place]

    def _feeds_count(self) -> int:
        """Return how many share this node's link, in all data trees."""
        data = () if self.is_control else self.node.fed[:-1]
        other = sum(len(fed) for fed in data if fed is not self.children)
        return other + sum(not child.demoted for child in self.children.values())

    def _is_vacant(self, place: int) -> bool:
        """Return whether a child's place is planned here, and nobody has it."""
        planned = place in self._planned(self.node.places[self.index])
        return planned and all(one.place != place for one in self.children.values())

    def _is_full(self, place: int) -> bool:
        """Return whether whoever has *place* would be one child too many."""
        planned = place in self._planned(self.node.places[self.index])
        taken = any(one.place == place and not one.demoted for one in self.children.values())
        return (taken or not planned) and self._feeds_count() >= self._places()

    def _places(self) -> int:
        node = self.node
        planned = len(self._planned(node.places[self.index]))
        return planned if self.is_control else max(planned, places(node.topology, node.rank))

    def _referral(self, place: int) -> int:
        """Return the child that has the fewest children and may feed who has *place*, or -1."""
        position = self.node.position(self.index, place)
        fit = [
            rank
            for rank, child in self.children.items()
            if self.node.position(self.index, child.place) < position and not child.demoted
        ]
        if not fit:
            return -1
        found = min(fit, key=lambda rank: self.children[rank].child_count)
        self.children[found].child_count += 1  # until it says so itself
        return found

    def _expect(self, peer: int, now: float) -> None:
        self._expected[peer] = now + self.node.options.join_s

    def _replace(self, peer: int, place: int, lives: bool, reason: str, now: float) -> None:
        """Adopt the children of *peer*; if they are too many let another take its place."""
        node = self.node
        known = self.children.keys() | {node.rank}  # itself: it may stand in for another
        orphans = [one for one in self._planned(place) if one not in known]
        if orphans:
            self.settled_s = now + node.options.attach_s + RAMP_S
        if self._vacancies.standbys.get(place, peer) in self.children.keys() - {peer}:
            return  # it was slow before it was lost, and has been replaced
        relays = any(map(self._planned, orphans))
        if relays and not self.is_control and self._feeds_count() + len(orphans) > self._places():
            self._vacancies.open(place, reason, self._unfit | {node.rank}, now)
        for orphan in orphans:
            self._expect(orphan, now)
            own = node.places[self.index]
            node.send(orphan, Adopt(node.transfer, self.index, own, peer, lives, reason))

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
            races = child.needs & node.mask(self.index)  # not what is lent
            if self.balance is not None and races and self.balance.holds(self, now):
                child.pace.owed_s = max(child.pace.owed_s, now)
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
        child.progress_s = self.acked_s = now
        self.acked_count += 1
        self.feed(peer, now)
        if len(child.in_flight) < self.node.options.window_count:
            self._paces.ended(peer, child.pace, now)
        if self.balance is not None:
            self.balance.pump(now)
        elif self._budget.rate or self._any_demoted:
            self.pump(now)

    def wanted(self, peer: int, chunks: int, now: float) -> None:
        """The child has lost what it was sent."""
        child = self.children[peer]
        # Of other trees: what was lent, and came damaged.
        sent = chunkset.from_indexes(child.in_flight)
        child.needs |= chunks & (self.node.mask(self.index) | sent)
        child.in_flight.difference_update(chunkset.indexes(chunks))
        self.feed(peer, now)
        if len(child.in_flight) < self.node.options.window_count:
            self._paces.ended(peer, child.pace, now)

    def lent(self, peer: int, chunks: int, now: float) -> None:
        """Send the child chunks of other trees too, when they are there."""
        self.children[peer].needs |= chunks
        self.feed(peer, now)

    def spared(self, peer: int, chunks: int) -> None:
        """The child gets these from another: what is not under way need not be sent."""
        self.children[peer].needs &= ~chunks

    def has_sent(self, peer: int, chunk: int) -> bool:
        """Return whether an acknowledgement is due."""
        return peer in self.children and chunk in self.children[peer].in_flight

    def took_bytes(self, peer: int, now: float) -> None:
        if peer in self.children:
            self.children[peer].progress_s = now

    def heard_alive(self, peer: int, message: Alive) -> None:
        child = self.children[peer]
        child.count = message.have_count
        present = chunkset.decode(message.present, self.node.topology.rank_count)
        child.present = present | 1 << peer
        child.pace.have_count = max(child.pace.have_count, message.have_count)
        child.child_count = message.child_count

    def unsent_count(self) -> int:
        """Return how many chunks are still to be sent to the child that lacks most."""
        fed = (child for child in self.children.values() if not child.demoted)
        mask = self.node.mask(self.index)  # what is lent is beside the race
        return max(((one.needs & mask).bit_count() for one in fed), default=0)

    def present(self) -> int:
        """Return the ranks of this node's subtree that it hears of, itself among them."""
        present = 1 << self.node.rank
        for child in self.children.values():
            present |= child.present
        return present

    def total(self) -> int:
        """Return what the subtrees of all children have, as they say."""
        return sum(child.count for child in self.children.values())

    # ------------------------------------------------------------ clocks

    def tick(self, now: float) -> None:
        for peer in [peer for peer, until_s in self._expected.items() if now > until_s]:
            del self._expected[peer]
            reason = "did not attach in time"
            self.node.ledger.lose(peer, 0, reason)
            self._replace(peer, peer, False, reason, now)
        if self.is_control:
            return
        self._attach_all(self._vacancies.tick(now), now)
        if self._budget.rate or self._any_demoted or self.balance is not None:
            self.pump(now)
        options, have = self.node.options, self.node.have
        for peer, child in list(self.children.items()):
            if not any(have >> chunk & 1 for chunk in child.in_flight):
                child.progress_s = now  # what has not come here yet is not the child's fault
                child.pace.owed_s = max(child.pace.owed_s, now)
            elif not self._relays(child):
                continue
            elif now - child.progress_s > options.stall_s:
                self._demote(peer, child, "no progress", now)
            elif self._paces.is_slow(peer, child.pace, now):
                self._demote(peer, child, "slow", now)
            elif self._lacks_much(child) and self._paces.is_stuck(peer, child.pace, now):
                self._demote(peer, child, "stuck", now)
        self._paces.take_stock({peer: one.pace for peer, one in self.children.items()}, now)

    def asleep(self, now: float) -> None:
        """This node itself did not run for a while: nobody else is to blame."""
        for child in self.children.values():
            child.progress_s = now
            self._paces.restart(child.pace, now)
        self._paces.forget()
        for peer in self._expected:
            self._expect(peer, now)

    def _lacks_much(self, child: Child) -> bool:
        return (child.needs & self.node.have).bit_count() + len(child.in_flight) >= STUCK_COUNT

    def _relays(self, child: Child) -> bool:
        return not child.demoted and bool(child.child_count or self._planned(child.place))

    def _demote(self, peer: int, child: Child, reason: str, now: float) -> None:
        """Make a child a leaf and take its children."""
        child.demoted = self._any_demoted = True
        self._paces.ended(peer, child.pace, now)
        self._unfit.add(peer)
        node = self.node
        node.ledger.note(peer, f"{reason}: made a leaf by rank {node.rank}")
        self._replace(peer, child.place, True, reason, now)
        instead = self._rest(peer)
        message = Demote(node.transfer, self.index, instead, reason)
        if instead < 0 or self._is_neighbour_elsewhere(peer):
            node.send(peer, message)
        else:
            # What is under way to it would take its share of this node's link for long.
            self._remove(peer, now)
            node.actions.append(SendPast(peer, message))

    def _is_neighbour_elsewhere(self, peer: int) -> bool:
        """Return whether a peer feeds this node, or is fed by it, in another tree."""
        node = self.node
        other = (fed for fed in node.fed[:-1] if fed is not self.children)
        return peer in node.parents or any(peer in fed for fed in other)
