"""kill -9 at random moments under a writing load; then everything promised is there.

KA_CRASHES=100 asks for 100 moments, KA_CRASH_SEED for other ones.  A failure prints its seed.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfsp import mounting
from nfsp.fsck.findings import Severity
from tests.conftest import TOKEN
from tests.support.crash_load import judge
from tests.support.running import Cluster, wait_until

pytestmark = [pytest.mark.fuse, pytest.mark.slow]

MOMENTS = int(os.environ.get("KA_CRASHES", "8"))
SEED = int(os.environ.get("KA_CRASH_SEED", "1"))
THREADS = 4
VICTIMS = ("mds", "iod", "daemons", "client", "everything", "mds again and again")


class Bench:
    """The cluster, its mount, and what has been counted."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cluster = Cluster(directory / "c", session_ttl_s=8)
        self.point = directory / "m"
        self.point.mkdir()
        self.client_pid = 0
        self.promised = 0
        self.leftovers: list[str] = []

    def mount(self) -> None:
        self.client_pid = mounting.mount_in_background(self.cluster.config_path, self.point, ())

    def kill_client(self) -> None:
        os.kill(self.client_pid, signal.SIGKILL)
        os.waitpid(self.client_pid, 0)

    def unmount(self) -> None:
        mounting.unmount(self.point)

    def check(self, what: str) -> None:
        """fsck finds nothing, or leftovers that it mends."""
        for repair in (False, True, False):
            report = self.cluster.fsck(repair=repair, verify=True)
            assert not report.unchecked, (what, report.unchecked)
            found = [(one.severity, f"{one.where} {one.what}") for one, _ in report.results]
            assert all(severity is Severity.LEFTOVER for severity, _ in found), (what, found)
            if not found:
                return
            self.leftovers += [f"{what}: {text}" for _, text in found] if repair else []
        pytest.fail(f"{what}: not clean after the repair: {found}")


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix=f"ka-{TOKEN}-") as name:
        made = Bench(Path(name))
        made.cluster.start()
        yield made
        wait_until(lambda: made.cluster.sessions() == 0, "dead sessions have run out")
        made.check("at the end")
        made.cluster.stop()
        print(f"\n{made.promised} operations were promised; leftovers mended: {made.leftovers}")


def crash(bench: Bench, rng: random.Random, victim: str) -> None:
    """Kill, wait a little, start again."""
    cluster = bench.cluster
    time.sleep(rng.uniform(0, 1.2))
    if victim in ("client", "everything"):
        bench.kill_client()
    if victim == "iod":
        cluster.kill(rng.choice(cluster.names[:-1]))
    elif victim in ("daemons", "everything"):
        cluster.kill()
    elif victim != "client":
        cluster.kill("mds0")
    if victim == "mds again and again":
        for _ in range(3):
            cluster.start("mds0")
            time.sleep(rng.uniform(0, 0.1))
            cluster.kill("mds0")
    time.sleep(rng.choice((0, 0.3)))
    cluster.start()


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_crash_loses_nothing_that_was_promised(bench: Bench, moment: int) -> None:
    rng = random.Random(f"{SEED} {moment}")
    victim = VICTIMS[moment % len(VICTIMS)] if moment < len(VICTIMS) else rng.choice(VICTIMS)
    print(f"KA_CRASH_SEED={SEED} moment {moment}: {victim}")
    tree, log = bench.point / f"{moment}", bench.directory / f"{moment}.log"
    bench.mount()
    tree.mkdir()
    load = subprocess.Popen(
        [sys.executable, "-m", "tests.support.crash_load", tree, log, str(rng.getrandbits(30)),
         str(THREADS)],
    )  # fmt: skip
    try:
        wait_until(lambda: log.exists() and log.stat().st_size > 2000, "the load is on")
        crash(bench, rng, victim)
        is_client = victim in ("client", "everything")
        if not is_client:
            time.sleep(rng.choice((0, 0.3)))  # it goes on as if nothing had been
        load.send_signal(signal.SIGTERM)
        assert load.wait(60) in (0, -signal.SIGTERM)  # it may have ended, and be on its way out
    finally:
        load.kill()
        load.wait()
        bench.unmount()
    bench.mount()
    wrong, promised = judge(tree, log, may_fail=is_client)
    bench.unmount()
    assert not wrong, "\n".join(wrong)
    bench.promised += promised
    bench.check(f"moment {moment} ({victim})")
