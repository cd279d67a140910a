"""A program that has joined a session, seen from there: its commands are commands of the run.

No I/O of its own: karun/session_server.py brings frames, and takes what is to be said.  The other
side: karun/joined.py.

Invariants
  * when the client goes, so do its commands, on every node, and nobody else's;
  * of standard input that is on its way at most OWED_SIZE_MAX is held for a command.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from karun import session_wire as wire
from karun.agent import frames
from karun.orders import Command, Invocation, Orders

__all__ = ["Member"]

OWED_SIZE_MAX = 64 << 20
"""A client that knows its manners stays far below: 1 MiB, what nodes lack of the copy engine, and
who takes part."""
SIGNAL_MAX = 64

Say = Callable[[int, int, bytes], None]


class Member:
    """One client, and the nodes that it has joined."""

    def __init__(self, orders: Orders, ranks: Sequence[int], say: Say) -> None:
        """*ranks*: of the session, in the client's order; *say(kind, rank, payload)*."""
        self._orders = orders
        self._ranks = ranks
        self._say = say
        self._commands: dict[int, _Ordered] = {}

    def take(self, kind: int, payload: bytes) -> None:
        """Do what a frame says; raises FrameError."""
        fields = wire.fields_of(kind, payload)
        number = frames.number(fields[0])
        if kind == wire.COMMAND:
            self._command(number, fields)
        elif kind == wire.FEED:
            self._feed(number, fields[1])
        elif number in self._commands:  # else it has ended, and the client does not know it yet
            command = self._commands[number].command
            if kind == wire.FEED_END:
                self._orders.end_input(command)
            elif kind == wire.SIGNAL:
                self._signal(command, frames.number(fields[1]))
            elif kind == wire.ABANDON:
                del self._commands[number]
                self._orders.abandon(command)

    def close(self) -> None:
        """The client has gone: end its commands."""
        for ordered in self._commands.values():
            if not self._orders.closed:
                self._orders.abandon(ordered.command)
        self._commands.clear()

    def _command(self, number: int, fields: Sequence[bytes]) -> None:
        if number in self._commands:
            raise frames.FrameError(f"two commands with number {number}")
        places = wire.ranks_in(fields[1], len(self._ranks))
        ordered = _Ordered(number, {self._ranks[place]: place for place in places}, self._say)
        invocation = Invocation.of(fields[2:])
        ranks = [self._ranks[place] for place in places]
        ordered.command = command = self._orders.command(invocation, ordered, ranks=ranks)
        if command.pending:
            self._commands[number] = ordered
            command.done = functools.partial(self._ended, number)

    def _ended(self, number: int) -> None:
        del self._commands[number]

    def _signal(self, command: Command, number: int) -> None:
        if not 0 < number <= SIGNAL_MAX:
            raise frames.FrameError(f"no signal {number}")
        self._orders.signal(command, number)

    def _feed(self, number: int, data: bytes) -> None:
        ordered = self._commands.get(number)
        if ordered is None or ordered.command.feed is None:
            self._say(wire.TAKEN, 0, frames.pack(number, len(data)))
            return
        ordered.owed_size += len(data)
        if ordered.owed_size > OWED_SIZE_MAX:
            raise frames.FrameError("more input than was asked for")
        self._orders.feed(ordered.command, data)
        ordered.command.feed.changed = ordered.grant
        if ordered.command.feed.room:
            ordered.grant()


class _Ordered:
    """One command of the client, and its sink."""

    command: Command

    def __init__(self, number: int, places: dict[int, int], say: Say) -> None:
        self._number = number
        self._places = places
        self._say = say
        self.owed_size = 0
        """Of what the client has fed, and was not told to be taken."""

    def grant(self) -> None:
        """Let the client feed more."""
        size, self.owed_size = self.owed_size, 0
        if size:
            self._tell(wire.TAKEN, 0, size)

    def output(self, rank: int, stream: int, data: bytes) -> None:
        self._tell(wire.OUTPUT, self._places[rank], stream, data)

    def exited(self, rank: int, code: int, signal: int) -> None:
        self._tell(wire.EXITED, self._places[rank], code, signal)

    def failed(self, rank: int, stage: str, reason: str) -> None:
        self._tell(wire.FAILED, self._places[rank], stage, reason)

    def _tell(self, kind: int, place: int, *fields: bytes | str | int) -> None:
        self._say(kind, place, frames.pack(self._number, *fields))
