"""What `karun run` does with its options: a `Run`, a printer, standard input, interruptions.

Ctrl-C on a terminal: once says who is being waited for, twice stops everything.  Without a
terminal once is enough.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass

import trio

from common import nodeset
from common.errors import Code, KaError
from karun import api
from karun.engine import Command, Limits
from karun.feed import CHUNK_SIZE

__all__ = ["Options", "main"]

EXIT_INTERRUPTED = 130
AGAIN_S = 3.0


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `karun run`, as the command line has them."""

    nodes: str
    excluded: str | None
    via: str
    ssh_config: str | None
    no_fast_ssh: bool
    user: str | None
    fanout: int
    connect_s: float
    limit_s: float
    highest: bool
    no_stdin: bool
    quiet: bool
    cwd: str
    env: tuple[str, ...]
    sudo: bool
    pty: bool
    command: tuple[str, ...]


class Labelled:
    """Prints lines as they come, each after its node's name."""

    def __init__(self, nodes: list[str]) -> None:
        self._nodes = nodes
        self._partial: dict[tuple[int, int], bytes] = {}

    def output(self, rank: int, stream: int, data: bytes) -> None:
        *lines, rest = (self._partial.get((rank, stream), b"") + data).split(b"\n")
        self._partial[rank, stream] = rest
        self._print(rank, stream, lines)

    def exited(self, rank: int, code: int, signal: int) -> None:
        for stream in (1, 2):
            rest = self._partial.pop((rank, stream), b"")
            if rest:
                self._print(rank, stream, [rest])
        if code or signal:
            what = f"signal {signal}" if signal else f"exit code {code}"
            print(f"karun: {self._nodes[rank]}: {what}", file=sys.stderr)

    def failed(self, rank: int, stage: str, reason: str) -> None:
        print(f"karun: {self._nodes[rank]}: {stage}: {reason}", file=sys.stderr)

    def _print(self, rank: int, stream: int, lines: list[bytes]) -> None:
        label = self._nodes[rank].encode() + b": "
        target = sys.stdout if stream == 1 else sys.stderr
        target.buffer.write(b"".join(label + line + b"\n" for line in lines))
        target.flush()


def main(options: Options) -> int:
    """Run it; return the exit code.  Raises KaError for what is wrong before it begins."""
    nodes = nodeset.expand(options.nodes)
    if options.excluded:
        without = set(nodeset.expand(options.excluded))
        nodes = [node for node in nodes if node not in without]
    if not nodes:
        raise KaError(Code.USAGE, "no nodes: the set is empty")
    return trio.run(_run, options, nodes)


async def _run(options: Options, nodes: list[str]) -> int:
    connector = api.connector(
        options.via,
        user=options.user,
        ssh_config=options.ssh_config,
        connect_s=options.connect_s,
        fast_ssh=not options.no_fast_ssh,
        sample=nodes[0],
    )
    argv, line = _words(options)
    limits = Limits(window=options.fanout, connect_s=options.connect_s)
    outcomes: list[api.Outcome] = []
    running: list[Command] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_interruptions, nodes, running, nursery.cancel_scope)
        async with api.Run(nodes, connector, limits=limits) as run:
            outcomes = await run.command(
                argv,
                sink=Labelled(nodes),
                stdin=None if options.no_stdin or sys.stdin.isatty() else _stdin(),
                line=line,
                pty=options.pty,
                cwd=options.cwd,
                env=dict(setting.partition("=")[::2] for setting in options.env),
                limit_s=options.limit_s,
                started=running.append,
            )
        nursery.cancel_scope.cancel()
    if not outcomes:
        return EXIT_INTERRUPTED
    worst = max(outcome.exit_code for outcome in outcomes)
    return worst if options.highest else 0


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
    nodes: list[str], running: list[Command], scope: trio.CancelScope
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
            names = nodeset.fold(nodes[rank] for rank in waiting)
            print(f"karun: waiting for {names}; again within 3 s to stop", file=sys.stderr)
