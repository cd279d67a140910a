"""The head of a run: calls nodes, gives orders, hears events.  Everything but waiting.

`Engine` owns the loop's descriptors and children; karun/api.py lets trio wait for it, and calls
`step`.  Decisions about sessions are in karun/roster.py, about who calls whom in
karun/launch_plan.py, about connections in karun/agent/hub.py.

Invariants
  * for every node of a command exactly one of `exited` and `failed` is told, after its output;
  * a node is given up once: launched in vain, or lost and not back within `reattach_s`;
  * standard input is taken only as fast as the slowest living node takes it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from time import monotonic

from karun import reasons
from karun.agent import frames
from karun.agent.barrier import Gathering, world_of
from karun.agent.hub import Hub
from karun.agent.loop import Loop
from karun.agent.process import OUT_OF_TIME, SIGKILL
from karun.agent.setup import AUTO, QUEUED_S, Dialling, Setup
from karun.archive import Archive
from karun.connectors import Connector
from karun.feed import Feed
from karun.latecomers import AGAIN_S, Latecomers
from karun.orders import TIMEOUT, Command, Commands, Invocation, Sink
from karun.pmi import MISSED
from karun.roster import Roster, State

__all__ = ["Engine", "Limits"]

CONNECT_S = 15.0
RESYNC_S = 0.5
PUTS_SIZE_MAX = 3 << 20
"""Of one barrier, from all ranks: it must fit into a frame."""
BACK_MARGIN_S = 2.0
"""A lost node gives up by itself after `reattach_s`; the head waits a little longer."""
SOUGHT_S = 1.0
"""And so long again while some are coming back; QUEUED_S at most, with the time that it slept."""
FEW_PART = 4
"""An order to some nodes goes to these alone if they are one, or at most a part of the head's own
children, to which an order to all goes: else the tree carries it with less from here."""
UNHEARD_COUNT_MAX = 1000
"""And if no more nodes have one of their own to obey, since each order names these."""
CODE_MAX, SIGNAL_MAX, STATUS_MAX = 0xFF, 0x7F, 0xFFFF
"""Of processes: waitpid(2)."""
SLEPT_S = 0.1
"""So much of sleep does not count."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Times and numbers of a run."""

    window: int = 64
    """Calls at a time, of one caller."""
    connect_s: float = CONNECT_S
    """For TCP and the banner, as ssh counts it."""
    login_s: float = 20.0
    """More, for key exchange and login: a head that calls many is short of processor itself."""
    ping_s: float = 2.0
    """A neighbour that says nothing for four of these is lost."""
    tree: str = AUTO
    """Whether nodes call nodes: AUTO, ALWAYS, NEVER."""
    reattach_s: float = 10.0
    """How long a node that lost its parent looks for another way to the head."""
    late_s: float = 0.0
    """From the launch: how long a node that cannot be reached is called again."""


class _World:
    """An MPI program: whom its barrier has, and who is told of its abort."""

    def __init__(self, aborted: Callable[[int, int, str], None]) -> None:
        self.aborted = aborted
        self.gathering = Gathering()


class Engine:
    """One run over *nodes*."""

    def __init__(
        self, nodes: Sequence[str], connector: Connector, archive: Archive, limits: Limits
    ) -> None:
        self.nodes = list(nodes)
        self.loop = Loop()
        self.roster = Roster(len(nodes))
        self._limits = limits
        self.digest = archive.digest
        """Of what the agents are made of."""
        self._commands = Commands()
        self._worlds: dict[int, _World] = {}
        self._failures: dict[int, tuple[str, str]] = {}
        self.latecomers = Latecomers(limits.late_s)
        self._launched_s = monotonic()
        self._resync_due = False
        self.launched: Callable[[], None] = _nothing
        self.closed = False
        setup = Setup(
            secrets.token_hex(8), secrets.token_bytes(32), frames.HEAD, "", len(nodes),
            frames.HEAD, [], limits.ping_s, limits.reattach_s,
        )  # fmt: skip
        dialling = Dialling(
            list(connector.argv),
            lined=connector.lined,
            python=connector.python,
            loader=archive.loader,
            digest=archive.digest,
            connect_s=limits.connect_s + limits.login_s,
            window=limits.window,
            tree=limits.tree,
        )
        self._hub = Hub(
            self.loop, setup, dialling, archive.data,
            up=self._from_below, tell_parent=_no_parent, lost=self._child_lost,
            failed=self._call_failed, local=connector.onehost,
        )  # fmt: skip

    # What the user of a run asks.

    def launch(self) -> None:
        """Begin to call every node."""
        self._hub.dialer.take(list(enumerate(self.nodes)))
        if self._limits.late_s:
            self.loop.at(self._limits.late_s, self._end_patience)

    @property
    def quiet(self) -> bool:
        """Whether no node is connected any more."""
        return not self._hub.children

    def step(self) -> None:
        """Handle what is ready; never waits."""
        self.loop.step(0)

    @property
    def launching_count(self) -> int:
        """How many nodes are neither there nor given up."""
        return sum(1 for _ in self.roster.in_state(State.ABSENT))

    def command(
        self, invocation: Invocation, sink: Sink, *, ranks: Sequence[int] | None = None
    ) -> Command:
        """Order a command on all nodes, or on these; nodes that are out are told to the sink."""
        place = invocation.place
        chosen = list(range(self.roster.size) if ranks is None else ranks)
        kind = frames.COMMAND if place is None else frames.RANK
        members = frozenset(chosen)
        audience = members if self._are_few(members) else None
        whoever_hears = audience is not None or len(members) == self.roster.size
        fields = (*(place or ()), *invocation.fields(), b"" if whoever_hears else _bits(chosen))
        number = self._order(kind, *fields, audience=audience)
        feed = Feed(chosen) if invocation.fed else None
        command = Command(number, chosen, sink, feed, invocation.limit_s, audience)
        self._commands.add(command)
        for rank in chosen:
            if rank in self._failures:
                self._commands.failed(command, rank, *self._failures[rank])
        return command

    def world(self, count: int, aborted: Callable[[int, int, str], None]) -> int:
        """Announce an MPI program with *count* ranks on each node of the run; return its number.

        *aborted(rank, code, reason)*: a rank ends them all; the caller sees to it.
        """
        number = self._order(frames.WORLD, count)
        self._worlds[number] = _World(aborted)
        return number

    def move(self) -> None:
        """Have every node go over to a TCP connection of its own with its parent, if it can.

        To be called when all are launched: what neighbours say to each other about calls could be
        lost on the way that a node leaves.
        """
        self._hub.broadcast(frames.MOVE, b"")

    def indirect(self) -> list[int]:
        """Return the nodes that are there by way of a connector."""
        there = self.roster.in_state(State.JOINED)
        return [rank for rank in there if not self.roster.direct[rank]]

    def failure(self, rank: int) -> tuple[str, str] | None:
        """Return stage and reason of a node that is out."""
        return self._failures.get(rank)

    def feed(self, command: Command, data: bytes) -> None:
        """Send standard input to all; see `Feed.room` for when."""
        assert command.feed is not None
        command.feed.sent(len(data))
        self._order(frames.INPUT, command.number, data, audience=command.audience)

    def end_input(self, command: Command) -> None:
        self._order(frames.INPUT_END, command.number, audience=command.audience)

    def signal(self, command: Command, number: int) -> None:
        """Send a signal to the command's processes on all nodes."""
        self._order(frames.SIGNAL, command.number, number, audience=command.audience)

    def abandon(self, command: Command) -> None:
        """Kill a command everywhere, and hear no more of it."""
        self.signal(command, SIGKILL)
        self._commands.drop(command)

    def pause(self, paused: bool) -> None:
        """Take nothing more from the nodes, or go on."""
        self._hub.pause(paused)

    def quit(self) -> None:
        """End every process and agent of the run; `close` must follow."""
        self._hub.broadcast(frames.QUIT, b"")

    def close(self) -> None:
        """Drop all connections and calls, and end what connectors are left."""
        self.closed = True
        self._hub.close()
        self.loop.end_children()
        self.loop.close()

    # What comes up.

    def _order(
        self, kind: int, *fields: bytes | str | int, audience: Collection[int] | None = None
    ) -> int:
        number, payload = self.roster.order(kind, *fields, ranks=audience)
        if audience is None:
            self._hub.broadcast(frames.ORDER, payload)
        else:
            for rank in audience:  # to whom there is no way it goes when they attach
                self._hub.send(rank, frames.ORDER, payload)
        return number

    def _are_few(self, ranks: Collection[int]) -> bool:
        few_count = max(1, len(self._hub.children) // FEW_PART)
        return len(ranks) <= few_count and self.roster.unheard_count <= UNHEARD_COUNT_MAX

    def _known(self, field: bytes) -> int:
        return frames.number_in(field, 0, self.roster.size - 1)

    def _from_below(self, kind: int, rank: int, payload: bytes) -> None:
        if not 0 <= rank < self.roster.size:
            raise frames.FrameError(f"no node has rank {rank}")
        if kind == frames.ATTACH:
            self._attached(rank, payload)
            return
        if kind == frames.BARRIER:
            self._gathered(payload)
            return
        try:
            event = self.roster.event(rank, payload)
            if event is None:
                return
            self._event(rank, *event)
        except frames.FrameError as error:
            # Those who passed it on have not read it: they are none the worse for it.
            self._fail(rank, "lost", f"said what no agent says: {error}")
            return
        ack = self.roster.ack_due(rank)
        if ack is not None:
            self._hub.send(rank, frames.ACK, ack)

    def _attached(self, rank: int, payload: bytes) -> None:
        first = self.roster.states[rank] is State.ABSENT
        welcome, answer, orders = self.roster.attach(rank, payload)
        if not welcome:
            self._hub.send(rank, frames.REFUSE, answer)
            # The way to the node that was welcome now leads to the one that is not.
            if not self._resync_due:
                self._resync_due = True
                self.loop.at(RESYNC_S, self._resync)
            return
        self._hub.send(rank, frames.WELCOME, answer)
        for order in orders:
            self._hub.send(rank, frames.ORDER, order)
        if first:
            self.latecomers.attached(rank, monotonic() - self._launched_s)
            self._check_launched()

    def _resync(self) -> None:
        self._resync_due = False
        self._hub.broadcast(frames.RESYNC, b"")

    def _event(self, rank: int, kind: int, fields: list[bytes]) -> None:
        if kind == frames.LOST:
            child = self._known(fields[0])
            self._lost(child, rank, frames.number(fields[1]), frames.text(fields[2]))
        elif kind == frames.FAILED:
            child = self._known(fields[0])
            reason, words = frames.text(fields[1]), fields[2]
            status = frames.number_in(fields[3], -1, STATUS_MAX)
            if status >= 0 and status & SIGNAL_MAX == SIGNAL_MAX:
                raise frames.FrameError(f"{status} is no end of a process")
            self._call_failed(child, reason, words, status)
        elif kind == frames.ABORTED:
            world = self._worlds.get(frames.number(fields[0]))
            if world is not None:
                culprit, code = frames.number(fields[1]), frames.number(fields[2])
                world.aborted(culprit, code, frames.text(fields[3]))
        else:
            command = self._commands.find(frames.number(fields[0]), rank)
            if command is not None:
                self._command_event(command, rank, kind, fields)

    def _gathered(self, payload: bytes) -> None:
        """Part of a barrier has come up; let all go on when the last has."""
        number = world_of(payload)
        world = self._worlds.get(number)
        if world is None:
            raise frames.FrameError(f"no world {number}")
        gathering = world.gathering
        gathering.take(payload, self.roster.size)
        if not gathering.waits or not gathering.has((1 << self.roster.size) - 1):
            return
        if gathering.left >= 0:
            world.aborted(gathering.left, 1, MISSED)
        elif len(gathering.puts) > PUTS_SIZE_MAX:
            world.aborted(0, 1, f"and the others put more than {PUTS_SIZE_MAX >> 20} MiB")
        else:
            self._order(frames.PASSED, number, gathering.number, gathering.puts)
            gathering.passed(gathering.number)

    def _command_event(self, command: Command, rank: int, kind: int, fields: list[bytes]) -> None:
        if kind == frames.OUTPUT:
            command.sink.output(rank, frames.number_in(fields[1], 1, 2), fields[2])
        elif kind == frames.CONSUMED and command.feed is not None:
            command.feed.consumed(rank, frames.number(fields[1]))
        elif kind == frames.EXITED:
            code = frames.number_in(fields[1], OUT_OF_TIME, CODE_MAX)
            signal = frames.number_in(fields[2], 0, SIGNAL_MAX)
            if code == OUT_OF_TIME:
                self._commands.failed(command, rank, TIMEOUT, f"after {command.limit_s:g} s")
            else:
                self._commands.exited(command, rank, code, signal)

    # What goes wrong.

    def _child_lost(self, rank: int, introduction: int, reason: str) -> None:
        self._lost(rank, frames.HEAD, introduction, reason)

    def _lost(self, rank: int, parent: int, introduction: int, reason: str) -> None:
        ranks = self.roster.lost(rank, parent, introduction)
        if ranks:
            wait_s = self._limits.reattach_s + BACK_MARGIN_S
            losses = {one: self.roster.loss_counts[one] for one in ranks}
            self._give_up_in(wait_s, QUEUED_S, losses, rank, reason)

    def _give_up_in(
        self, wait_s: float, more_s: float, losses: dict[int, int], through: int, reason: str
    ) -> None:
        """Give up, after a while, those that are not back by then; *more_s*: later if need be."""
        slept_before_s = self._hub.slept_s

        def check() -> None:
            again_s = self._hub.slept_s - slept_before_s
            if again_s < SLEPT_S:
                again_s = SOUGHT_S if self._hub.is_sought else 0.0
            if again_s > 0 and more_s > 0:
                self._give_up_in(again_s, more_s - again_s, losses, through, reason)
            else:
                self._give_up(losses, through, reason)

        self.loop.at(wait_s, check)

    def _give_up(self, losses: dict[int, int], through: int, reason: str) -> None:
        for rank, loss in losses.items():
            is_same = self.roster.loss_counts[rank] == loss
            if is_same and self.roster.states[rank] is State.DETACHED:
                below = "" if rank == through else f", with {self.nodes[through]}"
                self._fail(rank, "lost", f"lost{below}: {reason}")

    def _call_failed(self, rank: int, reason: str, words: bytes, status: int) -> None:
        if self.roster.states[rank] is not State.ABSENT:
            return
        code = os.waitstatus_to_exitcode(status) if status >= 0 else None
        stage, text = reason.partition(":")[0], reasons.explain(reason, words, code)
        if reasons.may_pass(reason, words) and self.latecomers.missed(rank, stage, text):
            self.loop.at(AGAIN_S, lambda: self._call_again(rank))
        else:
            self._fail(rank, stage, text)

    def _call_again(self, rank: int) -> None:
        if self.roster.states[rank] is State.ABSENT:
            self._hub.dialer.take([(rank, self.nodes[rank])])

    def _end_patience(self) -> None:
        for rank, stage, reason in self.latecomers.end():
            self._fail(rank, stage, reason)

    def _fail(self, rank: int, stage: str, reason: str) -> None:
        self.roster.fail(rank)
        self._hub.drop(rank)
        self._failures[rank] = (stage, reason)
        for command in self._commands.on(rank):
            self._commands.failed(command, rank, stage, reason)
        self._check_launched()

    def _check_launched(self) -> None:
        if State.ABSENT not in self.roster.states:
            self.launched()


def _bits(ranks: Sequence[int]) -> bytes:
    bits = bytearray(max(ranks, default=0) // 8 + 1)
    for rank in ranks:
        bits[rank >> 3] |= 1 << (rank & 7)
    return bytes(bits)


def _nothing() -> None:
    pass


def _no_parent(_kind: int, _payload: bytes) -> None:
    raise AssertionError("the head has no parent")
