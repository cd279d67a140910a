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
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from common.descriptors import raise_descriptor_limit
from common.errors import Code, KaError, first_error
from karun import archive, connectors, ssh_options
from karun.connectors import Connector
from karun.copied import Copied, CopyOptions, Step
from karun.crew import Crew, Outcome, Recorder, require_distinct
from karun.engine import CONNECT_S, Engine, Limits
from karun.joined import Joined
from karun.mpi import Program, run_program, unit_names
from karun.orders import Sink
from karun.roster import State

__all__ = [
    "Copied", "CopyOptions", "Crew", "Joined", "Limits", "Outcome", "Program", "Run", "Sink",
    "Step", "connector",
]  # fmt: skip

MOVE_S = 2.5
"""More than a node gives a connection that does not come about."""
QUIT_S = 3.0
"""What the nodes get to end their processes when the run is left."""


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


class Run(Crew):
    """The nodes of one run, being launched or there; an async context manager."""

    def __init__(
        self,
        nodes: Sequence[str],
        via: str | Connector = "ssh",
        *,
        limits: Limits | None = None,
    ) -> None:
        require_distinct(nodes)
        self.nodes = list(nodes)
        self._limits = limits or Limits()
        self.connector = via if isinstance(via, Connector) else connector(via, sample=nodes[0])
        self._engine: Engine | None = None

    async def __aenter__(self) -> Run:
        raise_descriptor_limit()  # a call takes four
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

    @property
    def orders(self) -> Engine:
        return self.engine

    @property
    def via(self) -> str:
        return self.connector.via

    @property
    def onehost(self) -> bool:
        return self.connector.onehost

    def is_out(self, rank: int) -> bool:
        return self.engine.roster.states[rank] is State.FAILED

    @property
    def came_s(self) -> Mapping[int, float]:
        return self.engine.latecomers.came_s

    async def launched(self) -> None:
        """Wait until every node is there or given up."""
        engine = self.engine
        if engine.launching_count:
            event = trio.Event()
            engine.launched = event.set
            await event.wait()

    async def move(self) -> list[str]:
        """Have the nodes leave the connector's ways for TCP connections of their own.

        They skip ssh and sshd then, which is quicker; what is said is protected against changes but
        can be read on the way.  Call it when all nodes are `launched`; commands may be under way.
        Returns the nodes that could not, and stay as they are: nobody was added for MOVE_S.
        """
        engine = self.engine
        engine.move()
        left, since_s = engine.indirect(), trio.current_time()
        while left and trio.current_time() - since_s < MOVE_S:
            await trio.sleep(0.02)
            before, left = left, engine.indirect()
            if len(left) != len(before):
                since_s = trio.current_time()
        return [self.nodes[rank] for rank in left]

    async def mpi(
        self, program: Program, *, sink: Sink | None = None
    ) -> tuple[list[Outcome], int]:
        """Run an MPI program on all nodes; return what became of its ranks, and its abort's code.

        The code is 0 if nobody aborted; the sink is told of MPI ranks.  Ranks start on all nodes
        or on none.  Cancelled: all ranks are killed.
        """
        recorder = Recorder(unit_names(self.nodes, program.count), sink)
        code = await run_program(self, program, recorder)
        return recorder.outcomes(range(len(self.nodes) * program.count)), code


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
        raise first_error(group) from None
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
