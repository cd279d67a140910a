"""stress-ng's file system stressors: whatever they do, nothing fails and fsck finds all clean.

A second for each here; docs/testing.md has the longer run by hand.
"""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.support.cluster import Cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("stress-ng") is None, reason="stress-ng is not installed"),
]
SECONDS = 1
TIME_LIMIT_S = 280
# They work on other file systems: binderfs and procfs on their own, fanotify on every mount of
# the machine, which hangs where another test has stopped a server on purpose.
ELSEWHERE = "binderfs,fanotify,procfs"
# It tests the limits of fallocate, which a mount does not have yet; what it puts in its place
# (writing) then looks like a broken limit to it.
WITHOUT_GROUND = "fsize"


def test_no_stressor_fails_and_nothing_is_left(cluster: Cluster) -> None:
    done = subprocess.run(
        [
            "stress-ng", "--class", "filesystem", "--seq", "1",
            "--exclude", f"{ELSEWHERE},{WITHOUT_GROUND}",
            "--timeout", f"{SECONDS}s", "--temp-path", str(cluster.mount), "--verify",
        ],
        capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "fail:" not in output, output
    assert list(cluster.mount.iterdir()) == []
