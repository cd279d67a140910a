"""The nodes of a session, from Python: commands, copies and gathers without a launch.

    async with karun.Joined("racks") as nodes:
        results = await nodes.copy(["image.tar"], "/var/tmp/")

Files are read and written here, by the program that has joined, so with its rights and from its
directory; the session passes orders on to its nodes, and what they tell.  What is said:
karun/session_wire.py.

Invariants
  * leaving, or dying, ends the commands of this program, on every node; the session stays;
  * input is sent no faster than the session has it taken; output is read no faster than sinks take
    it, and then the session waits.
"""

from __future__ import annotations

import itertools
import socket
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from common.errors import Code, KaError, first_error
from karun import archive, client
from karun import session_wire as wire
from karun.agent import frames
from karun.crew import Crew, require_distinct
from karun.feed import Feed
from karun.orders import Command, Commands, Invocation, Sink

__all__ = ["Joined"]

ANSWER_S = 30.0
"""A session that serves hundreds of nodes may be busy, not for so long."""
SESSION = -1
"""Who takes standard input, as a rank: the session, for all nodes."""


class Joined(Crew):
    """Nodes of a session; an async context manager.  They are known when it is entered."""

    def __init__(self, session: str, nodes: Sequence[str] | None = None) -> None:
        """*nodes*: some of its nodes; None: all.  Raises KaError USAGE."""
        if nodes is not None:
            require_distinct(nodes)
        self.session = session
        self.nodes = list(nodes or ())
        self._orders: _Orders | None = None

    async def __aenter__(self) -> Joined:
        self._manager = _joined(self.session, self.nodes)
        self._orders = await self._manager.__aenter__()
        self.nodes = self._orders.nodes
        return self

    async def __aexit__(self, *error: Any) -> bool | None:
        self._orders = None
        return await self._manager.__aexit__(*error)

    @property
    def orders(self) -> _Orders:
        if self._orders is None:
            raise KaError(Code.USAGE, "the session is not joined, or left")
        return self._orders

    @property
    def via(self) -> str:
        return self.orders.via

    @property
    def onehost(self) -> bool:
        return self.orders.onehost

    def is_out(self, rank: int) -> bool:
        """The session calls no node again, so they are all out when it has ended, and else none."""
        return self._orders is None or self._orders.closed


class _Orders:
    """`karun.orders.Orders`, over the connection to a session."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.via = ""
        self.onehost = False
        self.nodes: list[str] = []
        self.closed = False
        self._stream = stream
        self._decoder = frames.Decoder()
        self._incoming: deque[tuple[int, int, bytes]] = deque()
        self._commands = Commands()
        self._numbers = itertools.count(1)
        self._held: list[bytes] = []
        self._more = trio.Event()

    async def join(self, session: str, nodes: Sequence[str], digest: str) -> None:
        """Introduce this program; raises KaError when it is not welcome."""
        asked = frames.pack(wire.version(digest), *nodes)
        kind, payload = 0, b""
        try:
            with trio.fail_after(ANSWER_S):
                await self._stream.send_all(frames.encode(wire.JOIN, 0, asked))
                kind, _rank, payload = await self._next()
        except (trio.BrokenResourceError, trio.EndOfChannel):
            pass
        except trio.TooSlowError:
            line = f"session {session!r} did not answer within {ANSWER_S:.0f} s"
            raise KaError(Code.TIMEOUT, line) from None
        if kind not in (wire.JOINED, wire.REFUSED):
            raise KaError(Code.WRONG_VERSION, wire.OTHER_VERSION)
        fields = wire.fields_of(kind, payload)
        if kind == wire.REFUSED:
            name, line = map(frames.text, fields)
            raise KaError(Code[name], line)
        self.via, self.onehost = frames.text(fields[0]), fields[1] == b"1"
        self.nodes = [frames.text(name) for name in frames.unpack(fields[2])]

    def command(
        self, invocation: Invocation, sink: Sink, *, ranks: Sequence[int] | None = None
    ) -> Command:
        if invocation.place is not None:
            raise KaError(Code.USAGE, "a session starts no MPI programs: launch them with a run")
        chosen = range(len(self.nodes)) if ranks is None else ranks
        feed = Feed([SESSION]) if invocation.fed else None
        number = next(self._numbers)
        command = Command(number, chosen, sink, feed, invocation.limit_s)
        self._commands.add(command)
        self._say(wire.COMMAND, number, " ".join(map(str, chosen)), *invocation.fields())
        return command

    def feed(self, command: Command, data: bytes) -> None:
        assert command.feed is not None
        command.feed.sent(len(data))
        self._say(wire.FEED, command.number, data)

    def end_input(self, command: Command) -> None:
        self._say(wire.FEED_END, command.number)

    def signal(self, command: Command, number: int) -> None:
        self._say(wire.SIGNAL, command.number, number)

    def abandon(self, command: Command) -> None:
        self._say(wire.ABANDON, command.number)
        self._commands.drop(command)

    def _say(self, kind: int, *fields: bytes | str | int) -> None:
        self._held.append(frames.encode(kind, 0, frames.pack(*fields)))
        self._more.set()

    async def sending(self) -> None:
        """Send what is said; that the session has ended is heard when listening."""
        while True:
            await self._more.wait()
            data, self._held = b"".join(self._held), []
            self._more = trio.Event()
            try:
                await self._stream.send_all(data)
            except trio.BrokenResourceError:
                return

    async def receiving(self) -> None:
        """Hear what the nodes tell; raises KaError when the session ends."""
        try:
            while True:
                kind, rank, payload = await self._next()
                self._heard(kind, rank, wire.fields_of(kind, payload))
        except (trio.BrokenResourceError, trio.EndOfChannel):
            raise KaError(Code.UNREACHABLE, "the session has ended") from None
        except frames.FrameError as error:
            raise KaError(Code.PROTOCOL, f"the session said what it should not: {error}") from None

    async def _next(self) -> tuple[int, int, bytes]:
        """Return a frame; raises EndOfChannel after the last."""
        while not self._incoming:
            data = await self._stream.receive_some(client.READ_SIZE)
            if not data:
                raise trio.EndOfChannel
            self._incoming.extend(self._decoder.feed(bytes(data)))
        return self._incoming.popleft()

    def _heard(self, kind: int, rank: int, fields: Sequence[bytes]) -> None:
        number = frames.number(fields[0])
        if kind == wire.TAKEN:
            command = self._commands.find(number)
            if command is not None and command.feed is not None:
                command.feed.consumed(SESSION, frames.number(fields[1]))
            return
        command = self._commands.find(number, rank)
        if command is None:
            return
        if kind == wire.OUTPUT:
            command.sink.output(rank, frames.number(fields[1]), fields[2])
        elif kind == wire.EXITED:
            code, signal = map(frames.number, fields[1:])
            self._commands.exited(command, rank, code, signal)
        elif kind == wire.FAILED:
            stage, reason = map(frames.text, fields[1:])
            self._commands.failed(command, rank, stage, reason)


@asynccontextmanager
async def _joined(session: str, nodes: Sequence[str]) -> AsyncIterator[_Orders]:
    """Join a session until left; what is under way then ends with the connection."""
    digest = (await trio.to_thread.run_sync(archive.build)).digest
    with client.connected(session) as plain:
        connection = trio.socket.from_stdlib_socket(socket.socket(fileno=plain.detach()))
    async with trio.SocketStream(connection) as stream:
        orders = _Orders(stream)
        try:
            await orders.join(session, nodes, digest)
        except frames.FrameError:
            raise KaError(Code.WRONG_VERSION, wire.OTHER_VERSION) from None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(orders.sending)
                nursery.start_soon(orders.receiving)
                yield orders
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise first_error(group) from None
        finally:
            orders.closed = True
