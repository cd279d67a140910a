"""`karun top`, `karun reboot`, `karun shell` and a few options of `karun run`, by command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from karun.hands import BOOT_ID_FILE
from karun.sampler import FIELDS
from tests.support.running import wait_until

# A program of the name rsh: a directory stands for a node, a moment for a boot.
RSH = """#!/bin/sh
cd "$(dirname "$0")/$1" 2>/dev/null || { echo "no route to host $1" >&2; exit 255; }
case $2 in
    "cat %s") cat boot_id || exit 255 ;;
    "sudo reboot")
        echo ordered >>log; rm boot_id
        (sleep 0.2; echo 22222222-0000-4000-8000-000000000002 >boot_id) >&- 2>&- &
        exit 255 ;;
    *) echo "$2: not allowed" >&2; exit 1 ;;
esac
"""
OLD = "11111111-0000-4000-8000-000000000001"


def karun(*words: str, stdin: bytes = b"", path: Path | None = None) -> tuple[int, str, str]:
    """Run the command line; return exit code, output and error."""
    env = os.environ | ({"PATH": f"{path}:{os.environ['PATH']}"} if path else {})
    done = subprocess.run(
        [sys.executable, "-m", "karun.entry", *words],
        input=stdin, capture_output=True, timeout=120, env=env, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout.decode(), done.stderr.decode()


# ---------------------------------------------------------------- top


def test_top_shows_every_node_once_with_its_rates() -> None:
    code, out, _ = karun(
        "top", "--via", "local", "-w", "n[1-9]", "--once", "--json", "--interval", "0.3"
    )
    assert code == 0
    *records, summary = map(json.loads, out.splitlines())
    assert [record["node"] for record in records] == [f"n{number}" for number in range(1, 10)]
    assert all(record["reason"] is None and record["memory"] > 0 for record in records)
    assert summary == {"type": "summary", "nodes": 9, "known": 9}


def test_top_names_the_nodes_that_are_not_there(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("Host *\n  HostName 127.0.0.1\n  Port 1\n")
    code, out, _ = karun("top", "--ssh-config", str(config), "-w", "n[1-3]", "--once")
    assert code == 255
    assert out.splitlines()[1].startswith("n[1-3] (3): ")
    assert out.splitlines()[-1].endswith("all (3)")


def test_top_in_a_pipe_prints_a_table_each_period_until_stopped() -> None:
    words = ["top", "--via", "local", "-w", "n[1-2]", "--interval", "0.2"]
    running = subprocess.Popen(
        [sys.executable, "-m", "karun.entry", *words],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert running.stdout is not None
    tables = 0
    while tables < 3:
        line = running.stdout.readline()
        assert line
        tables += line.endswith(b"  nodes\n")
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=30)
    assert running.returncode == 0


def test_top_refuses_a_column_that_there_is_not() -> None:
    code, out, err = karun("top", "--via", "local", "-w", "n1", "--sort", "nice")
    assert (code, out) == (2, "")
    assert "no such column: 'nice'" in err


def test_the_watch_of_a_node_writes_counters(tmp_path: Path) -> None:
    code = "from karun.agent.watch import main; raise SystemExit(main(['1', '3']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    lines = done.stdout.decode().splitlines()
    assert [len(line.split()) for line in lines] == [len(FIELDS)] * 3


# ---------------------------------------------------------------- reboot


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    (tmp_path / "rsh").write_text(RSH % BOOT_ID_FILE)
    (tmp_path / "rsh").chmod(0o755)
    for name in ("n1", "n2", "n3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "boot_id").write_text(OLD + "\n")
    return tmp_path


def reboot(cluster: Path, *words: str) -> tuple[int, str, str]:
    return karun("reboot", "--via", "rsh", "--probe", "0.1", *words, path=cluster)


def test_nodes_reboot_in_windows_and_are_seen_to_come_back(cluster: Path) -> None:
    code, out, err = reboot(
        cluster, "-w", "n[1-4]", "--window", "2", "--soft", "sudo reboot", "--yes"
    )
    assert (code, out) == (2, "n[1-3]: up\n")
    assert err == "karun: n4: unreachable before the reboot\n"
    assert all((cluster / f"n{one}/log").read_text() == "ordered\n" for one in (1, 2, 3))


def test_a_node_that_will_not_reboot_says_why(cluster: Path) -> None:
    code, _, err = reboot(cluster, "-w", "n1", "--yes")
    assert (code, err) == (1, "karun: n1: would not reboot (reboot: not allowed)\n")


def test_a_hard_reboot_switches_the_power_from_here(cluster: Path) -> None:
    power = cluster / "power"
    power.write_text(f"echo 33333333-0000-4000-8000-000000000003 >{cluster}/$1/boot_id\n")
    code, out, _ = reboot(cluster, "-w", "n[1-3]", "--hard", f"sh {power} %h", "--yes", "--json")
    assert code == 0
    assert [json.loads(line).get("state") for line in out.splitlines()[:3]] == ["up"] * 3


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["-w", "n1"], "nobody to ask whether to reboot: give --yes"),
        (["-w", "n1", "--soft", "a", "--hard", "b", "--yes"], "either --soft or --hard"),
        (["-w", "n1", "--via", "local", "--yes"], "--via local would reboot this machine"),
        (["-w", "n1", "--soft", "a 'b", "--yes"], "not a command"),
    ],
)
def test_a_reboot_in_doubt_is_refused(cluster: Path, words: list[str], why: str) -> None:
    code, _, err = reboot(cluster, *words)
    assert code == 2
    assert why in err
    assert not (cluster / "n1/log").exists()


# ---------------------------------------------------------------- shell


def test_the_prompt_runs_lines_on_nodes_that_stay_connected() -> None:
    lines = b"echo $PPID\necho $PPID\n-x n2\n+n7\necho $KARUN_NODE\n:nodes\n-w n2\n=\nexit 3\n"
    code, out, err = karun("shell", "--via", "local", "-w", "n[1-2]", stdin=lines)
    assert code == 0
    said = out.splitlines()
    assert sorted(said[:2]) == sorted(said[2:4]), "other agents than before"
    assert sorted(said[4:6]) == ["n1: n1", "n7: n7"]
    assert said[6:] == ["n[1,7] (2)", "output is gathered"], "no prompts: this is no terminal"
    assert err == "karun: n2: exited with exit code 3\n"


@pytest.mark.slow
def test_a_node_that_was_lost_is_called_again_by_the_next_command() -> None:
    lines = b"sleep 0.3; kill -9 $PPID\necho $KARUN_NODE is back\n"
    _, out, err = karun("shell", "--via", "local", "-w", "n1", stdin=lines)
    assert "n1: lost" in err
    assert "n1: n1 is back" in out.splitlines()


def _runs(pid: str) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # a zombie has none
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("words", [("run",), ("shell",)])
def test_a_closed_terminal_or_a_kill_ends_what_runs_on_nodes(
    words: tuple[str, ...], number: signal.Signals, tmp_path: Path
) -> None:
    line = f"echo $$ >{tmp_path}/$KARUN_NODE; exec sleep 60"
    whole = [*words, "--via", "local", "-w", "n[1-2]", *([line] if words == ("run",) else [])]
    files = [tmp_path / "n1", tmp_path / "n2"]
    with subprocess.Popen(
        [sys.executable, "-m", "karun.entry", *whole],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, bufsize=0,
    ) as running:  # fmt: skip
        assert running.stdin is not None
        if words == ("shell",):
            running.stdin.write(line.encode() + b"\n")
        wait_until(lambda: all(one.exists() and one.read_text() for one in files), "the commands")
        running.send_signal(number)
        assert running.wait(30) == 130
    # Left to themselves, nodes end what they run ten seconds after they have lost their head.
    commands = [file.read_text().strip() for file in files]
    wait_until(lambda: not any(_runs(one) for one in commands), "their end", limit_s=5)


def test_under_nohup_a_closed_terminal_ends_nothing(tmp_path: Path) -> None:
    running = subprocess.Popen(
        ["nohup", sys.executable, "-m", "karun.entry", "run", "--via", "local", "-w", "n1",
         f"touch {tmp_path}/begun; while [ ! -e {tmp_path}/go ]; do sleep 0.05; done"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until((tmp_path / "begun").exists, "the command")
    running.send_signal(signal.SIGHUP)
    (tmp_path / "go").touch()
    assert running.wait(30) == 0


# ---------------------------------------------------------------- run


def test_files_of_output_are_besides_the_form_and_leave_standard_error_alone(
    tmp_path: Path,
) -> None:
    script = "echo out; echo err >&2"
    code, out, err = karun(
        "run", "--via", "local", "-w", "n1", "--outdir", str(tmp_path / "out"), "--", script
    )
    assert (code, out, err) == (0, "n1: out\n", "n1: err\n")
    assert (tmp_path / "out/n1").read_text() == "out\n"


def test_a_terminal_has_a_status_line_and_an_answer_to_enter(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    end = tmp_path / "end"
    script = f"while [ ! -e {end} ]; do sleep 0.1; done"
    words = ["run", "--via", "local", "-w", "n[1-2]", "--", "sh", "-c", script]
    running = subprocess.Popen(
        [sys.executable, "-m", "karun.entry", *words],
        stdin=theirs, stdout=subprocess.DEVNULL, stderr=theirs,
        start_new_session=True, preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(theirs)
    shown = b""

    def has(text: bytes) -> bool:
        nonlocal shown
        shown += os.read(ours, 4096)
        return text in shown

    wait_until(lambda: has(b"karun: 0/2 done"), "the status line")
    os.write(ours, b"\n")
    wait_until(lambda: has(b"karun: waiting for 2: n[1-2]\r\n"), "the answer")
    end.touch()
    assert running.wait(30) == 0
    os.close(ours)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
