"""Copies and gathers in a session, through the real command line and from Python."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

import karun
from common.errors import Code, KaError
from karun import archive, client, session_wire
from karun.agent import frames
from karun.copied import CopyOptions
from tests.support.copies import process_writing, random_file
from tests.support.karun import Collect, Shell, is_running, resident_size
from tests.support.running import wait_until
from tests.support.volumes import until

LARGE = 3 << 20
"""More than rides on the session itself."""
NODES = [f"n{number}" for number in range(1, 7)]
SLOWLY = ("--rate", "4MB", "--topology", "chain", "--chunk-size", "64KiB")


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    shell = Shell(tmp_path_factory.mktemp("run"))
    shell.runtime.chmod(0o700)
    started = shell("session", "start", "--via", "local", "-w", "n[1-6]")
    assert started.returncode == 0, started.stderr
    yield shell
    assert shell("session", "stop").returncode == 0


def told(text: bytes) -> bytes:
    """What was said, without the time that it took."""
    return re.sub(rb"in [0-9.]+ s", b"in T s", text)


def begin(shell: Shell, *words: str) -> subprocess.Popen[bytes]:
    return shell.start(*words, stdout=subprocess.DEVNULL)


# ------------------------------------------------------------ the same as without a session


@pytest.mark.parametrize("size", [5000, LARGE], ids=["riding", "broadcast"])
def test_a_copy_in_a_session_reports_as_one_without(
    shell: Shell, tmp_path: Path, size: int
) -> None:
    data = random_file(tmp_path / "source", size)
    for way in ("plain", "joined"):
        for node in NODES:
            if node != "n4":
                (tmp_path / way / node).mkdir(parents=True)
    found = []
    for way, where in (
        ("plain", ("--via", "local", "-w", "n[1-6]")), ("joined", ("--session", "default")),
    ):  # fmt: skip
        target = f"{tmp_path}/{way}/%h/file"
        done = shell("copy", *where, "--json", str(tmp_path / "source"), target)
        said = [line.replace(way.encode(), b"WAY") for line in (done.stdout, done.stderr)]
        found.append((done.returncode, *map(told, said)))
        for node in NODES:
            path = tmp_path / way / node / "file"
            assert node == "n4" or path.read_bytes() == data
    assert found[0] == found[1]
    assert found[0][0] == 2
    assert b"n4: cannot write" in found[0][2]


@pytest.mark.parametrize("size", [5000, LARGE], ids=["small", "large"])
def test_a_gather_in_a_session_reports_as_one_without(
    shell: Shell, tmp_path: Path, size: int
) -> None:
    data = {node: random_file(tmp_path / node, size) for node in NODES if node != "n2"}
    found = []
    for where in (("--via", "local", "-w", "n[1-6]"), ("--session", "default")):
        done = shell("gather", *where, "--json", f"{tmp_path}/%h", str(tmp_path / "all"))
        lines = sorted(done.stdout.splitlines())
        found.append((done.returncode, lines, told(done.stderr)))
        for node, content in data.items():
            assert (tmp_path / "all" / node).read_bytes() == content
            (tmp_path / "all" / node).unlink()
        assert os.listdir(tmp_path / "all") == []
    assert found[0] == found[1]
    assert found[0][0] == 2


def test_a_part_of_a_session_is_copied_to_and_nobody_else(shell: Shell, tmp_path: Path) -> None:
    for name, size in (("small", 100), ("large", LARGE)):
        data = random_file(tmp_path / name, size)
        words = (str(tmp_path / name), f"{tmp_path}/{name}-%h")
        done = shell("copy", "--session", "default", "-w", "n[5,3]", "--json", *words)
        assert done.returncode == 0, done.stderr
        assert [json.loads(line)["node"] for line in done.stdout.splitlines()] == ["n3", "n5"]
        assert {path.name: path.read_bytes() for path in tmp_path.glob(f"{name}-*")} == {
            f"{name}-n3": data, f"{name}-n5": data,
        }  # fmt: skip


def test_relative_names_and_standard_input_are_the_clients(shell: Shell, tmp_path: Path) -> None:
    data = random_file(tmp_path / "here", 5000)
    in_session = ("--session", "default", "-w", "n[1-2]")
    done = shell("copy", *in_session, "here", f"{tmp_path}/a-%h", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = shell("copy", *in_session, "-", f"{tmp_path}/b-%h", stdin=data)
    assert done.returncode == 0, done.stderr
    done = shell("gather", *in_session, f"{tmp_path}/b-%h", "all", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [tmp_path / name for name in ("a-n1", "a-n2", "all/n1", "all/n2")]
    assert {path.read_bytes() for path in found} == {data}


def test_a_command_of_a_copy_prints_with_its_node(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 1000)
    line = "echo $KARUN_NODE has $(wc -c)"
    done = shell("copy", "--session", "default", "-w", "n[5-6]", "-q", "--command", line,
                 str(tmp_path / "source"))  # fmt: skip
    assert sorted(done.stderr.splitlines()) == [b"n5: n5 has 1000", b"n6: n6 has 1000"]


def test_two_copies_and_a_command_go_on_at_once_in_a_session(shell: Shell, tmp_path: Path) -> None:
    users = []
    data = {}
    for name in ("a", "b"):
        data[name] = random_file(tmp_path / name, 2 * LARGE)
        words = (*SLOWLY, str(tmp_path / name), f"{tmp_path}/{name}-%h")
        users.append(begin(shell, "copy", "--session", "default", *words))
    for name in data:
        wait_until(lambda name=name: process_writing(tmp_path, f"{name}-n6"), f"the copy of {name}")
    assert shell("run", "--session", "default", "true").returncode == 0
    assert [user.poll() for user in users] == [None, None]
    assert [user.wait(60) for user in users] == [0, 0]
    for name, content in data.items():
        assert {(tmp_path / f"{name}-{node}").read_bytes() for node in NODES} == {content}


# ------------------------------------------------------------ who ends, and who stays


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_client_that_ends_takes_its_copy_with_it_and_the_next_one_goes_on(
    shell: Shell, tmp_path: Path, number: signal.Signals
) -> None:
    data = random_file(tmp_path / "source", 2 * LARGE)
    words = ("copy", "--session", "default", *SLOWLY, str(tmp_path / "source"), f"{tmp_path}/%h")
    user = begin(shell, *words)
    wait_until(lambda: process_writing(tmp_path, "n6"), "the copy")
    pid = process_writing(tmp_path, "n6")
    user.send_signal(number)
    assert user.wait(30) == (130 if number == signal.SIGINT else -number)
    wait_until(lambda: not is_running(str(pid)), "the processes to end")
    assert not (tmp_path / "n6").exists()
    assert shell(*words).returncode == 0
    assert {(tmp_path / node).read_bytes() for node in NODES} == {data}


def test_a_client_that_does_not_read_makes_a_gather_wait(shell: Shell, tmp_path: Path) -> None:
    data = random_file(tmp_path / "source", 48 << 20)
    (line,) = shell("session", "list").stdout.splitlines()
    pid = int(line.split(b"pid ")[1])
    before = resident_size(pid)
    words = (f"{tmp_path}/source", str(tmp_path / "all"))
    user = begin(shell, "gather", "--session", "default", "-w", "n[1-3]", *words)
    wait_until(lambda: any((tmp_path / "all").glob(".n1*")), "the first bytes")
    user.send_signal(signal.SIGSTOP)
    with pytest.raises(subprocess.TimeoutExpired):
        user.wait(1)
    assert resident_size(pid) < before + (16 << 20)
    user.send_signal(signal.SIGCONT)
    assert user.wait(60) == 0
    assert {(tmp_path / "all" / node).read_bytes() for node in NODES[:3]} == {data}


def test_the_end_of_a_session_ends_its_copies_with_one_line(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    shell("session", "start", "--via", "local", "-w", "n[1-2]")
    random_file(tmp_path / "source", 8 * LARGE)
    words = (*SLOWLY, str(tmp_path / "source"), f"{tmp_path}/%h")
    words = ("copy", "--session", "default", *words)
    user = shell.start(*words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_until(lambda: process_writing(tmp_path, "n2"), "the copy")
    assert shell("session", "stop").returncode == 0
    _, err = user.communicate(timeout=30)
    assert (user.returncode, err) == (3, b"karun: the session has ended\n")


@pytest.mark.slow
def test_a_node_that_the_session_has_lost_is_named(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    shell("session", "start", "--via", "local", "-w", "n[1-3]")
    data = random_file(tmp_path / "source", LARGE)
    # The command's parent is the agent.
    shell("run", "--session", "default", "-w", "n2", "--", "sh", "-c", "kill -9 $PPID; sleep 9")
    for name, target in (("copy", f"{tmp_path}/%h"), ("gather", f"{tmp_path}/all")):
        done = shell(name, "--session", "default", str(tmp_path / "source"), target)
        assert done.returncode == 2
        assert done.stderr.startswith(b"karun: n2: lost: ")
        assert b"karun: 2 of 3 nodes" in done.stderr
    assert {(tmp_path / name).read_bytes() for name in ("n1", "n3", "all/n1", "all/n3")} == {data}
    shell("session", "stop")


# ------------------------------------------------------------ the prompt, and the load


def test_a_prompt_in_a_session_talks_to_its_agents_and_calls_nobody(shell: Shell) -> None:
    agents = shell("run", "--session", "default", "-w", "n[2,4]", "echo $PPID").stdout
    lines = b"echo $PPID\n-w n9\necho never\n-w n5\necho $KARUN_NODE\n"
    done = shell("shell", "--session", "default", "-w", "n[2,4]", stdin=lines)
    said = done.stdout.splitlines()
    assert sorted(said[:2]) == sorted(agents.splitlines())
    assert said[2:4] == [b"karun: not in this session: n9", b"n5: n5"]
    everybody = shell("shell", "--session", "default", stdin=b":nodes\n").stdout
    assert everybody == b"n[1-6] (6)\n"


def test_a_prompt_outlives_its_session_and_goes_on_in_the_next_one(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    start = ("session", "start", "--via", "local", "-w", "n1")
    shell(*start)
    prompt = subprocess.Popen(
        shell.command("shell", "--session", "default"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=shell.env,
    )  # fmt: skip
    assert prompt.stdin is not None
    assert prompt.stdout is not None
    prompt.stdin.write(f"touch {tmp_path}/begun; sleep 60\n".encode())
    prompt.stdin.flush()
    wait_until((tmp_path / "begun").exists, "the command")
    assert shell("session", "stop").returncode == 0
    assert prompt.stdout.readline() == b"karun: the session has ended\n"
    shell(*start)
    said, _ = prompt.communicate(b"echo back\n", timeout=30)
    assert said == b"n1: back\n"
    shell("session", "stop")


def test_the_load_of_a_session_is_that_of_its_nodes(shell: Shell) -> None:
    done = shell("top", "--session", "default", "-w", "n[3,5]", "--once", "--json", "--interval",
                 "0.1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    *nodes, summary = map(json.loads, done.stdout.splitlines())
    assert [one["node"] for one in nodes if one["load"] is not None] == ["n3", "n5"]
    assert summary == {"type": "summary", "nodes": 2, "known": 2}


# ------------------------------------------------------------ what is wrong


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["copy", "--session", "default", "--via", "ssh", "a", "b"], 2,
         "--via does not go with --session (of its nodes -w chooses some)"),
        (["copy", "--session", "default", "--late", "9", "a", "b"], 2,
         "--late does not go with --session (of its nodes -w chooses some)"),
        (["gather", "--session", "default", "-x", "n1", "a", "b"], 2,
         "-x does not go with --session (of its nodes -w chooses some)"),
        (["copy", "--session", "default", "-w", "n[6-8]", "/etc/passwd", "b"], 2,
         "not in this session: n[7-8]"),
        (["copy", "--session", "default", "-w", "", "/etc/passwd", "b"], 2,
         "no nodes: -w names an empty set"),
        (["run", "--session", "default", "-w", "", "true"], 2, "no nodes: -w names an empty set"),
        (["shell", "--session", "default", "--via", "ssh"], 2,
         "--via does not go with --session (of its nodes -w chooses some)"),
        (["shell", "--session", "nope"], 3,
         "no session 'nope' (karun session start --name nope -w ...)"),
        (["top", "--session", "default", "-w", "n7"], 2, "not in this session: n7"),
        (["copy", "/etc/passwd", "b"], 2, "no nodes: name some by -w, -g, -a or --hostfile"),
        (["gather", "--session", "nope", "a", "b"], 3,
         "no session 'nope' (karun session start --name nope -w ...)"),
        (["copy", "--session", "../x", "a", "b"], 2, "not a name for a session: '../x'"),
        (["copy", "--session", "default", "/nonexistent", "b"], 1,
         "cannot read /nonexistent: No such file or directory"),
        (["gather", "--session", "default", "a", "/etc/passwd/all"], 1,
         "cannot write /etc/passwd/all: Not a directory"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(shell: Shell, words: list[str], code: int, line: str) -> None:
    done = shell(*words)
    assert (done.returncode, done.stderr.decode()) == (code, f"karun: {line}\n")


def test_a_directory_of_another_user_is_one_line(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("gives a directory away: needs root")
    (tmp_path / "karun").mkdir(mode=0o700)
    os.chown(tmp_path / "karun", 65534, 65534)
    done = Shell(tmp_path)("copy", "--session", "default", "/etc/passwd", "b")
    line = f"karun: {tmp_path}/karun belongs to another user: set XDG_RUNTIME_DIR to your own\n"
    assert (done.returncode, done.stderr.decode()) == (4, line)


def connected(shell: Shell) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    sock.connect(str(shell.runtime / "karun" / "default.sock"))
    return sock


def test_a_program_of_another_version_is_told_to_start_the_session_anew(shell: Shell) -> None:
    with connected(shell) as sock:
        sock.sendall(frames.encode(session_wire.JOIN, 0, frames.pack("1 of the others")))
        ((kind, _rank, payload),) = frames.Decoder().feed(sock.recv(10_000))
        assert sock.recv(1) == b""
    code, line = map(frames.text, frames.unpack(payload))
    assert (kind, code) == (session_wire.REFUSED, "WRONG_VERSION")
    assert "stop it, and start it anew" in line


def test_a_client_that_says_nonsense_after_joining_is_dropped_and_the_session_stays(
    shell: Shell,
) -> None:
    join = frames.encode(
        session_wire.JOIN, 0, frames.pack(session_wire.version(archive.build().digest))
    )
    nothing = frames.encode(session_wire.JOIN, 0, b"")
    beyond = frames.pack(1, "99", "", 0, "", frames.pack("true"), b"")
    for said in (
        nothing,
        join + b"nonsense" * 9,
        join + frames.encode(session_wire.COMMAND, 0, beyond),
        join + frames.encode(session_wire.FEED, 0, frames.pack("--1", "x")),
        join + frames.encode(99, 0),
    ):
        with connected(shell) as sock:
            sock.sendall(said)
            while sock.recv(10_000):
                pass
    assert shell("run", "--session", "default", "true").returncode == 0


# ------------------------------------------------------------ from Python


@pytest.fixture
def runtime(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(shell.runtime))


@pytest.mark.usefixtures("runtime")
async def test_a_joined_session_takes_commands_copies_and_gathers(tmp_path: Path) -> None:
    data = random_file(tmp_path / "source", 100_000)
    sink = Collect()
    async with karun.Joined("default", ["n6", "n1"]) as nodes:
        script = "cat; exit $KARUN_RANK"
        outcomes = await nodes.command(["sh", "-c", script], stdin=bytes(3 << 20), sink=sink)
        copied = await nodes.copy(
            [str(tmp_path / "source")], f"{tmp_path}/%h", options=CopyOptions(ride_size_max=0)
        )
        gathered = await nodes.gather(f"{tmp_path}/%h", str(tmp_path / "all"))
        (late,) = await nodes.command(["sleep", "100"], ranks=[1], limit_s=0.2)
    assert [(one.node, one.exit_code) for one in outcomes] == [("n6", 5), ("n1", 0)]
    assert {sink.outputs[rank, 1] for rank in range(2)} == {bytes(3 << 20)}
    assert [one.reason for one in (*copied, *gathered)] == [None] * 4
    assert {(tmp_path / name).read_bytes() for name in ("all/n1", "all/n6")} == {data}
    assert (late.node, late.stage, late.reason) == ("n1", "timeout", "after 0.2 s")


@pytest.mark.usefixtures("runtime")
async def test_a_cancelled_command_ends_on_the_nodes_and_others_go_on(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    async with karun.Joined("default", ["n1"]) as nodes:
        async with trio.open_nursery() as nursery:
            line = f"echo $$ > {pid}; exec sleep 100"
            nursery.start_soon(lambda: nodes.command([line], line=True))
            await until(lambda: pid.exists() and pid.read_text(), "the command")
            nursery.cancel_scope.cancel()
        await until(lambda: not is_running(pid.read_text().strip()), "its end")
        (outcome,) = await nodes.command(["true"])
        assert outcome.exit_code == 0


@pytest.mark.usefixtures("runtime")
async def test_what_a_session_cannot_do_is_a_usage_error() -> None:
    for names, why in ((["n1", "n1"], "a node is named twice"), ([], "no nodes")):
        with pytest.raises(KaError, match=why):
            karun.Joined("default", names)
    joined = karun.Joined("default")
    with pytest.raises(KaError, match="not joined"):
        await joined.command(["true"])
    with pytest.raises(KaError, match="not in this session: n9") as caught:
        async with karun.Joined("default", ["n9"]):
            pass
    assert caught.value.code is Code.USAGE


async def test_a_session_that_says_nonsense_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = client.socket_path("liar")
    about = frames.pack("local", 1, frames.pack("n1"))
    nonsense = frames.encode(99, 0, frames.pack("x"))

    async def lie(stream: trio.SocketStream) -> None:
        await stream.receive_some(1)
        await stream.send_all(frames.encode(session_wire.JOINED, 0, about) + nonsense)
        await trio.sleep_forever()

    with trio.socket.socket(socket.AF_UNIX) as listener:
        await listener.bind(path)
        listener.listen()
        async with trio.open_nursery() as nursery:
            sockets = [trio.SocketListener(listener)]
            nursery.start_soon(trio.serve_listeners, lie, sockets)
            with pytest.raises(KaError, match="said what it should not") as caught:
                async with karun.Joined("liar") as nodes:
                    await nodes.command(["true"])
            nursery.cancel_scope.cancel()
    assert caught.value.code is Code.PROTOCOL


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\0" * 16,
        os.urandom(64),
        frames.encode(session_wire.JOINED, 0, b""),
        frames.encode(session_wire.JOINED, 0, frames.pack("local", "0", b"\xff")),
    ],
    ids=["nothing", "zeros", "noise", "no fields", "no names"],
)
async def test_what_answers_otherwise_than_a_session_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(client.socket_path("odd"))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, serve)
            with pytest.raises(KaError, match="another version of karun"):
                async with karun.Joined("odd"):
                    pass
