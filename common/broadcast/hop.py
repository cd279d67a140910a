"""The hop engine: what one node does with the chunks of one broadcast.  Sans-I/O.

The shell calls a method for each event and carries out the returned actions in order; it calls
`tick` whenever `wake_s` is reached.  Positions: `topology` (who) -> this (what, when) -> shell.

Invariants
  * a chunk counts as had only after its sum was found right;
  * what comes from the parent is passed on while it comes, unless the parent's last two chunks
    were damaged: so damage travels on twice at most, and is found by every node for itself;
  * it is acknowledged only after the sink has it, so at most `window_count` chunks per tree are
    held for a sink that is slow, and a parent never waits for anything but this node's sink;
  * "verified" is said only by the node itself, after every chunk was read back from its sink;
  * a chunk that this node has is never asked for; one that comes all the same is dropped.

Neighbours: a silent one is lost, in all trees; one that talks without progress is not relied on
(`upstream`, `downstream`).  When this node itself did not run for a while (SIGSTOP, swapping) it
blames nobody and starts its clocks anew.

The source ends the transfer: when all have verified or failed; `lost_grace_s` after the last news
when the rest is lost; `quiet_s` after the last progress; at the deadline.  Not here: connections,
sums, the choice of the tree.  docs/broadcast.md has states and messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from common.broadcast import chunkset
from common.broadcast.balance import Balance
from common.broadcast.downstream import Budget, Downstream
from common.broadcast.loans import Loans
from common.broadcast.manifest import Manifest
from common.broadcast.node import (
    Action,
    Disconnect,
    Finished,
    HopOptions,
    Node,
    VerifySink,
    WriteChunk,
)
from common.broadcast.outcome import Summary, Verdict
from common.broadcast.passing import Pass
from common.broadcast.topology import SOURCE, Topology
from common.broadcast.upstream import Upstream, UpstreamState
from common.broadcast.wire import (
    NOTHING,
    Accept,
    Ack,
    Adopt,
    Alive,
    Attach,
    Demote,
    Finish,
    Lack,
    Leave,
    Lend,
    Nack,
    PassOver,
    Promote,
    Refuse,
    Report,
    Spare,
    Want,
)
from common.errors import Code, KaError
from common.messages import Message

__all__ = ["Hop"]

DISTRUSTED_COUNT = 2
"""Damaged chunks in a row after which a parent's next one is not passed on while it comes.  One may
be what a relay further up left when it was lost: were all below to wait for the whole chunk then,
each would fall behind by as much."""
DAMAGED_COUNT_MAX = 3
"""Damaged chunks in a row after which a node looks for another parent."""
NOBODY = -1
"""Who sent a chunk that came by multicast."""


class Hop:
    """One node of one transfer."""

    def __init__(
        self,
        rank: int,
        topology: Topology,
        manifest: Manifest,
        options: HopOptions,
        *,
        have: int = 0,
        attempt: int = 1,
        passing: bool = False,
    ) -> None:
        """*have*: what the sink holds already, each chunk's sum found right (delta, resume).

        *attempt*: higher than any that an earlier process for this rank can have used.
        *passing*: a multicast pass comes first; till it is over only the control tree is used.
        """
        assert 0 <= rank < topology.rank_count
        self.node = Node(
            rank,
            topology,
            transfer=manifest.transfer_id,
            chunk_count=manifest.chunk_count,
            chunk_size=manifest.chunk_size,
            options=options,
            have=have,
            attempt=attempt,
        )
        budget = Budget(options.rate_limit, manifest.chunk_size, 2 * options.tick_s)
        indexes = range(len(topology.trees) + 1)
        self.ups = [Upstream(self.node, index) for index in indexes]
        self.downs = [Downstream(self.node, index, budget) for index in indexes]
        self.loans = Loans(self.node, self.ups[:-1], self.downs[:-1])
        self.passing = Pass(self.node, self.ups, self.downs, is_on=passing)
        self.verdict = Verdict.PENDING
        self.finished = False
        self.wake_s = 0.0
        """When `tick` is due."""
        self.duplicate_count = 0
        """Chunks that came although this node had them."""
        self.damaged_count = 0
        self._written = self.node.have
        self._unwritten: dict[int, list[int]] = {}
        """Chunks handed to the sink, and who have sent them."""
        self._verifying = False
        self._verify_count = 0
        self._damaged: dict[int, int] = {}
        """Damaged chunks in a row, by sender."""
        self._below = topology.control.below(rank)
        """This node and those that report through it."""
        self._now = 0.0
        self._started_s = 0.0
        self._news_s = 0.0
        self._progress_s = 0.0
        self._progress = -1
        self._say_s = 0.0
        self._handlers = self._by_message()

    def _by_message(self) -> dict[type, Callable[[int, Any, float], None]]:
        return {
            Attach: self._attach,
            Accept: self._accept,
            Refuse: self._refuse,
            Ack: self._ack,
            Want: self._want,
            Alive: self._alive,
            Adopt: self._adopt,
            Leave: self._leave,
            Demote: self._demote,
            Report: self._report,
            Finish: self._finish,
            Nack: self._nack,
            Promote: self._promote,
            PassOver: self._pass_over,
            Lack: self._lack,
            Lend: self._lend,
            Spare: self._spare,
        }

    # ------------------------------------------------------------ events

    def start(self, now: float) -> list[Action]:
        """Begin; before any other event."""
        self._now = self._started_s = self._news_s = self._progress_s = now
        if self.node.rank == SOURCE and len(self.downs) > 2:
            balance = Balance(self.downs[:-1], now)
            for down in self.downs[:-1]:
                down.balance = balance
        self.passing.start(now)
        self._check_complete()
        self.wake_s = now + self.node.options.tick_s
        return self._take()

    def message_received(self, peer: int, message: Message, now: float) -> list[Action]:
        """Take a message; raises KaError PROTOCOL for one that is not for this transfer."""
        if type(message) not in self._handlers:
            raise KaError(Code.PROTOCOL, "a chunk without its payload, or no message of hops")
        self.node.check(peer, message)
        self._enter(now)
        self.node.heard_s[peer] = now
        if not self.finished:
            self._handlers[type(message)](peer, message, now)
        elif type(message) is Attach:
            self.node.send(peer, Finish(self.node.transfer))
        return self._take()

    def chunk_begins(self, peer: int, chunk: int, now: float) -> list[Action]:
        """The first bytes of a chunk have come; `chunk_received` or `chunk_broke_off` follows."""
        self.node.check_chunk(chunk)
        self._enter(now)
        node = self.node
        damaged_count = self._damaged.get(peer, 0)
        fit = self._from(peer, chunk) is not None and damaged_count < DISTRUSTED_COUNT
        if fit and node.relays and not self.finished:
            node.coming |= 1 << chunk & ~node.have
            self._pass_on(chunk, now)
        return self._take()

    def chunk_broke_off(self, chunk: int) -> list[Action]:
        """The rest of a chunk does not come, or not soon: it is not passed on any more."""
        self.node.coming &= ~(1 << chunk)
        return self._take()

    def chunk_received(self, peer: int, chunk: int, intact: bool, now: float) -> list[Action]:
        """Take a chunk; *intact*: its sum is that of the manifest."""
        self.node.check_chunk(chunk)
        self._enter(now)
        node, index = self.node, self.node.tree_of(chunk)
        node.coming &= ~(1 << chunk)
        node.heard_s[peer] = now
        up = self._from(peer, chunk)
        if up is not None:
            up.progressed(now)
            self.ups[index].progressed(now)  # what was lent, the parent need not bring
        elif peer != self.ups[index].parent and not self.finished:
            node.send(peer, Leave(node.transfer, index, 0, "fed by another"))
        if self.finished or self.verdict is Verdict.FAILED:
            return self._take()
        if not intact:
            self._take_damaged(peer, chunk, now)
        elif node.have >> chunk & 1:
            self.duplicate_count += 1
            if up is not None and chunk in self._unwritten:
                self._unwritten[chunk].append(peer)
            elif up is not None:
                node.send(peer, Ack(node.transfer, chunk))
        else:
            self._damaged.pop(peer, None)
            self._take_intact(chunk, peer, now)
        return self._take()

    def chunk_heard(self, chunk: int, now: float) -> list[Action]:
        """A chunk has come by multicast, and its sum is right."""
        self._enter(now)
        is_known = self.node.have >> chunk & 1
        if not (is_known or self.finished or self.verdict is Verdict.FAILED):
            self._take_intact(chunk, NOBODY, now)
        return self._take()

    def pass_over(self, now: float) -> list[Action]:
        """The multicast pass is over: from here on neighbours bring what is lacking."""
        self._enter(now)
        if not self.finished:
            self.passing.end(now)
        return self._take()

    def neighbour_lost(self, peer: int, reason: str, now: float) -> list[Action]:
        """The connection is gone, or could not be made."""
        self._enter(now)
        if not self.finished:
            self._lose(peer, reason, now)
        return self._take()

    def bytes_arrived(self, peer: int, now: float) -> list[Action]:
        """Part of a chunk has come: over a slow link the whole takes longer than patience."""
        self._enter(now)
        self.node.heard_s[peer] = now
        for up in self.ups:
            if up.is_parent(peer):
                up.progressed(now)
        return self._take()

    def bytes_left(self, peer: int, now: float) -> list[Action]:
        """The connection to a child has taken part of a chunk."""
        self._enter(now)
        for down in self.downs:
            down.took_bytes(peer, now)
        return self._take()

    def sink_wrote(self, chunk: int, now: float) -> list[Action]:
        """The sink has a chunk, and it can be read back from there."""
        self._enter(now)
        node, peers = self.node, self._unwritten.pop(chunk, ())
        if self.finished or self.verdict is Verdict.FAILED:
            return self._take()
        self._written |= 1 << chunk
        for peer in peers:
            if self._from(peer, chunk) is not None:
                node.send(peer, Ack(node.transfer, chunk))
        self._check_complete()
        return self._take()

    def sink_verified(self, bad: Iterable[int], now: float) -> list[Action]:
        """The sink was read back; *bad*: the chunks whose sums were wrong."""
        self._enter(now)
        spoilt = chunkset.from_indexes(bad)
        self._verifying = False
        if self.finished or self.verdict is Verdict.FAILED:
            return self._take()
        if not spoilt:
            self.verdict = Verdict.VERIFIED
            self.node.ledger.verify(self.node.rank)
            self._tell()
        elif self._verify_count >= self.node.options.verify_count_max:
            self._fail(f"{spoilt.bit_count()} chunks were read back damaged again and again", now)
        else:
            self._want_again(spoilt, now)
        return self._take()

    def sink_failed(self, reason: str, now: float) -> list[Action]:
        """The sink cannot take any more: this node is out, and nobody else."""
        self._enter(now)
        if not self.finished and self.verdict is not Verdict.FAILED:
            self._fail(reason, now)
        return self._take()

    def tick(self, now: float) -> list[Action]:
        """Look at the clocks."""
        self._enter(now)
        self.wake_s = now + self.node.options.tick_s
        if self.finished:
            return self._take()
        self._lose_the_silent(now)
        for up, down in self.passing.trees():
            up.tick(now)
            down.tick(now)
        self.loans.tick(now)
        self._tell()
        if now >= self._say_s:
            self._say_alive(now)
        if self.node.rank == SOURCE:
            self._consider_the_end(now)
        else:
            control = self.ups[-1]
            alone = control.state is not UpstreamState.ATTACHED
            if alone and now - control.orphan_s > self.node.options.orphan_s:
                self._end(f"no way to the source for {self.node.options.orphan_s:.0f} s")
        return self._take()

    # ------------------------------------------------------------ the shell's side

    def _take(self) -> list[Action]:
        actions = self.node.actions
        self.node.actions = []
        return actions

    def _enter(self, now: float) -> None:
        """Find out whether this process was asleep."""
        if now - self._now > self.node.options.silence_s / 2:
            for peer in self.node.heard_s:
                self.node.heard_s[peer] = now
            for down in self.downs:
                down.asleep(now)
            for up in self.ups:
                up.progressed(now)
            self._progress_s = now
        self._now = now

    # ------------------------------------------------------------ messages

    def _attach(self, peer: int, message: Attach, now: float) -> None:
        if message.attempt > 1:
            self.node.renewed_s[peer] = now
        self.downs[message.tree].attach(peer, message, now)
        if message.tree == self.node.control_index:
            self.passing.greet(peer)

    def _accept(self, peer: int, message: Accept, now: float) -> None:
        self.ups[message.tree].accepted(peer, message, now)

    def _refuse(self, peer: int, message: Refuse, now: float) -> None:
        self.ups[message.tree].refused(peer, message, now)

    def _ack(self, peer: int, message: Ack, now: float) -> None:
        chunk = message.chunk
        for down in self.downs[:-1]:
            if down.has_sent(peer, chunk):
                down.acked(peer, chunk, now)
                return
        index = self.node.tree_of(chunk)
        if self._is_child(peer, index, now):
            self.downs[index].acked(peer, chunk, now)

    def _want(self, peer: int, message: Want, now: float) -> None:
        chunks = chunkset.decode(message.chunks, self.node.chunk_count)
        if self._is_child(peer, message.tree, now):
            self.downs[message.tree].wanted(peer, chunks, now)

    def _alive(self, peer: int, message: Alive, now: float) -> None:
        up = self.ups[message.tree]
        if up.is_parent(peer):
            up.heard_alive(message, now)
        elif self._is_child(peer, message.tree, now):
            self.downs[message.tree].heard_alive(peer, message)

    def _adopt(self, peer: int, message: Adopt, now: float) -> None:
        self.ups[message.tree].adopted(peer, message, now)

    def _leave(self, peer: int, message: Leave, now: float) -> None:
        self.ups[message.tree].left(peer, message, now)
        self.downs[message.tree].left(peer, message, now)

    def _demote(self, peer: int, message: Demote, now: float) -> None:
        up = self.ups[message.tree]
        if up.is_parent(peer):
            self._release(message.reason, now)
            up.demoted(message.instead, now)

    def _promote(self, peer: int, message: Promote, now: float) -> None:
        up = self.ups[message.tree]
        if up.may_take(message.place):
            self.downs[message.tree].make_room(message.place, now)
            up.promoted(peer, message.place, now)
        else:
            up.decline(peer, "has a place")

    def _report(self, peer: int, message: Report, now: float) -> None:
        if self.node.ledger.merge(message):
            self._news_s = self._progress_s = now
            if not self.node.ledger.open_ranks() & self._below:
                self._tell()  # the last news from here: it need not wait for a tick
                if self.node.rank == SOURCE:
                    self._consider_the_end(now)

    def _finish(self, peer: int, message: Finish, now: float) -> None:
        self._end("")

    def _nack(self, peer: int, message: Nack, now: float) -> None:
        """It is the shell's, for the pass."""

    def _pass_over(self, peer: int, message: PassOver, now: float) -> None:
        if self.ups[-1].is_parent(peer):
            self.passing.end(now)

    def _lack(self, peer: int, message: Lack, now: float) -> None:
        is_data = message.tree < self.node.control_index
        if is_data and self._is_child(peer, message.tree, now):
            self.loans.lend(peer, message, now)

    def _lend(self, peer: int, message: Lend, now: float) -> None:
        if message.tree < self.node.control_index:
            self.loans.borrow(peer, message, now)

    def _spare(self, peer: int, message: Spare, now: float) -> None:
        if self._is_child(peer, message.tree, now):
            chunks = chunkset.decode(message.chunks, self.node.chunk_count)
            self.downs[message.tree].spared(peer, chunks)

    def _from(self, peer: int, chunk: int) -> Upstream | None:
        """Return where *peer* is the parent that a chunk may come from."""
        return next((up for up in self.loans.ups_of(chunk) if up.is_parent(peer)), None)

    def _is_child(self, peer: int, index: int, now: float) -> bool:
        """Return whether *peer* is; if it takes itself for one, tell it."""
        if peer in self.downs[index].children:
            return True
        if peer != self.ups[index].parent:
            self.node.send(peer, Leave(self.node.transfer, index, 0, "not a child"))
        return False

    # ------------------------------------------------------------ chunks and the sink

    def _take_damaged(self, peer: int, chunk: int, now: float) -> None:
        node, up = self.node, self._from(peer, chunk)
        self.damaged_count += 1
        if up is None:
            return  # it had no reason to wait for the rest of it
        self._damaged[peer] = count = self._damaged.get(peer, 0) + 1
        if count >= DAMAGED_COUNT_MAX:
            self._damaged[peer] = 0
            up.distrust(f"{count} damaged chunks in a row", now)
        if up.is_parent(peer):
            node.send(peer, Want(node.transfer, up.index, chunkset.encode(1 << chunk)))

    def _take_intact(self, chunk: int, peer: int, now: float) -> None:
        node = self.node
        node.have |= 1 << chunk
        self._unwritten[chunk] = [peer]
        node.actions.append(WriteChunk(chunk))
        self._pass_on(chunk, now)
        self.loans.consider(now)

    def _pass_on(self, chunk: int, now: float) -> None:
        for up in self.loans.ups_of(chunk):
            self.downs[up.index].pump(now)

    def _check_complete(self) -> None:
        node = self.node
        complete = self._written == node.everything and node.rank != SOURCE
        if complete and not self._verifying and self.verdict is Verdict.PENDING:
            self._verifying = True
            self._verify_count += 1
            node.actions.append(VerifySink())

    def _want_again(self, spoilt: int, now: float) -> None:
        node = self.node
        node.have &= ~spoilt
        self._written &= ~spoilt
        for up in self.ups[:-1]:
            chunks = spoilt & node.mask(up.index)
            if chunks and up.state is UpstreamState.ATTACHED:
                node.send(up.parent, Want(node.transfer, up.index, chunkset.encode(chunks)))

    def _fail(self, reason: str, now: float) -> None:
        self.verdict = Verdict.FAILED
        self.node.ledger.fail(self.node.rank, self.node.attempt, reason)
        self._release(reason, now)
        for up in self.ups[:-1]:
            up.stop(reason)
        self._tell()

    def _release(self, reason: str, now: float) -> None:
        """Feed nobody any more; the control tree goes on."""
        self.node.relays = False
        for down in self.downs[:-1]:
            down.release(reason, now)

    # ------------------------------------------------------------ neighbours

    def _neighbours(self) -> set[int]:
        found = {up.parent for up in self.ups if up.state is UpstreamState.ATTACHED}
        return found.union(*(down.children for down in self.downs))

    def _lose_the_silent(self, now: float) -> None:
        silence_s = self.node.options.silence_s
        heard_s = self.node.heard_s
        for peer in self._neighbours():
            if now - heard_s.get(peer, 0) > silence_s:
                reason = f"silent for {silence_s} s"
                self.node.actions.append(Disconnect(peer, reason))
                self._lose(peer, reason, now)

    def _lose(self, peer: int, reason: str, now: float) -> None:
        self._damaged.pop(peer, None)
        for up, down in zip(self.ups, self.downs, strict=True):
            up.lost(peer, now)
            down.lost(peer, reason, now)

    def _say_alive(self, now: float) -> None:
        """Tell neighbours how far this node is, and that it lives."""
        node = self.node
        self._say_s = now + node.options.alive_s
        for index, (up, down) in enumerate(zip(self.ups, self.downs, strict=True)):
            count = self._count(index)
            message = Alive(node.transfer, index, count, len(down.children))
            if up.state is UpstreamState.ATTACHED:
                present = chunkset.encode(down.present()) if down.is_control else NOTHING
                node.send(up.parent, message._replace(present=present))
            for peer in down.children:
                node.send(peer, message)

    def _count(self, index: int) -> int:
        if index < self.node.control_index:
            return self.node.have_count(index)
        return self.node.have.bit_count() + self.downs[index].total()

    def _tell(self) -> None:
        """Send the control parent what it does not know."""
        control = self.ups[-1]
        if control.state is UpstreamState.ATTACHED:
            report = self.node.ledger.untold(self.node.transfer)
            if report is not None:
                self.node.send(control.parent, report)

    # ------------------------------------------------------------ the end

    def _consider_the_end(self, now: float) -> None:
        options, ledger = self.node.options, self.node.ledger
        progress = self._count(self.node.control_index)
        if progress != self._progress:
            self._progress, self._progress_s = progress, now
        still_s = now - max(self._news_s, self._progress_s)
        grace_s = options.lost_grace_s + options.late_grace_s * ledger.some_never_joined()
        graceless = still_s >= grace_s and ledger.all_open_are_lost(self.downs[-1].present())
        if graceless or not ledger.open_ranks():
            self._end("")
        elif now - self._progress_s >= options.quiet_s:
            self._end(f"no progress for {options.quiet_s:.0f} s")
        elif options.deadline_s and now - self._started_s >= options.deadline_s:
            self._end(f"the deadline of {options.deadline_s:.0f} s is over")

    def _end(self, complaint: str) -> None:
        """Close the transfer here, and below in the control tree."""
        self.finished = True
        node = self.node
        for peer in self.downs[-1].children:
            node.send(peer, Finish(node.transfer))
        if node.rank == SOURCE:
            node.ledger.lose_absent(self.downs[-1].present())
            summary = node.ledger.summary()
        else:
            own = node.ledger.entry(node.rank)
            done = self.verdict is Verdict.VERIFIED
            summary = Summary(1 << node.rank if done else 0, {} if done else {node.rank: own}, {})
        node.actions.append(Finished(summary, complaint))
