"""`nfsp up` as people use it: interrupted at any moment, by an ordinary user, the mount in use."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nfsp import onehost
from tests.conftest import TOKEN
from tests.support import leaks
from tests.support.running import nfsp, wait_until

pytestmark = [pytest.mark.fuse, pytest.mark.slow]

NOBODY = 65534


@pytest.fixture
def base() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=f"ka-{TOKEN}-") as name:
        (Path(name) / "m").mkdir()
        yield Path(name)
        leaks.unmount(Path(name) / "m")


def up_in_foreground(base: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "nfsp", "up", base / "c", "--iods", "2", "--mount", base / "m"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def processes(base: Path) -> list[str]:
    """Everything that runs with a path below *base* on its command line."""
    return [line for pid in leaks.processes(TOKEN) if str(base) in (line := leaks.describe(pid))]


def nothing_is_left(base: Path) -> None:
    assert not processes(base)
    assert not leaks.mounts_below(base)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_at_any_moment_of_the_start_leaves_nothing(base: Path, number: int) -> None:
    """The moments: at what has been said or has appeared so far, and a little later."""
    here = base / "c"
    signs: list[Callable[[], object]] = [
        lambda: True,
        lambda: (here / "cluster.key").exists(),
        lambda: (here / "log" / "iod1.log").exists(),
        lambda: (here / "run" / "iod1.pid").exists(),
        lambda: (here / "run" / "mds0.pid").exists(),
        lambda: list((here / "log").glob("mount*")),
        lambda: os.path.ismount(base / "m"),
    ]
    for index, sign in enumerate(signs):
        shutil.rmtree(here, ignore_errors=True)  # or its signs would be those of the start before
        process = up_in_foreground(base)
        wait_until(sign, f"sign {index}")
        time.sleep(0.03 * (index % 3) if index else 0.2)
        process.send_signal(number)
        _out, err = process.communicate(timeout=30)
        # At first it is Python's own start that is interrupted.
        assert process.returncode in (0, 130, -number), err
        assert not index or "Traceback" not in err
        nothing_is_left(base)
    result = nfsp("up", base / "c", "--mount", base / "m", "--daemon")
    assert (result.returncode, result.stderr) == (0, "")
    (base / "m" / "f").write_text("x")
    assert nfsp("down", base / "c").returncode == 0
    nothing_is_left(base)


def test_a_start_that_fails_after_its_mount_takes_that_away_as_well(base: Path) -> None:
    process = up_in_foreground(base)
    assert process.stdout is not None
    assert process.stderr is not None
    while "mds0 started" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()  # what it says next is that it has mounted
    assert process.stderr.read() == ""
    assert process.wait(60) == 1
    process.stderr.close()
    nothing_is_left(base)


INTERRUPTED_IN_TRIO = """
import os, signal, sys, trio
from nfsp import cli, onehost

def interrupt(_):
    os.kill(os.getpid(), signal.SIGTERM)
    return trio.lowlevel.Abort.SUCCEEDED

async def mkfs(*words, **more):
    with trio.move_on_after(0):
        await trio.lowlevel.wait_task_rescheduled(interrupt)  # comes while trio itself is at work

onehost.mkfs = mkfs
cli.main()
"""


def test_an_interrupt_of_mkfs_has_no_traceback(base: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IN_TRIO, "up", base / "c"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr.strip()) == (130, "nfsp: interrupted")
    nothing_is_left(base)


def test_an_interrupted_start_leaves_what_ran_before(base: Path) -> None:
    assert nfsp("up", base / "c", "--iods", "2", "--daemon").returncode == 0
    before = processes(base)
    assert len(before) == 3
    process = up_in_foreground(base)
    wait_until(lambda: os.path.ismount(base / "m"), "a mount")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode in (0, 130)
    left = processes(base)
    assert left == (before if process.returncode else [])
    assert not leaks.mounts_below(base)
    nfsp("down", base / "c")


def test_the_end_takes_the_mount_away_from_its_users(base: Path) -> None:
    process = up_in_foreground(base)
    assert process.stdout is not None
    assert any("Ctrl-C" in line or "runs" in line for line in process.stdout), "it never ran"
    user = subprocess.Popen(["sleep", "60"], cwd=base / "m")
    try:
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)  # impatience changes nothing
        out, err = process.communicate(timeout=40)
        assert (process.returncode, err) == (0, "")
        assert "unmounted" in out
        nothing_is_left(base)
    finally:
        user.kill()
        user.wait()


def test_servers_that_hang_do_not_hold_up_the_end_for_ever(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert nfsp("up", base / "c", "--iods", 1, "--mount", base / "m", "--daemon").returncode == 0
    for name in ("iod1", "mds0"):
        os.kill(int((base / "c" / "run" / f"{name}.pid").read_text()), signal.SIGSTOP)
    monkeypatch.setattr(onehost, "FORCE_TIMEOUT_S", 1.0)
    said: list[str] = []
    onehost.OneHost(base / "c").stop(said.append, force=True)
    assert any(line.startswith(f"unmounted {base / 'm'} by force") for line in said)
    wait_until(lambda: not processes(base), "umount(8) has ended as well")
    nothing_is_left(base)


def test_down_removes_a_mount_whose_process_is_dead(base: Path) -> None:
    assert nfsp("up", base / "c", "--iods", 1, "--mount", base / "m", "--daemon").returncode == 0
    (pid_file,) = (base / "c" / "run").glob("mount-*.pid")
    os.kill(int(pid_file.read_text()), signal.SIGKILL)
    wait_until(lambda: len(processes(base)) == 2, "the mount's process is gone")
    result = nfsp("down", base / "c")
    assert (result.returncode, result.stderr) == (0, "")
    assert "unmounted" in result.stdout
    nothing_is_left(base)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user: needs root")
def test_an_ordinary_user_needs_no_root(base: Path) -> None:
    """Only reading the programs is made easy for them: they may lie below /root here."""
    device = Path("/dev/fuse")
    mode = stat.S_IMODE(device.stat().st_mode)
    os.chown(base, NOBODY, NOBODY)
    os.chown(base / "m", NOBODY, NOBODY)
    become = [
        "setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups",
        "--inh-caps", "-all,+dac_read_search", "--ambient-caps", "-all,+dac_read_search",
    ]  # fmt: skip

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*become, *map(str, words)], capture_output=True, text=True, timeout=60, check=False,
            env={**os.environ, "HOME": str(base), "XDG_RUNTIME_DIR": str(base / "run")},
        )  # fmt: skip

    def command(*words: object) -> subprocess.CompletedProcess[str]:
        return run(sys.executable, "-m", "nfsp", *words)

    try:
        device.chmod(0o666)
        result = command("up", base / "c", "--mount", base / "m", "--daemon")
        assert (result.returncode, result.stderr) == (0, "")
        config = base / "c" / "cluster.toml"
        script = (
            "import os, sys; os.chdir(sys.argv[1]); open('f', 'w').write('x' * 1000000);"
            "os.rename('f', 'g'); assert os.stat('g').st_uid == os.getuid();"
            "assert len(open('g').read()) == 1000000; os.mkdir('d'); os.symlink('g', 'l')"
        )
        result = run(sys.executable, "-c", script, base / "m")
        assert (result.returncode, result.stderr) == (0, "")
        found = json.loads(command("-c", config, "status", "--json").stdout)
        assert not any("error" in one for one in (*found["mds"], *found["iod"]))
        for words in (
            ("umount", base / "m"),
            ("-c", config, "mount", base / "m"),
            ("-c", config, "fsck"),
            ("down", base / "c"),
        ):
            result = command(*words)
            assert (result.returncode, result.stderr) == (0, "")
    finally:
        command("down", base / "c")
        device.chmod(mode)
    nothing_is_left(base)
