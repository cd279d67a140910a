"""Nodes that take commands, copies and gathers: those of a run, or of a session.

`Crew` is what both can do (`karun.api.Run`, `karun.joined.Joined`); who takes its orders is theirs
to say.
"""

from __future__ import annotations

import abc
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import trio

from common.errors import Code, KaError
from karun.copied import Copied, CopyOptions, Step
from karun.feed import CHUNK_SIZE
from karun.orders import TIMEOUT, Command, Invocation, Orders, Sink
from karun.results import CODE_STOPPED, CODE_TIMED_OUT, STAGE_STOPPED

__all__ = ["Crew", "Outcome", "Recorder", "require_distinct", "require_file_names"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a command on one node."""

    rank: int
    node: str
    code: int | None
    """Exit code; None if it has none of its own."""
    signal: int = 0
    """The signal that ended it."""
    stage: str = ""
    """Where it went wrong if it did not run to its end: connect, agent, lost, timeout."""
    reason: str | None = None
    """And why, in one line."""

    @property
    def exit_code(self) -> int:
        """As a shell would give it: 128 + signal; 124 out of time; 255 for a node that is out;
        137 stopped because of another rank."""
        if self.stage:
            return {TIMEOUT: CODE_TIMED_OUT, STAGE_STOPPED: CODE_STOPPED}.get(self.stage, 255)
        return 128 + self.signal if self.signal else self.code or 0


class Crew(abc.ABC):
    """Some nodes, in an order: their ranks count from 0.  An async context manager."""

    nodes: list[str]

    @abc.abstractmethod
    async def __aenter__(self) -> Crew: ...

    @abc.abstractmethod
    async def __aexit__(self, *error: Any) -> bool | None: ...

    @property
    @abc.abstractmethod
    def orders(self) -> Orders:
        """Who takes orders for the nodes; raises KaError when nobody does."""

    @property
    @abc.abstractmethod
    def via(self) -> str:
        """By which connector the nodes are reached."""

    @property
    @abc.abstractmethod
    def onehost(self) -> bool:
        """Whether all nodes are this machine."""

    @abc.abstractmethod
    def is_out(self, rank: int) -> bool:
        """Say whether it takes another crew to reach a node that this one has, or had."""

    @property
    def came_s(self) -> Mapping[int, float]:
        """By rank of nodes that could not be reached at first: when they came, in seconds."""
        return {}

    async def command(
        self,
        argv: Sequence[str],
        *,
        sink: Sink | None = None,
        ranks: Sequence[int] | None = None,
        stdin: bytes | AsyncIterable[bytes] | None = None,
        line: bool = False,
        pty: bool = False,
        cwd: str = "",
        env: Mapping[str, str] | None = None,
        limit_s: float = 0.0,
        started: Callable[[Command], None] | None = None,
        task: bool = False,
        sudo: bool = False,
        place: tuple[int, int] | None = None,
    ) -> list[Outcome]:
        """Run a command on all nodes (or on *ranks*), and wait for its end on each.

        argv: the words of the command; with *line* the only word is a line for the node's shell.
        stdin: bytes or a source of them for its standard input, the same on all nodes.
        pty: give it a terminal.  limit_s: TERM after so long, KILL two seconds later; 0: never.
        started: called with the `Command`, through which it can be signalled.
        task: the words are those of a task of the agent's own (karun/agent/task.py).
        sudo: as root, by `sudo -n`, on nodes where the login is not root.
        place: it is part of an MPI program (karun/mpi.py).
        Cancelled: the command's processes are killed on every node.
        """
        orders = self.orders
        recorder = Recorder(self.nodes, sink)
        settings = [f"{name}={value}" for name, value in (env or {}).items()]
        invocation = Invocation(
            argv, line=line, pty=pty, cwd=cwd, env=settings, limit_s=limit_s,
            fed=stdin is not None, task=task, sudo=sudo, place=place,
        )  # fmt: skip
        command = orders.command(invocation, recorder, ranks=ranks)
        done = trio.Event()
        command.done = done.set
        if started is not None:
            started(command)
        try:
            async with trio.open_nursery() as nursery:
                if stdin is not None:
                    nursery.start_soon(_feed, orders, command, stdin)
                if command.pending:
                    await done.wait()
                nursery.cancel_scope.cancel()
        finally:
            if command.pending and not orders.closed:
                orders.abandon(command)
        return recorder.outcomes(range(len(self.nodes)) if ranks is None else ranks)

    async def copy(
        self,
        sources: Sequence[str],
        destination: str,
        *,
        options: CopyOptions | None = None,
        on_progress: Callable[[Step], None] | None = None,
        on_output: Callable[[int, bytes], None] | None = None,
    ) -> list[Copied]:
        """Copy files, directories or standard input (`-`) to all nodes, verified there.

        destination: as `cp` has it, on the node; `%h` is the node's name.  Empty when
        `options.command` takes what comes.  on_output: what such commands print.
        Raises KaError when a source cannot be read or changes meanwhile; what fails on nodes is in
        the results.  Cancelled: what is incomplete stays, and the next copy goes on with it.
        """
        from karun import copying  # most runs copy nothing

        return await copying.copy(
            self, sources, destination, options=options or CopyOptions(),
            on_progress=on_progress, on_output=on_output,
        )  # fmt: skip

    async def gather(
        self,
        source: str,
        directory: str,
        *,
        sudo: bool = False,
        on_progress: Callable[[Step], None] | None = None,
    ) -> list[Copied]:
        """Bring a file or directory of every node to `directory/<node>`, verified.

        source: on the node; `%h` is its name.  sudo: it is read as root, by `sudo -n`.
        Raises KaError when *directory* cannot be written.
        """
        from karun import gathering

        return await gathering.gather(self, source, directory, sudo=sudo, on_progress=on_progress)


class Recorder:
    """Passes on to a sink, and keeps what became of each node."""

    def __init__(self, nodes: Sequence[str], sink: Sink | None) -> None:
        self._nodes = nodes
        self._sink = sink
        self._ends: dict[int, Outcome] = {}

    def output(self, rank: int, stream: int, data: bytes) -> None:
        if self._sink is not None:
            self._sink.output(rank, stream, data)

    def exited(self, rank: int, code: int, signal: int) -> None:
        self._ends[rank] = Outcome(rank, self._nodes[rank], None if signal else code, signal)
        if self._sink is not None:
            self._sink.exited(rank, code, signal)

    def failed(self, rank: int, stage: str, reason: str) -> None:
        self._ends[rank] = Outcome(rank, self._nodes[rank], None, stage=stage, reason=reason)
        if self._sink is not None:
            self._sink.failed(rank, stage, reason)

    def outcomes(self, ranks: Iterable[int]) -> list[Outcome]:
        return [self._ends[rank] for rank in ranks]


async def _feed(orders: Orders, command: Command, stdin: bytes | AsyncIterable[bytes]) -> None:
    async with aclosing(_pieces(stdin)) as pieces:
        async for data in pieces:
            for at in range(0, len(data), CHUNK_SIZE):
                await _room(command)
                orders.feed(command, data[at : at + CHUNK_SIZE])
    orders.end_input(command)


async def _pieces(stdin: bytes | AsyncIterable[bytes]) -> AsyncGenerator[bytes]:
    if isinstance(stdin, bytes):
        yield stdin
        return
    async for data in stdin:
        yield data


async def _room(command: Command) -> None:
    feed = command.feed
    assert feed is not None
    while not feed.room:
        changed = trio.Event()
        feed.changed = changed.set
        await changed.wait()


def require_distinct(nodes: Sequence[str]) -> None:
    """Raise KaError USAGE unless there are nodes, each of them once."""
    if not nodes:
        raise KaError(Code.USAGE, "no nodes")
    if len(set(nodes)) != len(nodes):
        raise KaError(Code.USAGE, "a node is named twice")


def require_file_names(nodes: Sequence[str]) -> None:
    """Raise KaError USAGE for a node whose name cannot be that of a file."""
    for node in nodes:
        if "/" in node or node in ("", ".", ".."):
            reason = f"node {node!r} would leave the directory: its name is to be a file's"
            raise KaError(Code.USAGE, reason)
