"""What `karun run` does with its options: a `Run`, a printer, standard input, interruptions.

On a terminal a line says how far it is.  Ctrl-C: once says who is being waited for, as ENTER does;
twice stops everything.  Without a terminal once is enough.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import trio

from common.errors import Code, KaError, first_error
from common.signals import ending
from karun import api, nodes
from karun.connectors import WINDOWS, Connector
from karun.crew import Crew
from karun.engine import Limits
from karun.feed import CHUNK_SIZE
from karun.lines import STDERR
from karun.mpi import Program, unit_names
from karun.options import Options, printing
from karun.output import Printer
from karun.progress import Progress, StatusLine
from karun.ssh_options import fast_key_exchange
from karun.terminal import TERMINAL
from karun.windows_nodes import WindowsNodes

__all__ = ["InSession", "Where", "main"]

EXIT_INTERRUPTED = 130
AGAIN_S = 3.0
STDIN = 0
BACKGROUND_S = 1.0
DRAW_S = 0.3


@dataclass(frozen=True, slots=True)
class Where:
    """The options of `karun run` and `karun session start` that say which nodes, and how."""

    nodes: tuple[str, ...]
    excluded: tuple[str, ...]
    groups: tuple[str, ...]
    everyone: bool
    hostfiles: tuple[str, ...]
    via: str
    ssh_config: str | None
    no_fast_ssh: bool
    user: str | None
    fanout: int
    tree: str
    connect_s: float
    late_s: float = 0.0
    direct: bool = False
    """Of a session: nodes leave the connector for TCP connections of their own."""

    def names(self) -> list[str]:
        """Return the nodes; raises KaError USAGE."""
        return nodes.select(
            self.nodes,
            exclude=self.excluded,
            in_groups=self.groups,
            hostfiles=self.hostfiles,
            everyone=self.everyone,
        )

    def connector(self, names: list[str]) -> Connector:
        """Return how these nodes are called; raises KaError USAGE."""
        if self.via == WINDOWS:
            raise KaError(Code.USAGE, "Windows nodes take `karun run` and `karun copy` only")
        return api.connector(
            self.via,
            user=self.user,
            ssh_config=self.ssh_config,
            connect_s=self.connect_s,
            fast_ssh=not self.no_fast_ssh,
            sample=names[0],
        )

    def run(self, names: list[str]) -> api.Run:
        """Return the run over these nodes, not yet entered."""
        limits = Limits(
            window=self.fanout, connect_s=self.connect_s, tree=self.tree, late_s=self.late_s
        )
        return api.Run(names, self.connector(names), limits=limits)

    def crew(self) -> Crew:
        """Return the run over all these nodes, not yet entered; raises KaError USAGE."""
        return self.run(self.names())

    def windows(self, names: list[str]) -> WindowsNodes:
        """Return these nodes as what they are with `--via windows`; raises KaError USAGE."""
        if self.late_s:
            raise KaError(Code.USAGE, "--late does not go with --via windows: copy again instead")
        return WindowsNodes(
            names, user=self.user, ssh_config=self.ssh_config, connect_s=self.connect_s,
            options=() if self.no_fast_ssh else fast_key_exchange(self.ssh_config, names[0]),
            window=self.fanout,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class InSession:
    """The options that say which nodes, when those of a session are meant."""

    session: str
    nodes: tuple[str, ...]
    """What -w says; if it is not said, all are meant."""

    def names(self) -> list[str]:
        """Return the nodes, of which the session is asked; raises KaError, as joining it does."""
        return trio.run(_names_of, self.crew())

    def run(self, names: list[str]) -> Crew:
        """Return these nodes of the session, not yet joined."""
        return api.Joined(self.session, names)

    def crew(self) -> Crew:
        """Return these nodes, not yet joined; raises KaError USAGE."""
        return api.Joined(self.session, nodes.select(self.nodes) if self.nodes else None)


async def _names_of(crew: Crew) -> list[str]:
    async with crew:
        return crew.nodes


def main(where: Where, options: Options) -> int:
    """Run it; return the exit code.  Raises KaError for what is wrong before it begins."""
    names = where.names()
    units = unit_names(names, options.ranks) if options.mpi else names
    on_windows = where.via == WINDOWS
    if on_windows and options.mpi:
        raise KaError(Code.USAGE, "--mpi is not for Windows nodes")
    run = where.windows(names) if on_windows else where.run(names)
    with printing(options, nodes.Names(units), TERMINAL) as printer:
        try:
            return trio.run(_run, run, options, printer, nodes.Names(units))
        except BaseExceptionGroup as group:
            raise first_error(group) from None


class _Prints:
    """A printer as the sink of a run."""

    def __init__(self, printer: Printer, reader_gone: Callable[[], None]) -> None:
        """*reader_gone* is called when nobody reads what is printed (`| head`)."""
        self._printer = printer
        self._reader_gone = reader_gone
        self.exited = printer.exited

    def output(self, rank: int, stream: int, data: bytes) -> None:
        self._printer.output(rank, stream, data)
        if not TERMINAL.has_reader:
            self._reader_gone()

    def failed(self, rank: int, stage: str, reason: str) -> None:
        self._printer.failed(rank, reason, stage)


async def _run(
    run: api.Run | WindowsNodes, options: Options, printer: Printer, units: nodes.Names
) -> int:
    ended, abort_code = False, 0
    progress = Progress(units, printer.results)
    stdin = None if options.no_stdin or sys.stdin.isatty() else _stdin(progress)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_interruptions, progress, nursery.cancel_scope)
        if os.isatty(STDERR):
            nursery.start_soon(_draw, progress)
            if os.isatty(STDIN):
                nursery.start_soon(_enters, progress)
        async with run:
            sink = _Prints(printer, nursery.cancel_scope.cancel)
            if options.mpi and isinstance(run, api.Run):
                _ends, abort_code = await run.mpi(_program(options, stdin), sink=sink)
            else:
                await _command(run, options, stdin, sink)
            ended = True
        nursery.cancel_scope.cancel()
    code = printer.finish()
    return abort_code or code if ended or not TERMINAL.has_reader else EXIT_INTERRUPTED


async def _command(
    run: api.Run | WindowsNodes,
    options: Options,
    stdin: AsyncIterator[bytes] | None,
    sink: api.Sink,
) -> None:
    argv, line = options.words()
    await run.command(
        argv,
        sink=sink,
        stdin=stdin,
        line=line,
        pty=options.pty,
        cwd=options.cwd,
        env=options.settings(),
        limit_s=options.limit_s,
        sudo=options.sudo,
    )


def _program(options: Options, stdin: AsyncIterator[bytes] | None) -> Program:
    argv, line = options.words()
    return Program(
        argv, options.ranks, line=line, cwd=options.cwd, env=options.settings(),
        limit_s=options.limit_s, stdin=stdin,
    )  # fmt: skip


async def _stdin(progress: Progress) -> AsyncIterator[bytes]:
    """Yield standard input; in a thread, because a file is never "not ready"."""
    while data := await trio.to_thread.run_sync(os.read, 0, CHUNK_SIZE, abandon_on_cancel=True):
        yield data
        progress.sent_size += len(data)


async def _draw(progress: Progress) -> None:
    """Keep a status line at the foot of the terminal, until cancelled."""
    started = trio.current_time()
    columns = shutil.get_terminal_size().columns
    line = StatusLine(TERMINAL.draw, started=started, columns=columns)
    TERMINAL.before = line.clear
    try:
        while True:
            await trio.sleep(DRAW_S)
            now = trio.current_time()
            line.update(now, progress.line(now - started))
    finally:
        line.clear()
        TERMINAL.before = None


async def _interruptions(progress: Progress, scope: trio.CancelScope) -> None:
    started = trio.current_time()
    last = -AGAIN_S
    with trio.open_signal_receiver(*ending()) as signals:
        async for number in signals:
            now = trio.current_time()
            if number != signal.SIGINT or not sys.stderr.isatty() or now - last < AGAIN_S:
                scope.cancel()
                return
            last = now
            _tell(progress, now - started)
            TERMINAL.write(STDERR, b"karun: ^C again stops everything\n")


async def _enters(progress: Progress) -> None:
    """Answer ENTER with whom the run waits for, while the terminal is ours to read."""
    started = trio.current_time()
    while True:
        await trio.lowlevel.wait_readable(STDIN)
        if os.tcgetpgrp(STDIN) != os.getpgrp():  # reading in the background would stop us
            await trio.sleep(BACKGROUND_S)
        elif os.read(STDIN, CHUNK_SIZE):
            _tell(progress, trio.current_time() - started)
        else:
            return


def _tell(progress: Progress, elapsed_s: float) -> None:
    for line in progress.status(elapsed_s):
        TERMINAL.write(STDERR, line.encode("utf-8", "replace") + b"\n")
