"""karun/mpi.py: what ends an MPI program, and who is to blame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import trio
import trio.testing

from karun.agent.process import SIGKILL
from karun.api import Run
from karun.mpi import Program, run_program
from karun.orders import TIMEOUT, Command
from karun.roster import State


class Nodes:
    """A run of two nodes, whose agents tell of a killed rank while the head still ends it."""

    nodes = ("n1", "n2")

    def __init__(self, nursery: trio.Nursery) -> None:
        self.engine = self.roster = self
        self.states = [State.JOINED] * 2
        self._nursery = nursery
        self._number = 0

    async def launched(self) -> None:
        pass

    def world(self, count: int, aborted: Callable[[int, int, str], None]) -> int:
        self._aborted = aborted
        return 1

    def signal(self, command: Command, number: int) -> None:
        for rank in sorted(command.pending):
            self._nursery.start_soon(self._killed, rank)

    async def _killed(self, rank: int) -> None:
        self._aborted(rank, 128 + SIGKILL, "was killed by SIGKILL before MPI_Init")

    async def command(
        self,
        argv: Any,
        *,
        ranks: list[int],
        sink: Any,
        started: Callable[[Command], None],
        **_rest: Any,
    ) -> None:
        self._number += 1
        command = Command(self._number, ranks, sink, None, 0.0)
        started(command)
        try:
            await trio.sleep_forever()
        finally:
            self.signal(command, SIGKILL)
            if ranks == [1]:  # this one's task is slow to end
                with trio.CancelScope(shield=True):
                    await trio.testing.wait_all_tasks_blocked()


class Ends:
    def __init__(self) -> None:
        self.failures: list[tuple[int, str, str]] = []

    def output(self, rank: int, stream: int, data: bytes) -> None:
        raise AssertionError

    def exited(self, rank: int, code: int, signal: int) -> None:
        raise AssertionError

    def failed(self, rank: int, stage: str, reason: str) -> None:
        self.failures.append((rank, stage, reason))


async def test_ranks_that_the_time_limit_kills_abort_nothing(autojump_clock: object) -> None:
    ends = Ends()
    async with trio.open_nursery() as nursery:
        run = cast("Run", Nodes(nursery))
        code = await run_program(run, Program(["sleep", "1000"], limit_s=0.5), ends)
    assert code == 0
    assert ends.failures == [(0, TIMEOUT, "after 0.5 s"), (1, TIMEOUT, "after 0.5 s")]
