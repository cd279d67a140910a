"""Run commands on many nodes from Python, on trio.  The command line uses nothing else.

    async with karun.Run(["node1", "node2"]) as run:
        outcomes = await run.command(["uname", "-r"], sink=my_sink)

A `Run` begins to call its nodes when it is entered; commands may be given at once, each node runs
them in their order from the moment it is there.  Leaving ends every process and agent of the run,
also after an error or a cancellation.  Output goes to the sink as it comes; a sink that takes its
time slows the nodes down, it does not fill the memory.
"""

from __future__ import annotations

import math
import os
import resource
import sys
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from common.errors import Code, KaError
from karun import archive, connectors, ssh_options
from karun.connectors import Connector
from karun.copied import Copied, CopyOptions, Step
from karun.engine import CONNECT_S, TIMEOUT, Command, Engine, Limits, Sink
from karun.feed import CHUNK_SIZE
from karun.mpi import Program, run_program, unit_names
from karun.results import CODE_STOPPED, CODE_TIMED_OUT, STAGE_STOPPED

__all__ = [
    "Copied", "CopyOptions", "Limits", "Outcome", "Program", "Run", "Sink", "Step", "connector",
]  # fmt: skip

QUIT_S = 3.0
"""What the nodes get to end their processes when the run is left."""


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


def connector(
    via: str = "ssh",
    *,
    user: str | None = None,
    ssh_config: str | None = None,
    connect_s: float = CONNECT_S,
    fast_ssh: bool = True,
    sample: str = "localhost",
) -> Connector:
    """Return a connector by name; raises KaError USAGE.

    *fast_ssh* puts the quick key exchange first where the user's ssh configuration (as it holds
    for the node *sample*) has no opinion.
    """
    if ssh_config and not Path(ssh_config).is_file():
        raise KaError(Code.USAGE, f"no such ssh configuration: {ssh_config}")
    quick = via == "ssh" and fast_ssh
    return connectors.make(
        via,
        python=os.path.realpath(sys.executable),
        with_libraries=sys.executable,
        user=user,
        ssh_config=ssh_config,
        connect_s=connect_s,
        key_exchange=ssh_options.fast_key_exchange(ssh_config, sample) if quick else (),
    )


class Run:
    """The nodes of one run, being launched or there; an async context manager."""

    def __init__(
        self,
        nodes: Sequence[str],
        via: str | Connector = "ssh",
        *,
        limits: Limits | None = None,
    ) -> None:
        if not nodes:
            raise KaError(Code.USAGE, "no nodes")
        if len(set(nodes)) != len(nodes):
            raise KaError(Code.USAGE, "a node is named twice")
        self.nodes = list(nodes)
        self._limits = limits or Limits()
        self.connector = via if isinstance(via, Connector) else connector(via, sample=nodes[0])
        self._engine: Engine | None = None

    async def __aenter__(self) -> Run:
        _raise_descriptor_limit()
        self._manager = _running(Engine(self.nodes, self.connector, archive.build(), self._limits))
        self._engine = await self._manager.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> bool | None:
        self._engine = None
        return await self._manager.__aexit__(*error)

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise KaError(Code.USAGE, "the run is not entered, or left")
        return self._engine

    async def launched(self) -> None:
        """Wait until every node is there or given up."""
        engine = self.engine
        if engine.launching_count:
            event = trio.Event()
            engine.launched = event.set
            await event.wait()

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
        place: tuple[int, int] | None = None,
    ) -> list[Outcome]:
        """Run a command on all nodes (or on *ranks*), and wait for its end on each.

        argv: the words of the command; with *line* the only word is a line for the node's shell.
        stdin: bytes or a source of them for its standard input, the same on all nodes.
        pty: give it a terminal.  limit_s: TERM after so long, KILL two seconds later; 0: never.
        started: called with the `Command`, through which it can be signalled.
        task: the words are those of a task of the agent's own (karun/agent/task.py).
        place: it is part of an MPI program (karun/mpi.py).
        Cancelled: the command's processes are killed on every node.
        """
        engine = self.engine
        recorder = _Recorder(self.nodes, sink)
        settings = [f"{name}={value}" for name, value in (env or {}).items()]
        command = engine.command(
            argv, recorder, ranks=ranks, line=line, pty=pty, cwd=cwd, env=settings,
            limit_s=limit_s, fed=stdin is not None, task=task, place=place,
        )  # fmt: skip
        done = trio.Event()
        command.done = done.set
        if started is not None:
            started(command)
        try:
            async with trio.open_nursery() as nursery:
                if stdin is not None:
                    nursery.start_soon(_feed, engine, command, stdin)
                if command.pending:
                    await done.wait()
                nursery.cancel_scope.cancel()
        finally:
            if command.pending and not engine.closed:
                engine.abandon(command)
        return recorder.outcomes(range(len(self.nodes)) if ranks is None else ranks)

    async def mpi(
        self, program: Program, *, sink: Sink | None = None
    ) -> tuple[list[Outcome], int]:
        """Run an MPI program on all nodes; return what became of its ranks, and its abort's code.

        The code is 0 if nobody aborted; the sink is told of MPI ranks.  Ranks start on all nodes
        or on none.  Cancelled: all ranks are killed.
        """
        recorder = _Recorder(unit_names(self.nodes, program.count), sink)
        code = await run_program(self, program, recorder)
        return recorder.outcomes(range(len(self.nodes) * program.count)), code

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
        on_progress: Callable[[Step], None] | None = None,
    ) -> list[Copied]:
        """Bring a file or directory of every node to `directory/<node>`, verified.

        source: on the node; `%h` is its name.  Raises KaError when *directory* cannot be written.
        """
        from karun import gathering

        return await gathering.gather(self, source, directory, on_progress=on_progress)


class _Recorder:
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


@asynccontextmanager
async def _running(engine: Engine) -> AsyncIterator[Engine]:
    """Launch, and drive the engine until left; then end everything."""
    engine.launch()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_drive, engine)
            yield engine
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise alone(group) from None
    finally:
        engine.quit()
        with trio.CancelScope(shield=True), trio.move_on_after(QUIT_S, shield=True):
            await _drive(engine, until_quiet=True)
        engine.close()


async def _drive(engine: Engine, *, until_quiet: bool = False) -> None:
    while not (until_quiet and engine.quiet):
        timeout = engine.loop.timeout()
        with trio.move_on_after(math.inf if timeout is None else timeout):
            await trio.lowlevel.wait_readable(engine.loop.fileno())
        engine.step()


async def _feed(engine: Engine, command: Command, stdin: bytes | AsyncIterable[bytes]) -> None:
    async for data in _pieces(stdin):
        for at in range(0, len(data), CHUNK_SIZE):
            await _room(command)
            engine.feed(command, data[at : at + CHUNK_SIZE])
    engine.end_input(command)


async def _pieces(stdin: bytes | AsyncIterable[bytes]) -> AsyncIterator[bytes]:
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


def alone(error: BaseException) -> BaseException:
    """Return what a group of one holds: that a nursery was about it is nobody's business."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _raise_descriptor_limit() -> None:
    """A call takes four descriptors; the soft limit is made for programs that use select."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
