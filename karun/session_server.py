"""A session: nodes that stay connected, and a Unix socket through which commands reach them.

It is a process of its own, started by `karun session start`; it holds a `Run` and serves clients
(karun/client.py) until it is stopped.  A client sends the words that its user has typed, and gets
what is to be written and an exit code: what they mean is understood here, where everything that
this takes is loaded already.

Invariants
  * a client that goes away takes its command with it, on every node;
  * what a client does not read is not held beyond HELD_SIZE_MAX: the nodes wait instead;
  * a command that goes wrong (a full disk under --outdir) ends alone;
  * the socket is in a directory that is this user's alone, and peers of other users are refused.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from common import nodeset
from common.errors import Code, KaError
from karun import cli_run, client
from karun import session_wire as joint
from karun.agent import frames
from karun.api import Run
from karun.crew import require_distinct
from karun.joining import Member
from karun.lines import STDERR
from karun.nodes import Names
from karun.options import Options, printing
from karun.output import Printer
from karun.progress import Progress
from karun.roster import State
from karun.running import Where

__all__ = ["main"]

HELD_SIZE_MAX = 1 << 20


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
        if where.direct:
            await run.move()
        gc.collect()
        gc.freeze()  # what is here stays: no collection need look at it again
        _remove(path)
        mask = os.umask(0o177)
        listener.bind(path)
        os.umask(mask)
        listener.listen(64)
        try:
            try:
                print(f"ready {_summary(run, direct=where.direct)}", flush=True)
            except BrokenPipeError:  # who started it was interrupted meanwhile
                os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
                return
            null = os.open("/dev/null", os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            async with trio.open_nursery() as nursery:
                server = _Server(run, nursery.cancel_scope, is_direct=where.direct)
                sockets = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
                await trio.serve_listeners(server.serve, [sockets], handler_nursery=nursery)
        finally:
            _remove(path)


def _summary(run: Run, *, direct: bool) -> str:
    states = run.engine.roster.states
    out = [run.nodes[rank] for rank, state in enumerate(states) if state is State.FAILED]
    indirect = [run.nodes[rank] for rank in run.engine.indirect()] if direct else []
    more = f"; out: {nodeset.fold(out)}" if out else ""
    if indirect:
        more += f"; no TCP way here, still by {run.via}: {nodeset.fold(indirect)}"
    count = len(states) - len(out)
    nodes = f"{count} node{'s' * (count != 1)}{', direct' * direct}"
    return f"{nodes}, pid {os.getpid()}{more}"


class _Server:
    """Serves clients."""

    def __init__(self, run: Run, scope: trio.CancelScope, *, is_direct: bool) -> None:
        self._run = run
        self._is_direct = is_direct
        self._scope = scope
        self._full: set[_Wire] = set()

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one client, until it goes or its command is done."""
        async with stream:
            if not _is_own(stream):
                return
            wire = _Wire(stream, self._pace)
            try:
                # No default for anext: with one, Python 3.11 raises SystemError at the end.
                kind, payload = await anext(wire.incoming)
                await self._first(wire, kind, payload)
            except StopAsyncIteration:
                pass
            except (trio.BrokenResourceError, frames.FrameError):
                pass
            finally:
                self._full.discard(wire)
                self._pace(wire)

    async def _first(self, wire: _Wire, kind: int, payload: bytes) -> None:
        if kind == client.STOP:
            self._scope.cancel()
        elif kind == client.INFO:
            summary = _summary(self._run, direct=self._is_direct)
            await wire.stream.send_all(frames.encode(client.INFO, 0, frames.pack(summary)))
        elif kind == joint.JOIN:
            await self._join(wire, payload)
        elif kind == client.RUN:
            words = wire.begin(payload)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wire.sending, nursery.cancel_scope)
                nursery.start_soon(wire.receiving, nursery.cancel_scope)
                try:
                    code = await self._command(wire, words)
                except KaError as error:
                    wire.write(STDERR, f"karun: {error}\n".encode("utf-8", "backslashreplace"))
                    code = error.code.exit_code
                wire.say(client.END, 0, frames.pack(code))
                await wire.drained()
                nursery.cancel_scope.cancel()

    async def _join(self, wire: _Wire, payload: bytes) -> None:
        """Let a program give orders to nodes, until it goes."""
        try:
            ranks = self._joined(frames.unpack(payload))
        except KaError as error:
            refusal = frames.pack(error.code.name, str(error))
            await wire.stream.send_all(frames.encode(joint.REFUSED, 0, refusal))
            return
        names = frames.pack(*(self._run.nodes[rank] for rank in ranks))
        wire.say(joint.JOINED, 0, frames.pack(self._run.via, int(self._run.onehost), names))
        member = Member(self._run.orders, ranks, wire.say)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.sending, nursery.cancel_scope)
            try:
                async for kind, said in wire.incoming:
                    member.take(kind, said)
            except (trio.BrokenResourceError, frames.FrameError):
                pass
            finally:
                wire.gone = True
                member.close()
            nursery.cancel_scope.cancel()

    def _joined(self, fields: Sequence[bytes]) -> list[int]:
        version, *names = map(frames.text, fields or (b"",))
        if version != joint.version(self._run.engine.digest):
            raise KaError(Code.WRONG_VERSION, joint.OTHER_VERSION)
        require_distinct(names or self._run.nodes)
        return self._ranks(names or self._run.nodes)

    async def _command(self, wire: _Wire, words: list[str]) -> int:
        nodes, options = cli_run.in_session(words)
        options = _files_in(wire.directory, options)
        ranks = self._ranks(self._run.nodes if nodes is None else nodeset.expand(nodes))
        names = Names([self._run.nodes[rank] for rank in ranks])
        with printing(options, names, wire) as printer:
            sink = _Sink(printer, ranks, wire)
            wire.progress = Progress(names, printer.results)
            argv, line = options.words()
            with wire.stopped:
                await self._run.command(
                    argv, sink=sink, ranks=ranks, line=line, pty=options.pty,
                    stdin=None if options.no_stdin or wire.is_terminal(client.STDIN)
                    else wire.input(),
                    cwd=options.cwd, env=options.settings(), limit_s=options.limit_s,
                    sudo=options.sudo,
                )  # fmt: skip
            if sink.error is not None:
                raise sink.error
            code = printer.finish()
        return client.INTERRUPTED if wire.is_interrupted else code

    def _ranks(self, names: Sequence[str]) -> list[int]:
        if not names:
            raise KaError(Code.USAGE, "no nodes: -w names an empty set")
        known = {name: rank for rank, name in enumerate(self._run.nodes)}
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


class _Sink:
    """A command's printer, which knows the nodes by their places in the command."""

    def __init__(self, printer: Printer, ranks: list[int], wire: _Wire) -> None:
        self._printer = printer
        self._places = {rank: place for place, rank in enumerate(ranks)}
        self._wire = wire
        self.error: KaError | None = None
        """Why output could not be kept in files."""

    def output(self, rank: int, stream: int, data: bytes) -> None:
        try:
            self._printer.output(self._places[rank], stream, data)
        except KaError as error:  # here it would end the session
            self.error = error
            self._wire.stopped.cancel()

    def exited(self, rank: int, code: int, signal: int) -> None:
        self._printer.exited(self._places[rank], code, signal)

    def failed(self, rank: int, stage: str, reason: str) -> None:
        self._printer.failed(self._places[rank], reason, stage)


class _Wire:
    """A client's connection: the standard streams of its command."""

    def __init__(self, stream: trio.SocketStream, pace: Callable[[_Wire], None]) -> None:
        self.stream = stream
        self.terminals = b""
        """Which descriptors of the client are terminals, as digits."""
        self.environment: Mapping[str, str] = {}
        self.directory = Path()
        self.has_reader = True
        self.stopped = trio.CancelScope()
        """About the command: its user wants no more of it."""
        self.is_interrupted = False
        self.progress: Progress | None = None
        self.held_size = 0
        self.gone = False
        self._interrupt_count = 0
        self._started_s = trio.current_time()
        self._pace = pace
        self._held: list[bytes] = []
        self._more = trio.Event()
        self._empty = trio.Event()
        self._feed, self._input = trio.open_memory_channel[bytes](1)
        self.incoming = self._frames()
        """What the client says: one iterator, whoever listens."""

    def begin(self, payload: bytes) -> list[str]:
        """Take what the client says of itself; return the words of its command line."""
        fields = frames.unpack(payload)
        if len(fields) != 4:
            raise frames.FrameError("a client of another version")
        self.directory, self.terminals = Path(frames.text(fields[0])), fields[1]
        settings = map(frames.text, frames.unpack(fields[2]))
        self.environment = dict(setting.partition("=")[::2] for setting in settings)
        return [frames.text(word) for word in frames.unpack(fields[3])]

    def is_terminal(self, stream: int) -> bool:
        return b"%d" % stream in self.terminals

    def write(self, stream: int, data: bytes) -> None:
        """Have the client write."""
        for at in range(0, len(data), frames.FRAME_SIZE_MAX):
            self.say(client.WRITE, stream, data[at : at + frames.FRAME_SIZE_MAX])

    def say(self, kind: int, stream: int = 0, payload: bytes = b"") -> None:
        data = frames.encode(kind, stream, payload)
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
        """Take input and interruptions; the end of the connection is the end of the command."""
        try:
            async for kind, payload in self.incoming:
                if kind == client.INPUT:
                    await self._feed.send(payload)
                elif kind == client.INPUT_END:
                    await self._feed.aclose()
                elif kind == client.INTERRUPT:
                    self._interrupted()
                elif kind == client.UNREAD:
                    self.has_reader = False
                    self.stopped.cancel()
        except (trio.BrokenResourceError, frames.FrameError):
            pass
        self.gone = True
        scope.cancel()

    def _interrupted(self) -> None:
        """The first time, on a terminal, say who is being waited for; else stop."""
        self._interrupt_count += 1
        if self._interrupt_count > 1 or not self.is_terminal(STDERR) or self.progress is None:
            self.is_interrupted = True
            self.stopped.cancel()
            return
        lines = self.progress.status(trio.current_time() - self._started_s)
        text = "".join(f"{line}\n" for line in [*lines, "karun: ^C again stops everything"])
        self.write(STDERR, text.encode("utf-8", "replace"))

    async def input(self) -> AsyncIterator[bytes]:
        """Yield standard input, asked for piece by piece."""
        self.say(client.ROOM)
        async for data in self._input:
            yield data
            self.say(client.ROOM)

    async def _frames(self) -> AsyncIterator[tuple[int, bytes]]:
        decoder = frames.Decoder()
        while data := bytes(await self.stream.receive_some(client.READ_SIZE)):
            for kind, _stream, payload in decoder.feed(data):
                yield kind, payload


def _files_in(directory: Path, options: Options) -> Options:
    """Return options whose files are where the client's user means them to be."""
    outdir, errdir = options.outdir, options.errdir
    return replace(
        options,
        outdir=str(directory / outdir) if outdir else None,
        errdir=str(directory / errdir) if errdir else None,
    )


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _is_own(stream: trio.SocketStream) -> bool:
    credentials = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _pid, uid, _gid = struct.unpack("3i", credentials)
    return uid in (os.geteuid(), 0)


if __name__ == "__main__":
    main()
