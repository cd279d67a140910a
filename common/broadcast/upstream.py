"""Upstream: who feeds this node in one tree, and whom it turns to next.  Sans-I/O.

States (docs/broadcast.md#states):

    OFF        needs no parent: the source; a node that has failed, in data trees
    SEEKING    will ask again at `retry_s`
    ASKING     an `Attach` is under way
    ATTACHED   `parent` has accepted

A parent is left when it is lost, says so (`Leave`), is silent, or makes no progress although it
has what this node lacks.  The next one is the nearest planned ancestor that is not being avoided;
what an ancestor offers (`Adopt`) or refers to (`Refuse.instead`) comes first.  Only nodes at a
lower position are ever asked, so no cycle can form, and the source is at the end of every list.
A parent that merely has nothing itself is not left: whoever feeds that one sees to it.
"""

from __future__ import annotations

import enum

from common.broadcast import chunkset
from common.broadcast.node import END, Disconnect, Node
from common.broadcast.topology import SOURCE
from common.broadcast.wire import Accept, Adopt, Alive, Attach, Leave, Refuse

__all__ = ["Upstream", "UpstreamState"]

REDIRECT_COUNT_MAX = 3
RETRY_S = 0.2
PATIENCE_DOUBLED_MAX = 4


class UpstreamState(enum.Enum):
    OFF = "off"
    SEEKING = "seeking"
    ASKING = "asking"
    ATTACHED = "attached"


class Upstream:
    """This node's place below others in one tree."""

    def __init__(self, node: Node, index: int) -> None:
        self.node = node
        self.index = index
        self.state = UpstreamState.OFF if node.rank == SOURCE else UpstreamState.SEEKING
        self.parent_have_count = 0
        self.orphan_s = 0.0
        """Since when there is no parent."""
        self._started_s = 0.0
        self._retry_s = 0.0
        self._asked_s = 0.0
        self.attempt = 0
        """Of the last attach."""
        self._redirect_count = 0
        self._unanswered_count = 0
        self._avoided: dict[int, float] = {}
        self._asked_again: set[int] = set()
        self._progress_s = 0.0
        """When it last made progress, or this node lacked nothing that it has."""
        self._fed_s = 0.0
        """When anything of a chunk last came."""
        self._move_count = 0
        self._lag = (0.0, 0, 0)
        """When, own count, parent's count: where the comparison of rates began."""
        self._parent_rate = 0.0
        """Chunks a second that the parent has shown to receive; it should pass on as many."""

    @property
    def parent(self) -> int:
        return self.node.parents[self.index]

    @parent.setter
    def parent(self, peer: int) -> None:
        self.node.parents[self.index] = peer

    def start(self, now: float) -> None:
        self._started_s = self.orphan_s = now
        if self.state is UpstreamState.SEEKING:
            self._ask(self._choose(now), now)

    def stop(self, reason: str) -> None:
        """Need no parent any more."""
        if self.state in (UpstreamState.ASKING, UpstreamState.ATTACHED):
            self._say_leave(reason)
        self.state, self.parent = UpstreamState.OFF, -1

    def is_parent(self, peer: int) -> bool:
        return peer == self.parent and self.state is UpstreamState.ATTACHED

    def accepted(self, peer: int, message: Accept, now: float) -> None:
        if not self._answers(peer, message.attempt):
            if not self.is_parent(peer):
                self.decline(peer, "fed by another", message.attempt)
            return
        self.state = UpstreamState.ATTACHED
        self.parent_have_count = message.have_count
        self._redirect_count = self._unanswered_count = 0
        self._progress_s = now
        self._lag = (now, self.node.have_count(self.index), message.have_count)
        self._parent_rate = 0.0
        if self.index == self.node.control_index:
            self.node.ledger.forget_told()

    def refused(self, peer: int, message: Refuse, now: float) -> None:
        """Ask another; a parent may say so later too, when there is somebody in its place."""
        sent_away = self.is_parent(peer) and message.attempt == self.attempt
        if not sent_away and not self._answers(peer, message.attempt):
            return
        self._avoided[peer] = now + self.node.options.avoid_s / 5
        instead = message.instead
        if not self._is_before(message.place) and message.place != END:
            self._go_to_the_end()
        if 0 <= instead not in (peer, self.node.rank) and self._is_before(message.place):
            self._redirect_count += 1
            # Who has failed here is asked once more: it may have been the connection, held up by
            # a chunk that stopped half-way.  After that the other one has to do.
            failed = self._avoided.get(instead, 0) > now
            self._ask(peer if failed and instead in self._asked_again else instead, now)
            if failed:
                self._asked_again.add(instead)
        else:
            self._seek(now)

    def adopted(self, peer: int, message: Adopt, now: float) -> None:
        """Take the offer if it is about the parent that this node has, or has none.

        An ancestor that was cut off or asleep takes its living children for lost, and offers
        itself to theirs: one that is well fed stays where it is.
        """
        fits = self.parent in (message.instead_of, -1) and self.state is not UpstreamState.OFF
        if self.state is UpstreamState.ATTACHED and not message.lives:
            fits = fits and not self._is_well_fed(now)
        if not fits or not self._is_before(message.place):
            if self.parent != peer:
                self.decline(peer, "fed by another")
            return
        if self.parent >= 0:
            self._avoided[self.parent] = now + self.node.options.avoid_s
            self._say_leave("adopted by another")
        self._ask(peer, now)

    def promoted(self, peer: int, place: int, now: float) -> None:
        """Take the place of a relay; `may_take` was asked before."""
        self.node.places[self.index] = place
        if self.state is UpstreamState.ATTACHED and self.parent != peer:
            self._say_leave("takes another place")
        self._ask(peer, now)

    def may_take(self, place: int) -> bool:
        """Return whether this node could take a place: one only, and nearer to the source."""
        node, index = self.node, self.index
        is_free = node.places[index] in (node.rank, END) and node.relays
        on = self.state is not UpstreamState.OFF and index != node.control_index
        return is_free and on and 0 < node.position(index, place) < node.own_position(index)

    def demoted(self, instead: int, now: float) -> None:
        """Go to the end of the tree, where another has room."""
        if instead in (-1, self.node.rank):
            return
        self.node.places[self.index] = END
        self._say_leave("made a leaf")
        self._ask(instead, now)

    def left(self, peer: int, message: Leave, now: float) -> None:
        """The parent has ended it: find another."""
        if self.is_parent(peer) or self._answers(peer, message.attempt):
            self._avoided[peer] = now + self.node.options.avoid_s / 5
            self._seek(now)

    def lost(self, peer: int, now: float) -> None:
        """The connection to the parent is gone."""
        if peer != self.parent:
            return
        self.parent = -1
        early = now - self._started_s < self.node.options.join_s
        if early and self.state is UpstreamState.ASKING and not self._redirect_count:
            # It may not have started yet: its place in the plan is worth a moment's patience.
            self.state, self._retry_s = UpstreamState.SEEKING, now + RETRY_S
            return
        self._avoided[peer] = now + self.node.options.avoid_s
        self._seek(now)

    def heard_alive(self, message: Alive, now: float) -> None:
        self.parent_have_count = message.have_count
        node = self.node
        if self.index == node.control_index or not node.is_in_rack(self.parent) or not node.relays:
            return  # a parent in another rack passes on what the uplink lets through
        options = self.node.options
        began_s, mine, theirs = self._lag
        count, span_s = self.node.have_count(self.index), now - began_s
        if span_s < options.slow_s:
            return
        self._parent_rate = max(self._parent_rate, (message.have_count - theirs) / span_s)
        expected = self._parent_rate / max(1, message.child_count) * span_s
        if expected < 2 * options.window_count:
            return  # too few to judge by
        self._lag = (now, count, message.have_count)
        behind = min(message.have_count - count, theirs - mine)
        if behind >= 2 * options.window_count and count - mine < options.slow_fraction * expected:
            self._move("it passes on too slowly", now)

    def progressed(self, now: float) -> None:
        """A chunk, or bytes of one, came from the parent."""
        self._progress_s = self._fed_s = now

    def distrust(self, reason: str, now: float) -> None:
        """The parent sends damaged chunks again and again."""
        self._move(reason, now)

    def tick(self, now: float) -> None:
        options = self.node.options
        if self.state is UpstreamState.SEEKING and now >= self._retry_s:
            self._ask(self._choose(now), now)
        elif self.state is UpstreamState.ASKING:
            # A link may be so slow that no answer comes in time: be more patient each time.
            patience_s = options.attach_s * 2 ** min(self._unanswered_count, PATIENCE_DOUBLED_MAX)
            heard_s = self.node.heard_s.get(self.parent, 0)
            if now - max(self._asked_s, heard_s) > patience_s:
                self._unanswered_count += 1
                peer, self.parent = self.parent, -1
                self.node.actions.append(Disconnect(peer, "did not answer an attach"))
                self.node.renewed_s[peer] = now  # what other trees have asked it is gone as well
                self._avoided[peer] = now + options.avoid_s
                self._seek(now)
            elif now - self._asked_s > patience_s and self._was_renewed():
                self._ask(self.parent, now)
        elif self.state is UpstreamState.ATTACHED and self.index != self.node.control_index:
            lacking = self.parent_have_count > self.node.have_count(self.index)
            if not lacking or not self.node.relays:  # a leaf that was demoted has to wait
                self._progress_s = now
            elif now - self._progress_s > options.stall_s:
                self._move("it makes no progress", now)

    def _was_renewed(self) -> bool:
        """Return whether the one asked may never have heard of it."""
        return self.node.renewed_s.get(self.parent, -1.0) > self._asked_s

    def _is_before(self, place: int) -> bool:
        """Return whether who has *place* is ahead of this node."""
        return self.node.position(self.index, place) < self.node.own_position(self.index)

    def _go_to_the_end(self) -> None:
        """Let anybody feed this node in this tree, if it feeds nobody itself."""
        if self.index != self.node.control_index and not self.node.fed[self.index]:
            self.node.places[self.index] = END

    def _is_well_fed(self, now: float) -> bool:
        if self.index == self.node.control_index:
            return False  # nearer to the source is never worse, and no data move
        return now - self._fed_s < self.node.options.silence_s / 2

    def _answers(self, peer: int, attempt: int) -> bool:
        asking = self.state is UpstreamState.ASKING
        return asking and peer == self.parent and attempt == self.attempt

    def _move(self, reason: str, now: float) -> None:
        """Leave a parent that lives, but not for ever: moving is not free."""
        self._progress_s = now
        if self._move_count >= self.node.options.move_count_max or self.parent == SOURCE:
            return
        self._move_count += 1
        self.node.ledger.note(self.parent, f"left by rank {self.node.rank}: {reason}")
        self._avoided[self.parent] = now + self.node.options.avoid_s
        self._say_leave(reason)
        self._seek(now)

    def _say_leave(self, reason: str) -> None:
        self.decline(self.parent, reason, self.attempt)

    def decline(self, peer: int, reason: str, attempt: int = 0) -> None:
        """Turn down an offer, or leave what was asked for under *attempt*."""
        self.node.send(peer, Leave(self.node.transfer, self.index, attempt, reason))

    def _seek(self, now: float) -> None:
        """Ask the next one at once, or wait a little when all have failed lately."""
        self.parent = -1
        self._redirect_count = 0
        self._orphaned(now)
        self.state = UpstreamState.SEEKING
        peer = self._choose(now)
        if self._avoided.get(peer, 0) > now:
            self._retry_s = now + RETRY_S
        else:
            self._ask(peer, now)

    def _orphaned(self, now: float) -> None:
        if self.state is UpstreamState.ATTACHED:
            self.orphan_s = now

    def _choose(self, now: float) -> int:
        """Return the nearest ancestor that is not avoided; if all are, the one longest ago."""
        tree, place = self.node.tree(self.index), self.node.places[self.index]
        ancestors = list(tree.ancestors(self.node.rank if place == END else place))
        for rank in ancestors:
            if self._avoided.get(rank, 0) <= now:
                return rank
        return min(ancestors, key=lambda rank: self._avoided[rank])

    def _ask(self, peer: int, now: float) -> None:
        node = self.node
        if self.attempt:
            node.attempt += 1  # what others say of the earlier one is void
        self.attempt = node.attempt
        self._orphaned(now)
        self.state, self.parent, self._asked_s = UpstreamState.ASKING, peer, now
        have = chunkset.encode(node.have & node.mask(self.index))
        redirect_count = min(self._redirect_count, REDIRECT_COUNT_MAX)
        place, child_count = node.places[self.index], len(node.fed[self.index])
        attach = Attach(
            node.transfer, self.index, self.attempt, have, redirect_count, place, child_count
        )
        node.send(peer, attach)
