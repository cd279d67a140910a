"""The leak check itself: it must see what it is there for."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.support import leaks

# Leaves a grandchild in a session of its own, as a daemon does, and prints its pid.
DAEMON = (
    "import subprocess as s, sys; sleeper = [sys.executable, '-c', 'import time; time.sleep(60)'];"
    " print(s.Popen(sleeper, start_new_session=True, stdout=s.DEVNULL, stderr=s.DEVNULL).pid)"
)


def test_a_daemon_in_its_own_session_is_found_and_ended() -> None:
    token = uuid.uuid4().hex
    environment = os.environ | {leaks.TOKEN_VARIABLE: token}
    started = subprocess.run(
        [sys.executable, "-c", DAEMON], env=environment, check=True, capture_output=True
    )
    pid = int(started.stdout)
    assert leaks.processes(token) == [pid]
    assert [line.split()[0] for line in leaks.end_processes(token, grace_s=0)] == [str(pid)]
    assert leaks.end_processes(token) == []


def test_processes_of_others_are_never_ours() -> None:
    assert leaks.processes(uuid.uuid4().hex) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_mounts_are_found_deepest_first(tmp_path: Path) -> None:
    outer = tmp_path / "with space"
    outer.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", outer], check=True)
    try:
        (outer / "inner").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", outer / "inner"], check=True)
        assert leaks.mounts_below(tmp_path) == [outer / "inner", outer]
    finally:
        for point in leaks.mounts_below(tmp_path):
            leaks.unmount(point)
    assert leaks.mounts_below(tmp_path) == []
