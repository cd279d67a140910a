"""Commands, copies and gathers as root, by a real sudo, on nodes where the login is `nobody`.

Each agent has a mount namespace of its own, in which /etc/sudoers is the test's: nothing of the
machine's is changed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from common.broadcast.topology import Kind
from karun.api import Copied, CopyOptions, Run
from karun.connectors import Connector
from tests.support.copies import process_writing, random_file
from tests.support.karun import Collect, Shell, is_running
from tests.support.volumes import until

PROGRAMS = ("sudo", "unshare", "setpriv")
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="changes users: needs root"),
    pytest.mark.skipif(
        any(shutil.which(program) is None for program in PROGRAMS), reason=f"needs {PROGRAMS}"
    ),
]
MAY = "nobody ALL=(ALL) NOPASSWD: ALL\nDefaults use_pty, env_reset\n"
ASKED = "nobody ALL=(ALL) ALL\n"
PASSWORD = "sudo asks for a password: allow it without one (NOPASSWD), or log in as root"
SIZES = pytest.mark.parametrize("size", [5000, 3 << 20], ids=["small", "large"])
SLOWLY = CopyOptions(
    sudo=True, ride_size_max=0, rate_limit=4e6, topology=Kind.CHAIN, chunk_size=64 << 10
)


@pytest.fixture
def home() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="karun-home-"))
    os.chown(path, 65534, 65534)
    yield path
    shutil.rmtree(path)


def nobody(home: Path, sudoers: str, *, path: str = os.defpath) -> Connector:
    """Local agents that belong to `nobody`, whom this sudoers file is for."""
    rules = home / "sudoers"
    rules.write_text(sudoers)
    rules.chmod(0o440)
    script = (
        f"mount --bind {rules} /etc/sudoers && exec setpriv --reuid=nobody --regid=nogroup"
        f' --clear-groups env HOME={home} PATH={path} LANG=C.UTF-8 "$@"'
    )
    argv = ("unshare", "-m", "sh", "-c", script, "sh")
    return Connector("local", argv, lined=False, python="/usr/bin/python3", onehost=True)


def names(count: int) -> list[str]:
    return [f"n{number}" for number in range(1, count + 1)]


def reasons(results: list[Copied]) -> list[str | None]:
    return [result.reason for result in results]


# ------------------------------------------------------------ what root may


@SIZES
async def test_a_copy_by_sudo_arrives_where_the_login_may_not_write(
    tmp_path: Path, home: Path, size: int
) -> None:
    data = random_file(tmp_path / "source", size)
    os.chown(tmp_path / "source", 1234, 4321)
    options = CopyOptions(ride_size_max=64 << 10)
    by_sudo = CopyOptions(ride_size_max=64 << 10, sudo=True)
    source, target = str(tmp_path / "source"), f"{tmp_path}/%h"
    async with Run(names(3), nobody(home, MAY)) as run:
        without = await run.copy([source], target, options=options)
        with_sudo = await run.copy([source], target, options=by_sudo)
    assert all("Permission denied" in str(reason) for reason in reasons(without))
    assert reasons(with_sudo) == [None] * 3
    for node in names(3):
        assert (tmp_path / node).read_bytes() == data
        assert (tmp_path / node).stat().st_uid == 1234
        assert (tmp_path / node).stat().st_gid == 4321


@SIZES
async def test_a_gather_by_sudo_reads_what_the_login_may_not(
    tmp_path: Path, home: Path, size: int
) -> None:
    data = random_file(tmp_path / "source", size)
    (tmp_path / "source").chmod(0o600)
    async with Run(names(3), nobody(home, MAY)) as run:
        without = await run.gather(f"{tmp_path}/source", str(tmp_path / "all"))
        with_sudo = await run.gather(f"{tmp_path}/source", str(tmp_path / "all"), sudo=True)
    assert all("Permission denied" in str(reason) for reason in reasons(without))
    assert reasons(with_sudo) == [None] * 3
    assert {(tmp_path / "all" / node).read_bytes() for node in names(3)} == {data}


async def test_a_command_of_a_copy_runs_as_root_and_knows_its_node(
    tmp_path: Path, home: Path
) -> None:
    (tmp_path / "source").write_bytes(b"x" * 1000)
    line = "echo $KARUN_NODE $(id -u) $(wc -c)"
    printed: list[bytes] = []
    async with Run(names(2), nobody(home, MAY)) as run:
        results = await run.copy(
            [str(tmp_path / "source")], "", options=CopyOptions(command=line, sudo=True),
            on_output=lambda _rank, words: printed.append(words),
        )  # fmt: skip
    assert reasons(results) == [None] * 2
    assert sorted(printed) == [b"n1 0 1000\n", b"n2 0 1000\n"]


async def test_input_of_a_task_is_told_as_taken_but_for_what_the_agent_adds(home: Path) -> None:
    async with Run(names(2), nobody(home, MAY)) as run:
        sink = Collect()
        outcomes = await run.command(["id", "-u"], sudo=True, sink=sink)
        words = ["watch", "1", "2"]
        watched = await run.command(words, task=True, sudo=True, sink=(counters := Collect()))
        # More than the window of a feed: it would stand still if the count were wrong.
        (taken, _) = await run.command(["place"], task=True, sudo=True, stdin=bytes(5 << 20))
    assert [one.exit_code for one in (*outcomes, *watched)] == [0] * 4
    assert {sink.outputs[rank, 1] for rank in range(2)} == {b"0\n"}
    assert {counters.outputs[rank, 1].count(b"\n") for rank in range(2)} == {2}
    assert taken.code == 1


async def test_root_needs_no_sudo(tmp_path: Path) -> None:
    data = random_file(tmp_path / "source", 5000)
    plain = Run(["x"], "local").connector
    argv = ("env", f"PATH={tmp_path}")
    connector = Connector("local", argv, lined=False, python=plain.python, onehost=True)
    async with Run(names(1), connector) as run:
        results = await run.copy(
            [str(tmp_path / "source")], f"{tmp_path}/%h", options=CopyOptions(sudo=True)
        )
    assert reasons(results) == [None]
    assert (tmp_path / "n1").read_bytes() == data


# ------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("sudoers", "path", "reason"),
    [
        (ASKED, os.defpath, PASSWORD),
        ("", os.defpath, PASSWORD),
        (MAY, "/nonexistent", "no sudo on the node: install it, or log in as root"),
    ],
    ids=["asked", "stranger", "none"],
)
async def test_a_refusal_of_sudo_is_one_line_for_each_way(
    tmp_path: Path, home: Path, sudoers: str, path: str, reason: str
) -> None:
    random_file(tmp_path / "source", 5000)
    async with Run(names(2), nobody(home, sudoers, path=path)) as run:
        for ride_size_max in (0, 10_000):
            options = CopyOptions(sudo=True, ride_size_max=ride_size_max)
            results = await run.copy([str(tmp_path / "source")], f"{tmp_path}/%h", options=options)
            assert reasons(results) == [reason] * 2
        results = await run.gather("/etc/shadow", str(tmp_path / "all"), sudo=True)
        assert reasons(results) == [reason] * 2


# ------------------------------------------------------------ the end


async def test_a_cancelled_copy_leaves_no_process_of_roots(tmp_path: Path, home: Path) -> None:
    random_file(tmp_path / "source", 12 << 20)
    async with Run(names(2), nobody(home, MAY)) as run:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                lambda: run.copy([str(tmp_path / "source")], f"{tmp_path}/%h", options=SLOWLY)
            )
            await until(lambda: process_writing(tmp_path, "n2"), "the copy")
            pids = [str(process_writing(tmp_path, node)) for node in names(2)]
            nursery.cancel_scope.cancel()
        await until(lambda: not any(map(is_running, pids)), "its processes to end")


@pytest.mark.parametrize("end", ["time limit", "left", "left on a terminal", "agents killed"])
async def test_a_command_of_roots_ends_with_its_run(tmp_path: Path, home: Path, end: str) -> None:
    script = f"echo $$ $SUDO_USER >> {tmp_path}/pids; exec sleep 1000"
    pids = tmp_path / "pids"

    def found() -> list[str]:
        return pids.read_text().split()[::2] if pids.exists() else []

    async with Run(names(2), nobody(home, MAY)) as run:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                limit_s = 1.0 if end == "time limit" else 0.0
                pty = end == "left on a terminal"
                words = ["sh", "-c", script]
                nursery.start_soon(lambda: run.command(words, sudo=True, limit_s=limit_s, pty=pty))
                await until(lambda: len(found()) == 2, "the commands")
                assert all(map(is_running, found()))
                if end == "agents killed":
                    await trio.sleep(0.1)  # by then the keeper knows of them
                    for pid in found():
                        os.kill(agent_of(int(pid)), signal.SIGKILL)
                if end in ("time limit", "agents killed"):
                    await until(lambda: not any(map(is_running, found())), "their end")
                scope.cancel()
    await until(lambda: not any(map(is_running, found())), "their end")


async def test_a_command_that_alone_is_allowed_ends_with_its_run(home: Path) -> None:
    seconds = "31557600.125"  # by which it is known
    sleeping = ["pgrep", "-x", "-f", f"/usr/bin/sleep {seconds}"]

    def count() -> int:
        return len(subprocess.run(sleeping, capture_output=True, check=False).stdout.split())

    sudoers = "nobody ALL=(ALL) NOPASSWD: /usr/bin/sleep\n"
    async with Run(names(2), nobody(home, sudoers)) as run, trio.open_nursery() as nursery:
        nursery.start_soon(lambda: run.command(["/usr/bin/sleep", seconds], sudo=True))
        await until(lambda: count() == 2, "the commands")
        nursery.cancel_scope.cancel()
    await until(lambda: count() == 0, "their end")


def agent_of(pid: int) -> int:
    """The command's parent is sudo, whose parent is the agent."""
    for _ in range(2):
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid


def test_the_command_line_says_it_once_for_all_nodes(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    done = shell("copy", "--sudo", "--via", "local", "-w", "n[1-2]", "/etc/hostname",
                 f"{tmp_path}/%h")  # fmt: skip
    assert (done.returncode, done.stderr.count(b"\n")) == (0, 1)
    done = shell("gather", "--sudo", "--via", "local", "-w", "n[1-2]", "/etc/hostname",
                 str(tmp_path / "all"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    subprocess.run(["cmp", tmp_path / "n1", tmp_path / "all/n2"], check=True)
