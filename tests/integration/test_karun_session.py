"""Sessions: commands on nodes that stay connected, through the real command line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from karun import client
from karun.agent import frames
from tests.support.karun import Shell, is_running, resident_size
from tests.support.running import wait_until

NODE_COUNT = 12


@pytest.fixture(scope="module")
def karun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    shell = Shell(tmp_path_factory.mktemp("run"))
    shell.runtime.chmod(0o700)
    started = shell("session", "start", "--via", "local", "-w", f"n[1-{NODE_COUNT}]")
    assert started.returncode == 0, started.stderr
    assert started.stdout.startswith(b"session default: 12 nodes")
    yield shell
    assert shell("session", "stop").returncode == 0


def test_a_command_in_a_session_prints_and_ends_as_without_one(karun: Shell) -> None:
    script = "echo out; echo $KARUN_NODE >&2; exit $((KARUN_RANK % 3))"
    found = karun("run", "--session", "default", "-b", "-S", "--", "sh", "-c", script)
    assert found.returncode == 2
    assert {b"n[1,4,7,10] (4)", b"n[2,5,8,11] (4)", b"out"} <= set(found.stdout.splitlines())
    errors = found.stderr.splitlines()
    assert {b"n%d: n%d" % (number, number) for number in range(1, 13)} <= set(errors)
    assert b"karun: n[2,5,8,11]: exited with exit code 1" in errors


def test_standard_input_reaches_the_nodes_of_a_session(karun: Shell) -> None:
    data = os.urandom(1 << 20)
    found = karun("run", "--session", "default", "-b", "--", "wc", "-c", stdin=data)
    assert found.stdout.splitlines()[-1] == b"1048576"


def test_a_part_of_a_session_can_be_named_and_nothing_beyond_it(karun: Shell) -> None:
    found = karun("run", "--session", "default", "-w", "n[3-4]", "echo", "hi")
    assert sorted(found.stdout.splitlines()) == [b"n3: hi", b"n4: hi"]
    found = karun("run", "--session", "default", "-w", "n[12-14]", "true")
    assert (found.returncode, found.stderr) == (2, b"karun: not in this session: n[13-14]\n")


def test_many_clients_share_a_session(karun: Shell) -> None:
    clients = [
        karun.start("run", "--session", "default", "-b", "--", "echo", str(number))
        for number in range(6)
    ]
    for number, user in enumerate(clients):
        out, _ = user.communicate(timeout=60)
        assert (user.returncode, out.splitlines()[-1]) == (0, b"%d" % number)


def test_a_client_that_goes_takes_its_command_with_it(karun: Shell, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"echo $$ >> {pids}; exec sleep 1000"
    user = karun.start("run", "--session", "default", "--", "sh", "-c", script)
    wait_until(
        lambda: pids.exists() and len(pids.read_text().split()) == NODE_COUNT, "the commands"
    )
    user.kill()
    user.communicate()
    numbers = pids.read_text().split()
    wait_until(lambda: not any(map(is_running, numbers)), "the commands to end")
    assert karun("run", "--session", "default", "true").returncode == 0


def test_a_client_that_does_not_read_holds_the_nodes_back_not_the_session(karun: Shell) -> None:
    user = karun.start("run", "--session", "default", "-w", "n1", "yes")
    out = user.stdout
    assert out is not None
    assert out.read(6) == b"n1: y\n"
    (line,) = karun("session", "list").stdout.splitlines()
    pid = int(line.split(b"pid ")[1].split(b";")[0])
    before = resident_size(pid)
    time.sleep(0.5)
    assert resident_size(pid) < before + (32 << 20)
    user.kill()
    user.communicate()


def test_a_session_that_is_not_there_is_one_line(karun: Shell) -> None:
    found = karun("run", "--session", "nope", "true")
    assert found.returncode == 3
    assert found.stderr == b"karun: no session 'nope' (karun session start --name nope -w ...)\n"


def test_a_directory_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "karun").mkdir(mode=0o755)
    (tmp_path / "karun").chmod(0o755)
    found = Shell(tmp_path)("run", "--session", "default", "true")
    assert found.returncode == 4
    assert found.stderr.startswith(b"karun: others have access to")


def test_the_socket_is_for_its_owner_only(karun: Shell) -> None:
    path = karun.runtime / "karun" / "default.sock"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_client_loads_builtin_and_c_modules_only(karun: Shell) -> None:
    words = ["run", "--session", "default", "true"]
    code = f"import sys; sys.argv = ['karun', *{words!r}]\nfrom karun import entry; entry.main()"
    env = os.environ | {"XDG_RUNTIME_DIR": str(karun.runtime)}
    found = subprocess.run(
        [sys.executable, "-S", "-X", "importtime", "-c", code],
        stdin=subprocess.DEVNULL, capture_output=True, env=env, check=True,
    )  # fmt: skip
    loaded = {line.rpartition("|")[2].strip() for line in found.stderr.decode().splitlines()}
    assert "karun.client" in loaded
    heavy = {"click", "common.errors", "contextlib", "dataclasses", "enum", "json", "pathlib",
             "re", "signal", "socket", "trio", "typing"}  # fmt: skip
    assert loaded & heavy == set()


def test_options_may_stand_before_the_session(karun: Shell) -> None:
    found = karun("run", "-b", "-w", "n[3-4]", "--session=default", "--", "echo", "--session")
    assert found.stdout.splitlines()[1:] == [b"n[3-4] (2)", b"-" * 15, b"--session"]


def test_what_a_session_cannot_do_is_one_line(karun: Shell) -> None:
    found = karun("run", "--session", "default", "--via", "ssh", "true")
    line = b"karun: --via does not go with --session (of its nodes -w chooses some)\n"
    assert (found.returncode, found.stderr) == (2, line)
    found = karun("run", "--session", "default", "--nonsense", "true")
    line = b"karun: No such option '--nonsense'. See `karun run --help`.\n"
    assert (found.returncode, found.stderr) == (2, line)
    assert b"Usage: karun run" in karun("run", "--session", "default", "--help").stdout


def test_a_client_that_says_nonsense_is_dropped_and_the_session_stays(karun: Shell) -> None:
    for said in (b"nonsense" * 9, frames.encode(client.RUN, 0, b""), frames.encode(99, 0)):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(karun.runtime / "karun" / "default.sock"))
            stranger.sendall(said)
            assert stranger.recv(100) == b""
    assert karun("run", "--session", "default", "true").returncode == 0


def test_files_are_where_the_client_is_and_a_disk_that_is_full_ends_one_command(
    karun: Shell, tmp_path: Path
) -> None:
    words = ["run", "--session", "default", "-w", "n[1-2]", "--outdir", "out", "echo", "hi"]
    subprocess.run(karun.command(*words), cwd=tmp_path, env=karun.env, check=True,
                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # fmt: skip
    assert [(tmp_path / "out" / name).read_text() for name in ("n1", "n2")] == ["hi\n"] * 2
    full = tmp_path / "full"
    full.mkdir()
    (full / "n1").symlink_to("/dev/full")
    found = karun("run", "--session", "default", "-w", "n1", "--outdir", str(full), "echo", "hi")
    assert (found.returncode, found.stdout) == (1, b"")
    assert found.stderr == b"karun: cannot write %s: No space left on device\n" % bytes(full / "n1")
    assert karun("run", "--session", "default", "true").returncode == 0


def test_when_nobody_reads_the_command_is_stopped(karun: Shell) -> None:
    user = karun.start("run", "--session", "default", "-w", "n1", "yes")
    assert user.stdout is not None
    assert user.stdout.read(6) == b"n1: y\n"
    user.stdout.close()
    assert user.wait(30) == 141


def test_an_interruption_prints_what_was_gathered_and_names_the_rest(karun: Shell) -> None:
    script = "echo out; echo ready >&2; exec sleep 1000"
    command = karun.command("run", "--session", "default", "-b", "-w", "n1", "sh", "-c", script)
    user = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, env=karun.env)  # fmt: skip
    assert user.stderr is not None
    assert user.stderr.readline() == b"n1: ready\n"
    user.send_signal(signal.SIGINT)
    out, err = user.communicate(timeout=30)
    assert user.returncode == 130
    assert out.splitlines()[-1] == b"out"
    assert err == b"karun: n1: no result\n"


def test_a_direct_session_says_so_and_runs_commands_as_others_do(tmp_path: Path) -> None:
    karun = Shell(tmp_path)
    words = ["session", "start", "--name", "d", "--direct", "--via", "local", "-w", "n[1-5]"]
    started = karun(*words)
    try:
        assert started.stdout.startswith(b"session d: 5 nodes, direct, pid "), started.stderr
        assert b";" not in started.stdout, "none is out, none stays"
        assert karun("session", "list").stdout.startswith(b"d: 5 nodes, direct, pid ")
        found = karun("run", "--session", "d", "-b", "-S", "--", "sh", "-c", "exit $KARUN_RANK")
        assert found.returncode == 4
    finally:
        assert karun("session", "stop", "d").returncode == 0


def test_who_connects_and_hangs_up_leaves_the_session_as_it_was(karun: Shell) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(karun.runtime / "karun" / "default.sock"))
    found = karun("session", "start", "--via", "local", "-w", "n1")
    assert b"'default' is there already" in found.stderr
    # By the end of a command it has long read that those before have hung up.
    assert karun("run", "--session", "default", "--", "true").returncode == 0
    assert karun("session", "list").stdout.startswith(b"default: 12 nodes")


def test_a_start_that_is_interrupted_leaves_no_session_and_no_traceback(tmp_path: Path) -> None:
    karun = Shell(tmp_path)
    starting = karun.start(
        "session", "start", "--via", "local", "-w", "n[1-100]", stderr=subprocess.PIPE
    )
    wait_until(lambda: b"session_server" in _children(starting.pid), "the session's process")
    starting.send_signal(signal.SIGINT)
    _, errors = starting.communicate(timeout=60)  # which the session's process holds open as well
    assert (starting.returncode, errors.strip()) == (130, b"karun: interrupted")
    assert karun("session", "list").stdout == b""


def _children(pid: int) -> bytes:
    """Return the command lines of a process's children."""
    numbers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return b"".join(Path(f"/proc/{number}/cmdline").read_bytes() for number in numbers)
