"""What `karun run` does with its options: a `Run`, a printer, standard input, interruptions.

Ctrl-C on a terminal: once says who is being waited for, twice stops everything.  Without a
terminal once is enough.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from karun import api, nodes
from karun.engine import Command, Limits
from karun.feed import CHUNK_SIZE
from karun.lines import STDERR, STDOUT
from karun.output import Form, Printer, Style, make_printer, wants_colour
from karun.sinks import NodeFiles, Terminal

__all__ = ["Options", "main"]

EXIT_INTERRUPTED = 130
AGAIN_S = 3.0
TERMINAL = Terminal()


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `karun run`, as the command line has them."""

    nodes: tuple[str, ...]
    excluded: tuple[str, ...]
    groups: tuple[str, ...]
    everyone: bool
    hostfiles: tuple[str, ...]
    session: str | None
    via: str
    ssh_config: str | None
    no_fast_ssh: bool
    user: str | None
    fanout: int
    tree: str
    connect_s: float
    limit_s: float
    gather: bool
    gather_all: bool
    by_line: bool
    no_label: bool
    diff: bool
    as_json: bool
    outdir: str | None
    errdir: str | None
    highest: bool
    no_stdin: bool
    quiet: bool
    cwd: str
    env: tuple[str, ...]
    sudo: bool
    pty: bool
    command: tuple[str, ...]

    def style(self) -> Style:
        """Return what is said of output."""
        form = Form.LABELLED
        if self.as_json:
            form = Form.JSON
        elif self.gather_all:
            form = Form.GATHERED_ALL
        elif self.gather or self.diff:
            form = Form.GATHERED
        elif self.outdir:
            form = Form.SILENT
        return Style(
            form=form,
            by_line=self.by_line,
            diff=self.diff,
            label=not self.no_label,
            highest=self.highest,
            quiet=self.quiet,
            colour_out=wants_colour(os.environ, is_terminal=TERMINAL.is_terminal(STDOUT)),
            colour_err=wants_colour(os.environ, is_terminal=TERMINAL.is_terminal(STDERR)),
        )


def main(options: Options) -> int:
    """Run it; return the exit code.  Raises KaError for what is wrong before it begins."""
    names = nodes.select(
        options.nodes,
        exclude=options.excluded,
        in_groups=options.groups,
        hostfiles=options.hostfiles,
        everyone=options.everyone,
    )
    files = None
    if options.outdir or options.errdir:
        files = NodeFiles(
            names,
            Path(options.outdir) if options.outdir else None,
            Path(options.errdir) if options.errdir else None,
        )
    printer = make_printer(
        nodes.Names(names), TERMINAL, options.style(), files.append if files else None
    )
    try:
        return trio.run(_run, options, names, printer)
    finally:
        if files:
            files.close()


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


async def _run(options: Options, names: list[str], printer: Printer) -> int:
    connector = api.connector(
        options.via,
        user=options.user,
        ssh_config=options.ssh_config,
        connect_s=options.connect_s,
        fast_ssh=not options.no_fast_ssh,
        sample=names[0],
    )
    argv, line = _words(options)
    limits = Limits(window=options.fanout, connect_s=options.connect_s, tree=options.tree)
    ended = False
    running: list[Command] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_interruptions, names, running, nursery.cancel_scope)
        async with api.Run(names, connector, limits=limits) as run:
            await run.command(
                argv,
                sink=_Prints(printer, nursery.cancel_scope.cancel),
                stdin=None if options.no_stdin or sys.stdin.isatty() else _stdin(),
                line=line,
                pty=options.pty,
                cwd=options.cwd,
                env=dict(setting.partition("=")[::2] for setting in options.env),
                limit_s=options.limit_s,
                started=running.append,
            )
            ended = True
        nursery.cancel_scope.cancel()
    code = printer.finish()
    return code if ended or not TERMINAL.has_reader else EXIT_INTERRUPTED


def _words(options: Options) -> tuple[list[str], bool]:
    """Return the command's words, and whether the only one is a line for a shell."""
    words = list(options.command)
    line = len(words) == 1 and any(character in words[0] for character in " \t\n;|&<>$`")
    if options.sudo and line:
        return ["sudo", "-n", "--", "sh", "-c", words[0]], False
    return (["sudo", "-n", "--", *words] if options.sudo else words), line


async def _stdin() -> AsyncIterator[bytes]:
    """Yield standard input; in a thread, because a file is never "not ready"."""
    while data := await trio.to_thread.run_sync(os.read, 0, CHUNK_SIZE, abandon_on_cancel=True):
        yield data


async def _interruptions(
    names: list[str], running: list[Command], scope: trio.CancelScope
) -> None:
    last = -AGAIN_S
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for number in signals:
            now = trio.current_time()
            if number == signal.SIGTERM or not sys.stderr.isatty() or now - last < AGAIN_S:
                scope.cancel()
                return
            last = now
            waiting = sorted(set().union(*(command.pending for command in running)))
            line = f"karun: waiting for {nodes.Names(names).fold(waiting)}; ^C again stops\n"
            TERMINAL.write(STDERR, line.encode())
