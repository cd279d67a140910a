"""karun when relays and connections die in the middle of a run: exactly once, and complete.

Every command appends a line to a file when it starts, and is counted there: once on each node
that lives, whatever happened to the way between it and the head.  KA_KARUN_NODES=200: more nodes.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio

from karun.agent import dialer
from karun.agent.caller import Call
from karun.agent.channel import Channel
from karun.agent.frames import HEAD, PING
from karun.agent.hub import Hub
from karun.agent.setup import ALWAYS, NEVER
from karun.api import Outcome, Run
from karun.engine import Limits
from tests.support.karun import Collect
from tests.support.volumes import until

pytestmark = pytest.mark.slow

NODE_COUNT = int(os.environ.get("KA_KARUN_NODES", "40"))
LIMITS = Limits(tree=ALWAYS, window=2, ping_s=0.5, reattach_s=5.0)
OUTPUT_LINES = 200


@dataclass
class Scene:
    """A command that runs on a tree, waiting for the word to go on."""

    run: Run
    sink: Collect
    started: Path
    opener: int
    """Of the pipe from which each command reads a byte before it goes on."""

    def go_on(self) -> None:
        os.write(self.opener, bytes(NODE_COUNT))

    def starts(self) -> Counter[int]:
        text = self.started.read_text() if self.started.exists() else ""
        return Counter(int(line.split()[0]) for line in text.splitlines())

    def agent(self, rank: int) -> int:
        """The process id of a node's agent."""
        lines = self.started.read_text().splitlines()
        return next(int(agent) for one, agent in map(str.split, lines) if int(one) == rank)

    def relay(self, *, deep: bool = False) -> int:
        """A node that has children; *deep*: and a parent other than the head."""
        parents = self.run.engine.roster.parents
        relays = sorted(set(parents) - {HEAD})
        return next(rank for rank in relays if not deep or parents[rank] != HEAD)

    def below(self, rank: int) -> list[int]:
        return [one for one in self.run.engine.roster.below(rank) if one != rank]


@asynccontextmanager
async def scene(
    directory: Path, results: list[Outcome], limits: Limits = LIMITS
) -> AsyncIterator[Scene]:
    """Start the command on all nodes; when the block ends let it go on, and collect."""
    started, gate = directory / "started", directory / "gate"
    os.mkfifo(gate)
    opener = os.open(gate, os.O_RDWR)
    script = (
        f'echo "$KARUN_RANK $PPID" >> {started}; for i in $(seq {OUTPUT_LINES}); '
        f'do echo "$KARUN_RANK:$i"; done; dd bs=1 count=1 <{gate} >/dev/null 2>&1; '
        'echo "$KARUN_RANK:end"; exit 7'
    )
    names = [f"n{number}" for number in range(NODE_COUNT)]
    sink = Collect()

    async def command(run: Run) -> None:
        results.extend(await run.command(["sh", "-c", script], sink=sink))

    async with Run(names, "local", limits=limits) as run, trio.open_nursery() as nursery:
        nursery.start_soon(command, run)
        await run.launched()
        the = Scene(run, sink, started, opener)
        await until(lambda: len(the.starts()) == NODE_COUNT, "every node to start")
        yield the
        the.go_on()
    os.close(opener)
    assert set(the.starts().values()) == {1}


def check(results: list[Outcome], sink: Collect, dead: set[int]) -> None:
    """Every living node: its code and its whole output, once.  Every dead one: named."""
    assert {one.rank for one in results if one.reason is not None} == dead
    for one in results:
        assert sink.told[one.rank] == 1
        if one.rank not in dead:
            assert one.code == 7
            lines = sink.outputs[one.rank, 1].decode().split()
            expected = [f"{one.rank}:{number}" for number in range(1, OUTPUT_LINES + 1)]
            assert lines == [*expected, f"{one.rank}:end"]


async def test_a_relay_that_is_killed_costs_itself_only(tmp_path: Path) -> None:
    results: list[Outcome] = []
    async with scene(tmp_path, results) as the:
        rank = the.relay()
        below = the.below(rank)
        os.kill(the.agent(rank), signal.SIGKILL)
        await until(attached_elsewhere(the, below, rank), "the orphans to come back")
    assert below
    check(results, the.sink, {rank})
    assert "lost" in str(results[rank].reason)


async def test_two_relays_in_one_line_that_are_killed_cost_themselves_only(tmp_path: Path) -> None:
    results: list[Outcome] = []
    async with scene(tmp_path, results) as the:
        lower = the.relay(deep=True)
        upper = the.run.engine.roster.parents[lower]
        below = [rank for rank in the.below(upper) if rank != lower]
        for rank in (upper, lower):
            os.kill(the.agent(rank), signal.SIGKILL)
        await until(attached_elsewhere(the, below, upper, lower), "the orphans to come back")
    check(results, the.sink, {upper, lower})


async def test_a_relay_that_is_stopped_costs_itself_only(tmp_path: Path) -> None:
    results: list[Outcome] = []
    async with scene(tmp_path, results) as the:
        rank = the.relay()
        below = the.below(rank)
        os.kill(the.agent(rank), signal.SIGSTOP)
        try:
            await until(attached_elsewhere(the, below, rank), "the orphans to come back")
            the.go_on()
            await until(lambda: len(the.sink.told) == NODE_COUNT, "all to be told")
        finally:
            os.kill(the.agent(rank), signal.SIGKILL)
    check(results, the.sink, {rank})


async def test_a_relay_that_wakes_up_again_is_a_node_like_others(tmp_path: Path) -> None:
    results: list[Outcome] = []
    async with scene(tmp_path, results) as the:
        rank = the.relay()
        below = the.below(rank)
        os.kill(the.agent(rank), signal.SIGSTOP)
        try:
            await until(attached_elsewhere(the, below, rank), "the orphans to come back")
        finally:
            os.kill(the.agent(rank), signal.SIGCONT)
    check(results, the.sink, set())


async def test_all_connections_of_the_head_can_be_cut(tmp_path: Path) -> None:
    results: list[Outcome] = []
    async with scene(tmp_path, results) as the:
        hub = the.run.engine._hub
        cut = list(hub.children)
        for channel in cut:
            channel.close("cut")
        await until(lambda: hub.children and not hub.children & set(cut), "the nodes to return")
    check(results, the.sink, set())


async def test_nodes_that_move_in_the_middle_of_a_run_lose_and_repeat_nothing(
    tmp_path: Path,
) -> None:
    results: list[Outcome] = []
    patient = replace(LIMITS, ping_s=60.0)  # no way is left because nothing is heard on it
    async with scene(tmp_path, results, patient) as the:
        parents = list(the.run.engine.roster.parents)
        assert await the.run.move() == []
        assert the.run.engine.roster.parents == parents
        await until(lambda: len(the.run.engine._hub.children) == parents.count(HEAD),
                    "the former ways to be left")  # fmt: skip
    check(results, the.sink, set())


async def test_nodes_move_while_nobody_takes_what_they_say() -> None:
    """Relays have stopped to read from below, and go on when the head reads again."""
    names = [f"n{number}" for number in range(NODE_COUNT)]
    size = 1 << 20
    sink = Collect()
    results: list[Outcome] = []

    async def command(run: Run) -> None:
        results.extend(await run.command(["head", "-c", str(size), "/dev/zero"], sink=sink))

    async with Run(names, "local", limits=replace(LIMITS, ping_s=60.0)) as run:
        await run.launched()
        run.engine.pause(True)
        with trio.fail_after(240):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(command, run)
                await trio.sleep(2.0)  # until all that may be full is full
                run.engine.move()
                await trio.sleep(1.0)
                run.engine.pause(False)
        assert run.engine.indirect() == []
    assert {one.code for one in results} == {0}
    assert {len(data) for data in sink.outputs.values()} == {size}
    assert len(sink.outputs) == NODE_COUNT


async def test_a_relay_that_dies_while_nodes_move_costs_itself_only(tmp_path: Path) -> None:
    results: list[Outcome] = []
    async with scene(tmp_path, results) as the:
        rank = the.relay()
        below = the.below(rank)
        the.run.engine.move()
        os.kill(the.agent(rank), signal.SIGKILL)
        await until(attached_elsewhere(the, below, rank), "the orphans to come back")
    check(results, the.sink, {rank})


async def test_connections_that_are_cut_while_nodes_move_cost_nothing(tmp_path: Path) -> None:
    """The former ones, those that have just come, or both."""
    results: list[Outcome] = []
    async with scene(tmp_path, results) as the:
        hub = the.run.engine._hub
        the.run.engine.move()
        for _ in range(20):
            await trio.sleep(0.01)
            for channel in list(hub.children)[::3]:
                channel.close("cut")
        await until(lambda: not the.run.engine.indirect(), "all to have moved")
    check(results, the.sink, set())


async def test_a_head_that_stood_still_has_all_its_nodes_back() -> None:
    """Those that had just been set up too; as when the machine had no time for it."""
    count = 400
    limits = Limits(tree=NEVER, ping_s=0.5, reattach_s=4.0)
    async with Run([f"n{number}" for number in range(count)], "local", limits=limits) as run:
        hub = run.engine._hub
        await until(lambda: len(hub.children) > count // 2, "half of the nodes to be there")
        connected = set(hub.children)
        time.sleep(5.0)  # noqa: ASYNC251 - nothing of this process is to go on
        results = await run.command(["true"])
        assert connected - hub.children
    assert [one.reason for one in results if one.reason is not None] == []


async def test_a_node_that_left_before_it_was_heard_outlives_the_call_that_started_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The call's deadline, or a second one, would end it."""
    monkeypatch.setattr(dialer, "AGENT_S", 4.0)
    monkeypatch.setattr(dialer, "READY_GUESS_S", 0.1)
    connected = Hub.connected
    limits = Limits(tree=NEVER, ping_s=0.25)

    def then_stand_still(hub: Hub, call: Call, channel: Channel, early: bytes) -> None:
        connected(hub, call, channel, early)
        time.sleep(8 * limits.ping_s)  # by now it dials
        channel.send(PING, 0)
        assert not channel.open

    monkeypatch.setattr(Hub, "connected", then_stand_still)
    async with Run(["n0"], "local", limits=limits) as run:
        [result] = await run.command(["sleep", "4"])
    assert result.reason is None


async def test_connections_can_be_cut_while_nodes_write(tmp_path: Path) -> None:
    """Again and again, in the middle of frames: what is lost on the way is told again."""
    sink = Collect()
    script = 'i=0; while [ $i -lt 20000 ]; do echo "$KARUN_RANK:$i"; i=$((i+1)); done'
    async with Run([f"n{number}" for number in range(9)], "local", limits=LIMITS) as run:
        hub = run.engine._hub

        async def cut() -> None:
            for _ in range(4):
                await trio.sleep(0.15)
                for channel in list(hub.children):
                    channel.close("cut")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut)
            results = await run.command(["sh", "-c", script], sink=sink)
            nursery.cancel_scope.cancel()
    for rank in range(9):
        assert results[rank].exit_code == 0
        expected = "".join(f"{rank}:{number}\n" for number in range(20000))
        assert sink.outputs[rank, 1].decode() == expected


async def test_commands_for_some_and_for_all_run_once_while_connections_are_cut() -> None:
    """What is ordered of a few goes to them alone, through relays too; others miss nothing."""
    count = 9
    limits = Limits(tree=ALWAYS, window=2, ping_s=0.5, reattach_s=6.0)
    async with Run([f"n{number}" for number in range(count)], "local", limits=limits) as run:
        hub = run.engine._hub

        async def cut() -> None:
            while True:
                await trio.sleep(0.1)
                for channel in list(hub.children):
                    channel.close("cut")
                    await trio.sleep(0.05)

        async def check(turn: int, ranks: list[int]) -> None:
            sink = Collect()
            word = f"{turn}\n".encode()
            results = await run.command(["cat"], sink=sink, ranks=ranks, stdin=word)
            assert [one.exit_code for one in results] == [0] * len(ranks)
            assert sink.outputs == {(rank, 1): word for rank in ranks}

        async with trio.open_nursery() as cutting:
            cutting.start_soon(cut)
            async with trio.open_nursery() as nursery:
                for turn in range(60):
                    alone = [[turn % count], [0, 8], list(range(count))][turn % 3]
                    nursery.start_soon(check, turn, alone)
                    await trio.sleep(0.03)
            cutting.cancel_scope.cancel()


async def test_nodes_end_their_commands_when_the_head_is_gone_for_good(tmp_path: Path) -> None:
    results: list[Outcome] = []
    limits = Limits(tree=ALWAYS, window=2, ping_s=1.0, reattach_s=2.0)
    with trio.CancelScope() as scope:
        async with scene(tmp_path, results, limits) as the:
            pids = [the.agent(rank) for rank in range(NODE_COUNT)]
            the.run.engine.quit = lambda: None  # type: ignore[method-assign]
            the.run.engine.close()  # as when the head is killed: no word, all connections gone
            scope.cancel()
    await until(lambda: not any(map(runs, pids)), "the agents to end")


def attached_elsewhere(the: Scene, ranks: list[int], *dead: int) -> Callable[[], bool]:
    roster = the.run.engine.roster
    return lambda: all(
        roster.states[rank].name == "JOINED" and roster.parents[rank] not in dead for rank in ranks
    )


def runs(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
