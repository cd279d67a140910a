"""A cluster on this host with mounts of it, run by the `nfsp` command as a user would run it.

Owns the cluster's directory while it runs: starting, extra mounts, stopping, and the last check.
Whoever uses it gets a file system that is found clean when they are done.

Not here: daemons that are killed or cheated; tests of faults do that to `run/*.pid` themselves.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from nfsp.client.volume import Volume
from nfsp.config import load_cluster
from nfsp.model import ROOT as ROOT_INO

__all__ = ["Cluster", "fill_directory", "nfsp", "running"]

ROOT = Path(__file__).parent.parent.parent
COMMAND_TIMEOUT_S = 120
CREATORS = 32


def nfsp(
    *arguments: str | Path, status: int | None = 0
) -> subprocess.CompletedProcess[str]:
    """Run `nfsp ARGUMENTS`; it must exit with *status* unless that is None."""
    done = subprocess.run(
        [sys.executable, "-m", "nfsp", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False,
    )  # fmt: skip
    if status is not None and done.returncode != status:
        raise AssertionError(
            f"nfsp {' '.join(map(str, arguments))}: exit {done.returncode}, not {status}\n"
            f"{done.stdout}{done.stderr}"
        )
    return done


class Cluster:
    """A cluster that runs from `directory`, mounted at `mount`."""

    def __init__(self, directory: Path, mount: Path) -> None:
        self.directory = directory
        self.mount = mount
        self.config_path = directory / "cluster.toml"

    def nfsp(
        self, *arguments: str | Path, status: int | None = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run `nfsp -c CONFIG ARGUMENTS`."""
        return nfsp("-c", self.config_path, *arguments, status=status)

    def pid(self, name: str) -> int:
        """The process of a daemon (`mds0`, `iod1`, ...)."""
        return int((self.directory / "run" / f"{name}.pid").read_text())

    def mount_pid(self, mount: Path) -> int:
        """The process that serves a mount."""
        for file in (self.directory / "run").glob("mount-*.path"):
            if file.read_text() == str(mount):
                return int(file.with_suffix(".pid").read_text())
        raise AssertionError(f"not mounted from {self.directory}: {mount}")

    @contextmanager
    def mounted(self, path: Path, *options: str) -> Iterator[Path]:
        """Mount it at *path* too."""
        path.mkdir(exist_ok=True)
        self.nfsp("mount", path, *(word for option in options for word in ("-o", option)))
        try:
            yield path
        finally:
            nfsp("umount", path)

    def remount(self) -> None:
        """Mount anew: nothing is in any cache of the client afterwards."""
        nfsp("umount", self.mount)
        self.nfsp("mount", self.mount)

    def drop_caches(self) -> None:
        """Make the kernel forget clean pages and entries, where it lets us."""
        os.sync()
        try:
            Path("/proc/sys/vm/drop_caches").write_text("3")
        except OSError:
            pass

    def check(self, *, leftovers: bool = False) -> None:
        """Let fsck look at everything; *leftovers* of interrupted work may be allowed."""
        done = self.nfsp("fsck", status=None)
        assert done.returncode in ((0, 1) if leftovers else (0,)), done.stdout + done.stderr


@contextmanager
def running(
    directory: Path, *, iods: int = 3, options: tuple[str, ...] = (), leftovers: bool = False
) -> Iterator[Cluster]:
    """Run a new cluster below *directory*; at the end unmount, check and stop it."""
    cluster = Cluster(directory / "c", directory / "m")
    cluster.mount.mkdir()
    words = [word for option in options for word in ("-o", option)]
    nfsp("up", cluster.directory, "--iods", str(iods), "--mount", cluster.mount, "--daemon", *words)
    try:
        yield cluster
        nfsp("umount", cluster.mount)
        cluster.check(leftovers=leftovers)
    finally:
        nfsp("down", cluster.directory)


async def fill_directory(config_path: Path, name: str, count: int) -> None:
    """Make a directory of *count* entries, named by their numbers; quicker than through a mount."""
    config, key = load_cluster(config_path)
    async with Volume.open(config, key) as volume:
        mode = stat.S_IFDIR | 0o755
        directory = (await volume.create(ROOT_INO, name.encode(), mode, uid=0, gid=0)).ino
        file = (await volume.create(directory, b"0", stat.S_IFIFO | 0o600, uid=0, gid=0)).ino

        async def link(first: int) -> None:
            for number in range(first, count, CREATORS):
                await volume.link(file, directory, b"%d" % number)

        async with trio.open_nursery() as nursery:
            for first in range(1, CREATORS + 1):
                nursery.start_soon(link, first)
