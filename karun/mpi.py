"""An MPI program as one command of a run: its ranks, and what ends all of them at once.

Every node gets `count` ranks, node by node.  They are commands of the run like any other, with a
place in a world; what they say to their launcher is understood on the nodes (karun/agent/world.py),
what passes between nodes goes through karun/engine.py.

Invariants
  * ranks start on all nodes or on none;
  * a rank that aborts, a lost node, the time limit: each ends all ranks, and who is not to blame
    is `stopped`, with the reason;
  * standard input is rank 0's, as MPI has it.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from karun.agent.process import SIGKILL
from karun.nodes import Names
from karun.orders import TIMEOUT, Command, Sink
from karun.results import STAGE_STOPPED
from karun.roster import State

if TYPE_CHECKING:
    from karun.api import Run

__all__ = ["Program", "run_program", "unit_names"]


@dataclass(frozen=True, slots=True)
class Program:
    """What is run, and how."""

    argv: Sequence[str]
    count: int = 1
    """Ranks on each node."""
    line: bool = False
    """Whether the only word is a line for the node's shell."""
    cwd: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    limit_s: float = 0.0
    """For the whole; 0: none."""
    stdin: bytes | AsyncIterable[bytes] | None = None


def unit_names(nodes: Sequence[str], count: int) -> list[str]:
    """Return what ranks are called: as their nodes, or `node:rank` if those have several."""
    if count == 1:
        return list(nodes)
    return [f"{nodes[rank // count]}:{rank}" for rank in range(len(nodes) * count)]


async def run_program(run: Run, program: Program, sink: Sink) -> int:
    """Run it; *sink* is told of MPI ranks.  Return the exit code if it aborted, 0 if not.

    Cancelled: all ranks are killed.
    """
    await run.launched()
    states = run.engine.roster.states
    out = [rank for rank, state in enumerate(states) if state is State.FAILED]
    world = _World(run, program, sink)
    if out:
        world.stop(f"not started: {Names(run.nodes).fold(out)} not there")
    with trio.move_on_after(program.limit_s or float("inf")) as limit:
        await world.run()
    if limit.cancelled_caught:
        world.out_of_time()
    return world.abort_code


class _World:
    """One program under way."""

    def __init__(self, run: Run, program: Program, sink: Sink) -> None:
        self._run, self._program, self.sink = run, program, sink
        self._commands: list[Command] = []
        self._open = set(range(len(run.nodes) * program.count))
        self.reason = ""
        """Why all ranks are being stopped."""
        self.culprit = -1
        self.abort_code = 0

    async def run(self) -> None:
        """Start the ranks and wait for their ends."""
        if self.reason:
            for rank in range(len(self._run.nodes)):
                failure = self._run.engine.failure(rank)
                stage, reason = failure or (STAGE_STOPPED, self.reason)
                for local in range(self._program.count):
                    self.failed(rank * self._program.count + local, stage, reason)
            return
        self._number = self._run.engine.world(self._program.count, self._aborted)
        nodes = list(range(len(self._run.nodes)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._start, 0, nodes[:1], self._program.stdin)
            if nodes[1:]:
                nursery.start_soon(self._start, 0, nodes[1:], None)
            for local in range(1, self._program.count):
                nursery.start_soon(self._start, local, nodes, None)

    async def _start(
        self, local: int, ranks: list[int], stdin: bytes | AsyncIterable[bytes] | None
    ) -> None:
        program = self._program
        try:
            await self._run.command(
                program.argv,
                sink=_Place(self, local, program.count),
                ranks=ranks,
                stdin=stdin,
                line=program.line,
                cwd=program.cwd,
                env=program.env,
                place=(self._number, local),
                started=self._started,
            )
        except BaseException:
            # Its ranks have just been killed.  The nodes' news of it may come before the last of
            # our tasks has ended: it is no abort.
            self.reason = self.reason or "over"
            raise

    def _started(self, command: Command) -> None:
        self._commands.append(command)
        if self.reason:
            self._run.engine.signal(command, SIGKILL)

    def _aborted(self, rank: int, code: int, reason: str) -> None:
        if not self.reason:
            self.culprit, self.abort_code = rank, code & 0xFF or 1
            self.stop(f"rank {rank} {reason}")

    def stop(self, reason: str) -> None:
        """End all ranks."""
        if not self.reason:
            self.reason = reason
            for command in self._commands:
                if command.pending:
                    self._run.engine.signal(command, SIGKILL)

    def out_of_time(self) -> None:
        """The time limit has passed, and the ranks are dead."""
        for rank in sorted(self._open):
            self.failed(rank, TIMEOUT, f"after {self._program.limit_s:g} s")

    def exited(self, rank: int, code: int, signal: int) -> None:
        was_killed = signal == SIGKILL and bool(self.reason)
        if was_killed and rank != self.culprit:
            self.failed(rank, STAGE_STOPPED, self.reason)
            return
        if was_killed and self.abort_code != 128 + SIGKILL:  # by us, on its way out
            code, signal = self.abort_code, 0
        if rank == self.culprit:
            self.abort_code = 128 + signal if signal else code or self.abort_code
        self._open.discard(rank)
        self.sink.exited(rank, code, signal)

    def failed(self, rank: int, stage: str, reason: str) -> None:
        self._open.discard(rank)
        self.sink.failed(rank, stage, reason)


class _Place:
    """The ranks with one place on their nodes, as the sink of a command."""

    def __init__(self, world: _World, local: int, count: int) -> None:
        self._world = world
        self._rank: Callable[[int], int] = lambda node: node * count + local

    def output(self, node: int, stream: int, data: bytes) -> None:
        self._world.sink.output(self._rank(node), stream, data)

    def exited(self, node: int, code: int, signal: int) -> None:
        self._world.exited(self._rank(node), code, signal)

    def failed(self, node: int, stage: str, reason: str) -> None:
        self._world.failed(self._rank(node), stage, reason)
        self._world.stop(f"rank {self._rank(node)} was lost")
