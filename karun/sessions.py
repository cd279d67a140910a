"""Sessions: nodes that stay connected, and a Unix socket through which commands reach them.

The session is a process of its own, started by `karun session start`; it holds a `Run` and serves
clients (karun/client.py) until it is stopped.  Its socket is in a directory that is this user's
alone, and a peer of another user is refused.

Invariants
  * a client that goes away takes its command with it, on every node;
  * what a client does not read is not held beyond HELD_SIZE_MAX: the nodes wait instead.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import trio

from common import nodeset
from common.errors import Code, KaError
from karun import client
from karun.agent import frames
from karun.api import Run
from karun.roster import State
from karun.running import Where

__all__ = ["describe", "main", "start"]

HELD_SIZE_MAX = 1 << 20


def start(name: str, where: Where) -> str:
    """Start a session and wait for its nodes; return a line that says what it is."""
    path = client.socket_path(name)
    if _answers(path):
        raise KaError(Code.EEXIST, f"session {name!r} is there already (karun session stop {name})")
    process = subprocess.Popen(
        [sys.executable, "-m", "karun.sessions", name],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, cwd="/",
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin as settings:
        settings.write(json.dumps(asdict(where)).encode())
    with process.stdout as out:
        line = out.readline().decode("utf-8", "replace").strip()
    process.returncode = 0  # it stays: nobody waits for it
    verdict, _, text = line.partition(" ")
    if verdict != "ready":
        raise KaError(Code.UNREACHABLE, text or "the session did not start")
    return f"session {name}: {text}"


def describe() -> Iterator[str]:
    """Yield a line for each session of this user."""
    for path in sorted(Path(client.directory()).glob("*.sock")):
        name = path.name.removesuffix(".sock")
        try:
            with client.connected(name) as sock:
                sock.sendall(frames.encode(client.INFO, 0))
                decoder = frames.Decoder()
                while data := sock.recv(client.READ_SIZE):
                    for _kind, _rank, payload in decoder.feed(data):
                        yield f"{name}: {frames.text(frames.unpack(payload)[0])}"
        except KaError:
            path.unlink(missing_ok=True)


def main() -> None:
    """Be a session: options on standard input, one line on standard output when it is there."""
    name = sys.argv[1]
    try:
        settings = json.load(sys.stdin)
        where = Where(**{key: _tupled(value) for key, value in settings.items()})
        trio.run(_session, name, where)
    except KaError as error:
        print(f"failed {error}", flush=True)
        sys.exit(error.code.exit_code)


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


async def _session(name: str, where: Where) -> None:
    names = where.names()
    path = client.socket_path(name)
    listener = socket.socket(socket.AF_UNIX)
    async with where.run(names) as run:
        await run.launched()
        _remove(path)
        mask = os.umask(0o177)
        listener.bind(path)
        os.umask(mask)
        listener.listen(64)
        try:
            print(f"ready {_summary(run)}", flush=True)
            null = os.open("/dev/null", os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            async with trio.open_nursery() as nursery:
                server = _Server(run, nursery.cancel_scope)
                sockets = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
                await trio.serve_listeners(server.serve, [sockets], handler_nursery=nursery)
        finally:
            _remove(path)


def _summary(run: Run) -> str:
    states = run.engine.roster.states
    out = [run.nodes[rank] for rank, state in enumerate(states) if state is State.FAILED]
    lost = f"; out: {nodeset.fold(out)}" if out else ""
    return f"{len(states) - len(out)} nodes, pid {os.getpid()}{lost}"


class _Server:
    """Serves clients."""

    def __init__(self, run: Run, scope: trio.CancelScope) -> None:
        self._run = run
        self._scope = scope
        self._full: set[_Wire] = set()

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one client, until it goes or its command is done."""
        async with stream:
            if not _is_own(stream):
                return
            wire = _Wire(stream, self._pace)
            try:
                async for kind, _rank, payload in wire.incoming:
                    if await self._first(wire, kind, frames.unpack(payload)):
                        break
            except (trio.BrokenResourceError, frames.FrameError):
                pass
            finally:
                self._full.discard(wire)
                self._pace(wire)

    async def _first(self, wire: _Wire, kind: int, fields: list[bytes]) -> bool:
        if kind == client.STOP:
            self._scope.cancel()
        elif kind == client.INFO:
            await wire.stream.send_all(
                frames.encode(client.INFO, 0, frames.pack(_summary(self._run)))
            )
        elif kind == client.RUN:
            try:
                ranks = self._ranks(frames.text(fields[5]))
            except KaError as error:
                refusal = frames.encode(client.REFUSED, 0, frames.pack(str(error)))
                await wire.stream.send_all(refusal)
                return True
            await self._command(wire, ranks, fields)
        return True

    async def _command(self, wire: _Wire, ranks: list[int], fields: list[bytes]) -> None:
        flags, limit_ms, cwd, argv, env, _nodes = fields
        wire.say(client.NAMES, 0, *(self._run.nodes[rank] for rank in ranks))
        wire.places = {rank: place for place, rank in enumerate(ranks)}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.sending, nursery.cancel_scope)
            nursery.start_soon(wire.receiving, nursery.cancel_scope)
            await self._run.command(
                [frames.text(word) for word in frames.unpack(argv)],
                sink=wire,
                ranks=ranks,
                stdin=wire.input() if b"i" in flags else None,
                line=b"s" in flags,
                pty=b"p" in flags,
                cwd=frames.text(cwd),
                env=dict(frames.text(one).partition("=")[::2] for one in frames.unpack(env)),
                limit_s=frames.number(limit_ms) / 1000,
            )
            wire.say(client.DONE, 0)
            await wire.drained()
            nursery.cancel_scope.cancel()

    def _ranks(self, text: str) -> list[int]:
        if not text:
            return list(range(len(self._run.nodes)))
        known = {name: rank for rank, name in enumerate(self._run.nodes)}
        names = nodeset.expand(text)
        strangers = [name for name in names if name not in known]
        if strangers:
            raise KaError(Code.USAGE, f"not in this session: {nodeset.fold(strangers)}")
        return [known[name] for name in names]

    def _pace(self, wire: _Wire) -> None:
        """Let the nodes wait while a client does not read."""
        if wire.held_size > HELD_SIZE_MAX and not wire.gone:
            self._full.add(wire)
        else:
            self._full.discard(wire)
        if not self._run.engine.closed:
            self._run.engine.pause(bool(self._full))


class _Wire:
    """A client's connection; the sink of its command."""

    def __init__(self, stream: trio.SocketStream, pace: Callable[[_Wire], None]) -> None:
        self.stream = stream
        self.places: dict[int, int] = {}
        self.held_size = 0
        self.gone = False
        self._pace = pace
        self._held: list[bytes] = []
        self._more = trio.Event()
        self._empty = trio.Event()
        self._feed, self._input = trio.open_memory_channel[bytes](1)
        self.incoming = self._frames()
        """What the client says: one iterator, whoever listens."""

    def output(self, rank: int, stream: int, data: bytes) -> None:
        self.say(client.OUTPUT, self.places[rank], stream, data)

    def exited(self, rank: int, code: int, signal: int) -> None:
        self.say(client.EXITED, self.places[rank], code, signal)

    def failed(self, rank: int, stage: str, reason: str) -> None:
        self.say(client.FAILED, self.places[rank], stage, reason)

    def say(self, kind: int, rank: int, *fields: bytes | str | int) -> None:
        data = frames.encode(kind, rank, frames.pack(*fields))
        self._held.append(data)
        self.held_size += len(data)
        self._more.set()
        if self.held_size > HELD_SIZE_MAX:
            self._pace(self)

    async def sending(self, scope: trio.CancelScope) -> None:
        """Send what is said; a client that does not take it has gone."""
        while True:
            await self._more.wait()
            data, self._held = b"".join(self._held), []
            self._more = trio.Event()
            try:
                await self.stream.send_all(data)
            except trio.BrokenResourceError:
                self.gone = True
                scope.cancel()
                return
            self.held_size -= len(data)
            if self.held_size <= HELD_SIZE_MAX:
                self._pace(self)
            if not self._held:
                self._empty.set()
                self._empty = trio.Event()

    async def drained(self) -> None:
        while self.held_size:
            await self._empty.wait()

    async def receiving(self, scope: trio.CancelScope) -> None:
        """Take input; the end of the connection is the end of the command."""
        try:
            async for kind, _rank, payload in self.incoming:
                if kind == client.INPUT:
                    await self._feed.send(frames.unpack(payload)[0])
                elif kind == client.INPUT_END:
                    await self._feed.aclose()
        except (trio.BrokenResourceError, frames.FrameError):
            pass
        self.gone = True
        scope.cancel()

    async def input(self) -> AsyncIterator[bytes]:
        async for data in self._input:
            yield data
            self.say(client.ROOM, 0)

    async def _frames(self) -> AsyncIterator[tuple[int, int, bytes]]:
        decoder = frames.Decoder()
        while data := bytes(await self.stream.receive_some(client.READ_SIZE)):
            for frame in decoder.feed(data):
                yield frame


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _is_own(stream: trio.SocketStream) -> bool:
    credentials = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _pid, uid, _gid = struct.unpack("3i", credentials)
    return uid in (os.geteuid(), 0)


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


if __name__ == "__main__":
    main()
