"""karun with the local connector: real agents, as processes of this machine."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from common.errors import Code, KaError
from karun import engine
from karun.agent.setup import ALWAYS
from karun.api import Run
from karun.engine import Limits
from karun.orders import Command, Invocation
from tests.support.karun import Collect
from tests.support.volumes import until


def names(count: int) -> list[str]:
    return [f"n{number}" for number in range(count)]


def numbers(path: Path) -> list[int]:
    return list(map(int, path.read_text().split())) if path.exists() else []


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_every_node_has_its_rank_name_and_the_size() -> None:
    sink = Collect()
    script = 'echo "$KARUN_RANK $KARUN_NODE $KARUN_SIZE $0"; exit $KARUN_RANK'
    async with Run(names(5), "local") as run:
        outcomes = await run.command(["sh", "-c", script, "an 'argument' $HOME\n"], sink=sink)
    assert [outcome.code for outcome in outcomes] == [0, 1, 2, 3, 4]
    for rank in range(5):
        expected = f"{rank} n{rank} 5 an 'argument' $HOME\n\n".encode()
        assert sink.outputs[rank, 1] == expected


async def test_standard_output_and_error_come_whole_and_apart() -> None:
    sink = Collect()
    script = "import os; [os.write(1 + i % 2, b'%07d\\n' % i * 100) for i in range(4000)]"
    async with Run(names(3), "local") as run:
        await run.command([sys.executable, "-I", "-S", "-c", script], sink=sink)
    for rank in range(3):
        for stream in (1, 2):
            expected = b"".join(b"%07d\n" % i * 100 for i in range(stream - 1, 4000, 2))
            assert sink.outputs[rank, stream] == expected


async def test_standard_input_reaches_all_at_the_pace_of_the_slowest() -> None:
    data = os.urandom(3 << 20)
    script = (
        "import os, sys, time, hashlib\n"
        "slow = os.environ['KARUN_RANK'] == '1'\n"
        "sums = hashlib.sha256()\n"
        "while data := os.read(0, 65536):\n"
        "    sums.update(data); time.sleep(0.005 * slow)\n"
        "print(sums.hexdigest())"
    )
    sink = Collect()
    async with Run(names(4), "local") as run:
        await run.command([sys.executable, "-I", "-c", script], sink=sink, stdin=data)
    digest = hashlib.sha256(data).hexdigest().encode() + b"\n"
    assert {sink.outputs[rank, 1] for rank in range(4)} == {digest}


async def test_a_command_that_does_not_read_its_input_ends_all_the_same() -> None:
    async with Run(names(3), "local") as run:
        outcomes = await run.command(["true"], stdin=bytes(3 << 20))
    assert [outcome.exit_code for outcome in outcomes] == [0, 0, 0]


async def test_a_command_begins_with_no_signal_ignored_and_without_input() -> None:
    sink = Collect()
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        async with Run(names(1), "local") as run:
            await run.command(["grep", "SigIgn", "/proc/self/status", "-"], sink=sink)
    finally:
        signal.signal(signal.SIGUSR1, before)
    name, ignored = sink.outputs[0, 1].split()
    assert name == b"/proc/self/status:SigIgn:"
    own_of_libc = 1 << 31 | 1 << 32  # signals 32 and 33, which posix_spawn of glibc ignores
    assert int(ignored, 16) & ~own_of_libc == 0


async def test_a_program_is_looked_for_where_the_commands_own_path_says(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "only-here"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$0"\n')
    program.chmod(0o755)
    async with Run(names(1), "local") as run:
        for path, found in (f"/nowhere:{program.parent}", program), ("bin", "bin/only-here"):
            sink = Collect()
            await run.command(["only-here"], sink=sink, cwd=str(tmp_path), env={"PATH": path})
            assert sink.outputs[0, 1] == f"{found}\n".encode()
        (outcome,) = await run.command(["only-here"])
    assert outcome.exit_code == 127


@pytest.mark.parametrize(
    ("argv", "code"), [(["no-such-program"], 127), (["/etc/passwd"], 126), (["/no/such"], 127)]
)
async def test_what_cannot_be_started_has_the_shells_exit_code(argv: list[str], code: int) -> None:
    sink = Collect()
    async with Run(names(1), "local") as run:
        (outcome,) = await run.command(argv, sink=sink)
    assert outcome.exit_code == code
    assert argv[0].encode() in sink.outputs[0, 2]


async def test_a_directory_that_is_not_there_is_126() -> None:
    async with Run(names(1), "local") as run:
        (outcome,) = await run.command(["true"], cwd="/no/such/directory")
    assert outcome.exit_code == 126


async def test_a_time_limit_ends_the_command_and_its_children_with_124() -> None:
    async with Run(names(2), "local") as run:
        outcomes = await run.command(["sh", "-c", "sleep 1000 & sleep 1000"], limit_s=0.2)
    assert [(one.exit_code, one.stage) for one in outcomes] == [(124, "timeout")] * 2


async def test_a_signal_reaches_the_whole_command_and_is_told() -> None:
    commands: list[Command] = []
    async with Run(names(2), "local") as run:
        await run.launched()

        async def interrupt() -> None:
            run.engine.signal(commands[0], signal.SIGINT)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(interrupt)
            outcomes = await run.command(["sleep", "1000"], started=commands.append)
    assert [(outcome.signal, outcome.exit_code) for outcome in outcomes] == [(2, 130), (2, 130)]


async def test_a_terminal_and_a_working_directory_are_given_on_request(tmp_path: Path) -> None:
    sink = Collect()
    async with Run(names(1), "local") as run:
        await run.command(["sh", "-c", "tty; pwd"], sink=sink, pty=True, cwd=str(tmp_path))
    terminal, directory = sink.outputs[0, 1].split(b"\r\n")[:2]
    assert terminal.startswith(b"/dev/pts/")
    assert directory == bytes(tmp_path)


async def test_commands_on_some_nodes_touch_no_others() -> None:
    sink = Collect()
    async with Run(names(20), "local") as run:
        outcomes = await run.command(["true"], sink=sink, ranks=[3, 17])
    assert [outcome.rank for outcome in outcomes] == [3, 17]
    assert set(sink.told) == {3, 17}


async def test_commands_for_a_few_nodes_do_not_wake_the_others() -> None:
    sink = Collect()
    async with Run(names(8), "local", limits=Limits(ping_s=60.0)) as run:
        await run.command(["sh", "-c", "echo $PPID"], sink=sink)
        idle = int(sink.outputs[7, 1])
        before = wakes(idle)
        for _ in range(20):
            await run.command(["true"], ranks=[0, 1])
        assert wakes(idle) <= before + 1, "it may have gone to sleep after it was looked at"
        (*_, last) = await run.command(["true"])
        assert last.exit_code == 0


def wakes(pid: int) -> int:
    """Return how often a process has begun to wait for something."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


async def test_orders_to_single_nodes_that_say_nothing_become_one_to_all_before_they_are_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "UNHEARD_COUNT_MAX", 2)
    unheard: list[int] = []
    async with Run(names(8), "local") as run:
        for rank in range(8):
            run.engine.command(Invocation(["sleep", "60"]), Collect(), ranks=[rank])
            unheard.append(run.engine.roster.unheard_count)
    assert unheard == [1, 2, 3, 0, 1, 2, 3, 0]


async def test_what_many_are_to_do_is_sent_by_the_tree_and_not_to_each_from_the_head() -> None:
    async with Run(names(9), "local", limits=Limits(tree=ALWAYS, window=2)) as run:
        await run.launched()
        assert len(run.engine._hub.children) < 8
        for ranks, are_alone in ([8], True), ([1, 2, 3], False):
            await run.command(["true"], ranks=ranks)
            audience = run.engine.roster._log[-1][1]
            assert audience == (set(ranks) if are_alone else None)


async def test_leaving_a_run_ends_its_processes(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"echo $$ >> {pids}; exec sleep 1000"
    with trio.move_on_after(20) as scope:
        async with Run(names(3), "local") as run, trio.open_nursery() as nursery:
            nursery.start_soon(run.command, ["sh", "-c", script])
            await until(lambda: len(numbers(pids)) == 3, "the commands to run")
            scope.cancel()
    await until(lambda: not any(map(is_alive, numbers(pids))), "the commands to be gone")


async def test_no_nodes_and_a_node_named_twice_are_refused() -> None:
    for wrong in ([], ["a", "b", "a"]):
        with pytest.raises(KaError) as caught:
            Run(wrong, "local")
        assert caught.value.code is Code.USAGE


@pytest.mark.slow
async def test_a_thousand_nodes_are_launched_and_heard() -> None:
    sink = Collect()
    async with Run(names(1000), "local") as run:
        outcomes = await run.command(["sh", "-c", "echo $KARUN_RANK"], sink=sink)
        second = await run.command(["sh", "-c", "exit 3"])
    assert {outcome.exit_code for outcome in outcomes} == {0}
    assert all(sink.outputs[rank, 1] == b"%d\n" % rank for rank in range(1000))
    assert {outcome.exit_code for outcome in second} == {3}


@pytest.mark.slow
def test_memory_of_the_head_grows_with_distinct_lines_not_with_nodes() -> None:
    few = peak_size("echo", "x")
    many = peak_size("seq", "-f", "%099.0f", "500")  # 50 kB from each node, 50 MB in all
    assert many < few + (16 << 20)


def peak_size(*command: str) -> int:
    """The memory that a head takes at most for a command on a thousand nodes, gathered."""
    words = ["run", "--via", "local", "-w", "n[1-1000]", "-b", "-S", "-n", "--", *command]
    head = subprocess.Popen([sys.executable, "-m", "karun.entry", *words], stdout=subprocess.PIPE)
    assert head.stdout is not None
    with head.stdout as out:
        assert out.read().startswith(b"-" * 15 + b"\nn[1-1000] (1000)\n")
    _pid, status, usage = os.wait4(head.pid, 0)
    head.returncode = status
    assert status == 0
    return usage.ru_maxrss << 10


async def test_an_error_of_the_user_leaves_the_run_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        async with Run(names(2), "local"):
            raise ZeroDivisionError


async def test_an_error_of_a_sink_ends_the_run_and_reaches_the_user() -> None:
    class Full(Collect):
        def output(self, rank: int, stream: int, data: bytes) -> None:
            raise KaError(Code.ENOSPC, "full")

    with pytest.raises(KaError) as caught:
        async with Run(names(2), "local") as run:
            await run.command(["echo", "x"], sink=Full())
    assert caught.value.code is Code.ENOSPC
