"""Laws of `karun copy`, with real agents and real broadcasts: everybody has it, or says why not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from bench.netlab import NetLab
from bench.sshd import Sshd, addresses
from common.broadcast.topology import Kind
from common.errors import Code, KaError
from common.greeting import introduce
from common.session import Identity
from common.sockets import connect_tcp
from karun import api
from karun.api import Copied, CopyOptions, Run, Step
from karun.connectors import Connector, local
from karun.copied import exit_code, report
from karun.engine import Limits
from karun.nodes import Names
from tests.support.copies import ended, listening_port, random_file, under_way

BROADCAST = CopyOptions(ride_size_max=0)
SLOWLY = CopyOptions(ride_size_max=0, rate_limit=4e6, topology=Kind.CHAIN, chunk_size=64 << 10)
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs: needs root")


def names(count: int) -> list[str]:
    return [f"n{number}" for number in range(1, count + 1)]


async def copy(
    nodes: list[str], sources: list[Path], destination: str, options: CopyOptions = BROADCAST
) -> list[Copied]:
    async with Run(nodes, "local") as run:
        return await run.copy([str(one) for one in sources], destination, options=options)


def check(tmp_path: Path, nodes: list[str], data: bytes, *without: str) -> None:
    for node in nodes:
        path = tmp_path / node
        if node in without:
            assert not path.exists()
        else:
            assert path.read_bytes() == data


def reasons(results: list[Copied]) -> dict[str, str]:
    return {result.node: result.reason for result in results if result.reason is not None}


# ------------------------------------------------------------ what arrives


@pytest.mark.parametrize("options", [CopyOptions(), BROADCAST], ids=["riding", "broadcast"])
async def test_content_permissions_and_times_arrive(tmp_path: Path, options: CopyOptions) -> None:
    data = random_file(tmp_path / "source", 10_000)
    (tmp_path / "source").chmod(0o4751)
    os.utime(tmp_path / "source", ns=(1, 1_234_567_890_123_456_789))
    results = await copy(names(4), [tmp_path / "source"], f"{tmp_path}/%h", options)
    assert exit_code(results) == 0, reasons(results)
    check(tmp_path, names(4), data)
    status = (tmp_path / "n3").stat()
    assert status.st_mode & 0o7777 == 0o4751
    assert status.st_mtime_ns == 1_234_567_890_123_456_789


@pytest.mark.parametrize("kind", [Kind.FLAT, Kind.CHAIN, Kind.BINARY, Kind.STRIPES, Kind.MULTICAST])
async def test_every_topology_brings_every_byte(tmp_path: Path, kind: Kind) -> None:
    data = random_file(tmp_path / "source", 3_000_017)
    options = CopyOptions(topology=kind, chunk_size=128 << 10, rack_size=2)
    results = await copy(names(5), [tmp_path / "source"], f"{tmp_path}/%h", options)
    assert exit_code(results) == 0, reasons(results)
    check(tmp_path, names(5), data)


@pytest.mark.parametrize("options", [CopyOptions(), BROADCAST], ids=["riding", "broadcast"])
async def test_several_sources_go_into_a_directory(tmp_path: Path, options: CopyOptions) -> None:
    first, second = random_file(tmp_path / "a", 1000), random_file(tmp_path / "b", 2000)
    for node in names(3):
        (tmp_path / node).mkdir()
    sources = [tmp_path / "a", tmp_path / "b"]
    results = await copy(names(3), sources, f"{tmp_path}/%h", options)
    assert exit_code(results) == 0, reasons(results)
    for node in names(3):
        assert (tmp_path / node / "a").read_bytes() == first
        assert (tmp_path / node / "b").read_bytes() == second


@pytest.mark.parametrize("options", [CopyOptions(), BROADCAST], ids=["riding", "broadcast"])
async def test_an_empty_file_is_a_file(tmp_path: Path, options: CopyOptions) -> None:
    random_file(tmp_path / "source", 0)
    results = await copy(names(2), [tmp_path / "source"], f"{tmp_path}/%h", options)
    assert exit_code(results) == 0, reasons(results)
    check(tmp_path, names(2), b"")


async def test_an_unchanged_tree_stays_where_it_is(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "below").mkdir(parents=True)
    random_file(tree / "file", 300_000)
    os.link(tree / "file", tree / "below/hard")
    os.symlink("file", tree / "soft")
    with (tree / "sparse").open("wb") as file:
        file.truncate(10 << 20)
    os.setxattr(tree / "file", b"user.of", b"the tree")
    for node in names(2):
        (tmp_path / node).mkdir()
    steps: list[Step] = []
    async with Run(names(2), "local") as run:
        for _ in range(2):
            results = await run.copy([str(tree)], f"{tmp_path}/%h/", on_progress=steps.append)
            assert exit_code(results) == 0, reasons(results)
            if not (tmp_path / "inode").exists():
                first_inode = (tmp_path / "n2/tree/file").stat().st_ino
                (tmp_path / "inode").touch()
                assert max(step.sent_size for step in steps) >= 300_000
                steps.clear()
    copied = tmp_path / "n2/tree"
    assert max((step.sent_size for step in steps), default=0) == 0
    assert (copied / "file").stat().st_ino == first_inode == (copied / "below/hard").stat().st_ino
    assert (copied / "file").read_bytes() == (tree / "file").read_bytes()
    assert os.readlink(copied / "soft") == "file"
    assert (copied / "sparse").stat().st_blocks == 0
    assert os.getxattr(copied / "file", b"user.of") == b"the tree"
    assert (copied / "below").stat().st_mtime_ns == (tree / "below").stat().st_mtime_ns


async def test_a_command_is_fed_and_its_verdict_counts(tmp_path: Path) -> None:
    data = random_file(tmp_path / "source", 500_000)
    line = f'cat > {tmp_path}/$KARUN_NODE; echo "$KARUN_NODE has it"; [ $KARUN_NODE != n2 ]'
    printed: list[tuple[int, bytes]] = []
    async with Run(names(3), "local") as run:
        results = await run.copy(
            [str(tmp_path / "source")], "", options=CopyOptions(command=line),
            on_output=lambda rank, words: printed.append((rank, words)),
        )  # fmt: skip
    assert reasons(results) == {"n2": "/bin/sh ended with 1"}
    check(tmp_path, names(3), data)
    assert (0, b"n1 has it\n") in printed


# ------------------------------------------------------------ faults


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", ["n1", "n3", "n5"])
async def test_a_lost_process_costs_its_node_only(
    tmp_path: Path, victim: str, number: signal.Signals
) -> None:
    data = random_file(tmp_path / "source", 6 << 20)
    results: list[Copied] = []
    async with trio.open_nursery() as nursery:

        async def begin() -> None:
            results.extend(await copy(names(5), [tmp_path / "source"], f"{tmp_path}/%h", SLOWLY))

        nursery.start_soon(begin)
        pid = await under_way(tmp_path, victim)
        os.kill(pid, number)
    assert exit_code(results) == 2
    assert list(reasons(results)) == [victim]
    check(tmp_path, names(5), data, victim)
    await ended(pid)
    if number == signal.SIGKILL:
        assert reasons(results)[victim] == "its process was ended by signal 9"


async def test_what_an_interrupted_copy_left_does_not_travel_again(tmp_path: Path) -> None:
    data = random_file(tmp_path / "source", 6 << 20)
    steps: list[Step] = []
    async with Run(names(3), "local") as run:
        with trio.CancelScope() as scope:

            def told(step: Step) -> None:
                if step.total_size > 3 * (2 << 20):
                    scope.cancel()

            await run.copy(
                [str(tmp_path / "source")], f"{tmp_path}/%h", options=SLOWLY, on_progress=told
            )
        assert scope.cancelled_caught
        check(tmp_path, names(3), data, *names(3))
        results = await run.copy(
            [str(tmp_path / "source")], f"{tmp_path}/%h",
            options=SLOWLY, on_progress=steps.append,
        )  # fmt: skip
    assert exit_code(results) == 0, reasons(results)
    check(tmp_path, names(3), data)
    assert steps[-1].sent_size <= 4 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(path)], check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)


@ROOT_ONLY
@pytest.mark.parametrize("victim", ["n1", "n2", "n3"])
async def test_a_full_disk_costs_its_node_only(
    tmp_path: Path, small_disk: Path, victim: str
) -> None:
    data = random_file(tmp_path / "source", 3 << 20)
    for node in names(3):
        (tmp_path / node).mkdir() if node != victim else (tmp_path / node).symlink_to(small_disk)
    results = await copy(names(3), [tmp_path / "source"], f"{tmp_path}/%h/copy")
    assert exit_code(results) == 2
    assert list(reasons(results)) == [victim]
    assert "No space left on device" in reasons(results)[victim]
    check(tmp_path, [f"{node}/copy" for node in names(3)], data, f"{victim}/copy")


@pytest.mark.parametrize("options", [CopyOptions(), BROADCAST], ids=["riding", "broadcast"])
async def test_nodes_that_cannot_write_are_named_together(
    tmp_path: Path, options: CopyOptions
) -> None:
    data = random_file(tmp_path / "source", 5000)
    (tmp_path / "n2").mkdir()
    results = await copy(names(4), [tmp_path / "source"], f"{tmp_path}/%h/x", options)
    assert exit_code(results) == 2
    assert reasons(results)["n1"].endswith("n1/x: No such file or directory")
    assert (tmp_path / "n2/x").read_bytes() == data
    results = await copy(names(4), [tmp_path / "source"], f"{tmp_path}/none/x", options)
    assert exit_code(results) == 1
    assert report(results, Names(names(4))) == [
        f"n[1-4]: cannot write {tmp_path}/none/x: No such file or directory"
    ]


async def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    random_file(tmp_path / "source", 50)
    os.mkfifo(tmp_path / "fifo")
    for options in (CopyOptions(), BROADCAST):
        results = await copy(names(1), [tmp_path / "source"], f"{tmp_path}/fifo", options)
        assert "is neither a file nor a directory" in reasons(results)["n1"]
    assert (tmp_path / "fifo").is_fifo()


async def test_a_missing_source_is_an_error_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(KaError, match=r"cannot read .*nothing: No such file") as caught:
        await copy(names(2), [tmp_path / "nothing"], f"{tmp_path}/%h")
    assert caught.value.code is Code.ENOENT


async def test_a_name_that_would_leave_the_directory_is_refused(tmp_path: Path) -> None:
    random_file(tmp_path / "source", 5)
    for node in ("..", "a/b"):
        with pytest.raises(KaError, match="would leave the directory"):
            await copy([node], [tmp_path / "source"], f"{tmp_path}/below/%h")


async def test_a_source_that_changes_meanwhile_is_nobodys(tmp_path: Path) -> None:
    random_file(tmp_path / "source", 6 << 20)

    async def spoil() -> None:
        await under_way(tmp_path, "n2")
        random_file(tmp_path / "source", 6 << 20)

    failures: list[KaError] = []
    async with Run(names(2), "local") as run, trio.open_nursery() as nursery:
        nursery.start_soon(spoil)
        try:
            await run.copy([str(tmp_path / "source")], f"{tmp_path}/%h", options=SLOWLY)
        except KaError as error:
            failures.append(error)
    assert "the source was changed" in str(failures[0])
    check(tmp_path, names(2), b"", *names(2))


async def test_who_does_not_hold_the_token_is_turned_away(tmp_path: Path) -> None:
    data = random_file(tmp_path / "source", 4 << 20)
    results: list[Copied] = []
    async with trio.open_nursery() as nursery:

        async def begin() -> None:
            results.extend(await copy(names(2), [tmp_path / "source"], f"{tmp_path}/%h", SLOWLY))

        nursery.start_soon(begin)
        port = listening_port(await under_way(tmp_path, "n2"))
        stranger = Identity("00" * 16, "hop", "1", b"i" * 16)
        with await connect_tcp(f"127.0.0.1:{port}") as sock, pytest.raises(KaError):
            await introduce(sock, stranger, b"not the token at all, is it now?", 1)
    assert exit_code(results) == 0, reasons(results)
    check(tmp_path, names(2), data)


async def test_a_damaged_parcel_is_put_nowhere(tmp_path: Path) -> None:
    async with Run(names(1), "local") as run:
        for parcel in (b"", b"x" * 100):
            (outcome,) = await run.command(["place"], task=True, stdin=parcel)
            assert outcome.code == 1


async def test_there_are_no_other_tasks(tmp_path: Path) -> None:
    async with Run(names(1), "local") as run:
        (outcome,) = await run.command(["os"], task=True)
    assert outcome.code == 127


# ------------------------------------------------------------ who comes late


def tardy(node: str, until: Path) -> Connector:
    """Local processes, of which one does not begin before a file is there."""
    plain = local(api.connector("local").python)
    script = f'[ %h = {node} ] && until [ -e {until} ]; do sleep 0.05; done; exec "$@"'
    return Connector("local", ("sh", "-c", script, "sh"), False, plain.python, onehost=True)


async def test_a_late_node_delays_nobody_and_is_served_as_well(tmp_path: Path) -> None:
    data = random_file(tmp_path / "source", 200_000)
    async with Run(names(3), tardy("n2", tmp_path / "n3")) as run:
        results = await run.copy([str(tmp_path / "source")], f"{tmp_path}/%h", options=BROADCAST)
    assert exit_code(results) == 0, reasons(results)
    check(tmp_path, names(3), data)


async def test_a_node_that_never_comes_is_one_of_those_without(tmp_path: Path) -> None:
    data = random_file(tmp_path / "source", 200_000)
    limits = Limits(connect_s=2.0, login_s=1.0)
    async with Run(names(3), tardy("n1", tmp_path / "never"), limits=limits) as run:
        results = await run.copy([str(tmp_path / "source")], f"{tmp_path}/%h", options=BROADCAST)
    assert exit_code(results) == 2
    assert "timeout" in reasons(results)["n1"]
    check(tmp_path, names(3), data, "n1")


def booting(node: str, until: Path) -> Connector:
    """Local processes, of which one cannot be reached before a file is there."""
    plain = local(api.connector("local").python)
    refusal = "echo ssh: connect to host %h port 22: Connection refused >&2; exit 255"
    script = f'[ %h = {node} ] && ! [ -e {until} ] && {{ {refusal}; }}; exec "$@"'
    return Connector("local", ("sh", "-c", script, "sh"), False, plain.python, onehost=True)


@pytest.mark.parametrize("options", [CopyOptions(), BROADCAST], ids=["riding", "broadcast"])
async def test_a_node_that_boots_during_the_copy_is_called_again_and_gets_everything(
    tmp_path: Path, options: CopyOptions
) -> None:
    data = random_file(tmp_path / "source", 200_000)
    limits = Limits(late_s=60.0)
    async with Run(names(3), booting("n2", tmp_path / "n3"), limits=limits) as run:
        results = await run.copy([str(tmp_path / "source")], f"{tmp_path}/%h", options=options)
    assert exit_code(results) == 0, reasons(results)
    check(tmp_path, names(3), data)
    assert [result.node for result in results if "reached only after" in result.note] == ["n2"]


async def test_who_has_not_come_when_the_patience_is_over_is_named(tmp_path: Path) -> None:
    data = random_file(tmp_path / "source", 200_000)
    limits = Limits(late_s=3.0)
    async with Run(names(3), booting("n1", tmp_path / "never"), limits=limits) as run:
        results = await run.copy([str(tmp_path / "source")], f"{tmp_path}/%h", options=BROADCAST)
    assert reasons(results) == {"n1": "connection refused (for 3 s)"}
    check(tmp_path, names(3), data, "n1")


# ------------------------------------------------------------ ssh, and many


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    try:
        with Sshd(tmp_path_factory.mktemp("sshd")) as running:
            yield running
    except KaError as error:
        pytest.skip(str(error))


def over_ssh(sshd: Sshd, count: int) -> Run:
    connector = api.connector("ssh", ssh_config=str(sshd.config), connect_s=60.0)
    return Run(addresses(count), connector, limits=Limits(connect_s=60.0))


async def test_nodes_reached_by_ssh_feed_each_other(tmp_path: Path, sshd: Sshd) -> None:
    data = random_file(tmp_path / "source", 5_000_000)
    few = random_file(tmp_path / "small", 1000)
    options = CopyOptions(topology=Kind.CHAIN, address="127.0.0.1")
    async with over_ssh(sshd, 6) as run:
        small = await run.copy([str(tmp_path / "small")], f"{tmp_path}/small-%h")
        large = await run.copy([str(tmp_path / "source")], f"{tmp_path}/%h", options=options)
    assert reasons(small) == reasons(large) == {}
    check(tmp_path, addresses(6), data)
    assert (tmp_path / f"small-{addresses(6)[5]}").read_bytes() == few


async def test_nodes_whose_ssh_server_starts_later_are_waited_for(tmp_path: Path) -> None:
    data = random_file(tmp_path / "source", 200_000)
    (tmp_path / "sshd").mkdir()
    try:
        server = Sshd(tmp_path / "sshd")
        with server:  # makes the keys, and the configuration
            pass
    except KaError as error:
        pytest.skip(str(error))
    connector = api.connector("ssh", ssh_config=str(server.config), connect_s=60.0)
    limits = Limits(connect_s=60.0, late_s=60.0)
    async with Run(addresses(3), connector, limits=limits) as run:
        with trio.move_on_after(1.0):
            await run.launched()  # every call is refused
        assert run.engine.launching_count == 3
        with server:
            results = await run.copy([str(tmp_path / "source")], f"{tmp_path}/%h")
    assert reasons(results) == {}
    assert all("reached only after" in result.note for result in results)
    check(tmp_path, addresses(3), data)


@pytest.mark.parametrize("options", [CopyOptions(), BROADCAST], ids=["riding", "broadcast"])
async def test_nodes_reached_by_rsh_are_copied_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: CopyOptions
) -> None:
    rsh = tmp_path / "rsh"
    rsh.write_text('#!/bin/sh\nexec sh -c "$2"\n')
    rsh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    data = random_file(tmp_path / "source", 50_000)
    async with Run(names(3), "rsh") as run:
        results = await run.copy([str(tmp_path / "source")], f"{tmp_path}/%h", options=options)
    assert exit_code(results) == 0, reasons(results)
    check(tmp_path, names(3), data)


@ROOT_ONLY
@pytest.mark.skipif(shutil.which("tc") is None, reason="needs iproute2")
async def test_network_namespaces_feed_each_other_over_their_own_network(tmp_path: Path) -> None:
    data = random_file(tmp_path / "source", 500_000)
    with NetLab([4], rate_mbit=0) as lab:
        nodes = [lab.name(number) for number in range(1, 4)]
        words = [
            sys.executable, "-m", "karun.entry", "copy", "--via", "netns", "-w", ",".join(nodes),
            "--topology", "chain", str(tmp_path / "source"), f"{tmp_path}/%h",
        ]  # fmt: skip
        done = await trio.run_process(lab.inside(0, *words), capture_stderr=True, check=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (0, 1), done.stderr
    check(tmp_path, nodes, data)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "size", "options"),
    [(1000, 1024, CopyOptions()), (200, 1 << 20, CopyOptions()), (200, 1 << 20, BROADCAST)],
    ids=["1000 riding", "200 riding", "200 broadcast"],
)
async def test_many_local_nodes_have_it_all(
    tmp_path: Path, count: int, size: int, options: CopyOptions
) -> None:
    data = random_file(tmp_path / "source", size)
    results = await copy(names(count), [tmp_path / "source"], f"{tmp_path}/%h", options)
    assert reasons(results) == {}
    check(tmp_path, names(count), data)
