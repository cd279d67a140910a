"""Servers in trouble: full disks, servers that are down or silent, strangers on every port."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from common.endpoint import parse_address
from common.errors import Code, KaError
from common.framing import Kind, encode_frame
from nfsp import mounting
from nfsp.client.volume import Volume
from nfsp.model import ROOT
from tests.conftest import TOKEN
from tests.support import leaks
from tests.support.running import Cluster, wait_until

FUSE = pytest.mark.fuse
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs: needs root")
MIB = 1 << 20

_T = TypeVar("_T")


@pytest.fixture
def base() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=f"ka-{TOKEN}-") as name:
        yield Path(name)


@pytest.fixture
def small(base: Path) -> Iterator[Path]:
    """A disk of 12 MiB."""
    path = base / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.fixture
def point(base: Path) -> Iterator[Path]:
    path = base / "m"
    path.mkdir()
    yield path
    leaks.unmount(path)


async def threaded(call: Callable[[], _T]) -> _T:
    return await trio.to_thread.run_sync(call)


def write(path: Path, data: bytes) -> None:
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(data), 1 << 17):
            file.write(data[start : start + (1 << 17)])
        os.fsync(file.fileno())


def fails(call: Callable[[], object], number: int, *, within_s: float) -> float:
    """Assert that a call fails with an errno, in time; return how long it took."""
    start = time.monotonic()
    with pytest.raises(OSError) as caught:
        call()
    took_s = time.monotonic() - start
    assert caught.value.errno == number
    assert took_s < within_s
    return took_s


# ---------------------------------------------------------------- full disks


@FUSE
@ROOT_ONLY
def test_a_full_iod_is_enospc_and_goes_on_when_space_is_back(
    base: Path, small: Path, point: Path
) -> None:
    cluster = Cluster(base / "c", iods=1, data={"iod1": small / "data"})
    cluster.start()
    mounting.mount_in_background(cluster.config_path, point, ())
    data = random.Random(1).randbytes(4 * MIB)
    write(point / "before", data)
    big = point / "big"
    fails(lambda: write(big, bytes(20 * MIB)), errno.ENOSPC, within_s=30)
    usage = os.statvfs(point)
    assert usage.f_bavail * usage.f_frsize < 2 * MIB
    assert (point / "before").read_bytes() == data
    with open(point / "before", "r+b", buffering=0) as file:  # what is there can be changed
        file.write(data[::-1][:MIB])
        os.fsync(file.fileno())
    data = data[::-1][:MIB] + data[MIB:]
    cluster.restart()
    fails(lambda: write(point / "more", bytes(4 * MIB)), errno.ENOSPC, within_s=30)
    assert (point / "before").read_bytes() == data
    big.unlink()
    (point / "more").unlink()
    wait_until(lambda: len(cluster.chunk_files("iod1")) == 1, "what was deleted is purged")
    time.sleep(1.1)  # an iod looks at its disk once a second
    write(point / "after", data)
    mounting.unmount(point)
    mounting.mount_in_background(cluster.config_path, point, ())
    assert (point / "before").read_bytes() == (point / "after").read_bytes() == data
    mounting.unmount(point)
    assert not cluster.fsck(verify=True).results
    cluster.stop()


@ROOT_ONLY
async def test_a_full_mds_is_enospc_and_goes_on_when_space_is_back(
    base: Path, small: Path
) -> None:
    cluster = await threaded(lambda: Cluster(base / "c", iods=1, data={"mds0": small / "data"}))
    await threaded(cluster.start)
    ballast = small / "ballast"
    made: list[bytes] = []

    async def make(volume: Volume, count: int) -> None:
        for _ in range(count):
            name = b"%d" % len(made) + b"x" * 100
            await volume.create(ROOT, name, stat.S_IFREG | 0o644, uid=0, gid=0)
            made.append(name)

    async def listed(volume: Volume) -> list[bytes]:
        names: list[bytes] = []
        cookie, eof = 0, False
        while not eof:
            entries, eof = await volume.readdir(ROOT, cookie, 500)
            names += [name for name, _, _ in entries]
            cookie = entries[-1][1]
        return names

    async with Volume.open(cluster.config, cluster.key) as volume:
        await make(volume, 100)
        free = os.statvfs(small).f_bavail * os.statvfs(small).f_frsize
        ballast.write_bytes(bytes(free - 200_000))
        with pytest.raises(KaError) as caught:
            await make(volume, 50_000)
        assert caught.value.code is Code.ENOSPC
        count = len(made)
        assert await listed(volume) == made
        await threaded(lambda: cluster.restart("mds0"))
        assert await listed(volume) == made
        ballast.unlink()
        with trio.fail_after(30):
            while True:
                try:
                    await make(volume, 1)
                    break
                except KaError as error:
                    if error.code is not Code.ENOSPC:
                        raise
                    await trio.sleep(0.05)
        await make(volume, 2000)
        assert len(made) == count + 2001
        assert await listed(volume) == made
    assert not (await threaded(cluster.fsck)).results
    await threaded(cluster.stop)


# ---------------------------------------------------------------- down and silent


@FUSE
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_missing_server_is_an_error_in_time_and_no_hang(
    base: Path, point: Path, how: str
) -> None:
    cluster = Cluster(base / "c", iods=1)
    cluster.start()
    mounting.mount_in_background(cluster.config_path, point, ("timeout=2", "attr_timeout=0"))
    write(point / "f", b"x" * MIB)

    def lose(name: str) -> None:
        if how == "killed":
            cluster.kill(name)
        else:
            cluster.signal(signal.SIGSTOP, name)

    def find(name: str) -> None:
        if how == "killed":
            cluster.start(name)
        else:
            cluster.signal(signal.SIGCONT, name)

    lose("iod1")
    fails(lambda: write(point / "g", b"x" * MIB), errno.EIO, within_s=20)
    with open(point / "f", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        fails(file.read, errno.EIO, within_s=20)
    assert (point / "f").stat().st_size == MIB
    find("iod1")
    write(point / "g", b"y" * MIB)
    lose("mds0")
    fails(lambda: (point / "f").stat(), errno.EIO, within_s=20)
    fails(lambda: (point / "h").mkdir(), errno.EIO, within_s=20)
    find("mds0")
    assert (point / "f").read_bytes() == b"x" * MIB
    assert (point / "g").read_bytes() == b"y" * MIB
    mounting.unmount(point)
    assert not cluster.fsck(repair=True).unchecked
    assert not cluster.fsck(verify=True).results
    cluster.stop()


@FUSE
def test_a_patient_mount_waits_for_a_server_that_comes_back(base: Path, point: Path) -> None:
    """The user is another process: a fork of ours would hang, too, on an open file of the mount."""
    cluster = Cluster(base / "c", iods=1)
    cluster.start()
    mounting.mount_in_background(cluster.config_path, point, ("timeout=inf", "attr_timeout=0"))
    data = base / "data"
    data.write_bytes(bytes(range(256)) * 4096)
    for name, command in (
        ("iod1", ["dd", f"if={data}", f"of={point}/f", "bs=64k", "conv=fsync", "status=none"]),
        ("mds0", ["mkdir", f"{point}/d"]),
    ):
        cluster.kill(name)
        user = subprocess.Popen(command)
        with pytest.raises(subprocess.TimeoutExpired):
            user.wait(4)
        cluster.start(name)
        assert user.wait(30) == 0
    assert (point / "f").read_bytes() == data.read_bytes()
    mounting.unmount(point)
    cluster.stop()


# ---------------------------------------------------------------- strangers


def memory(pid: int) -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def attack(rng: random.Random, sock: socket.socket) -> None:
    """Say something that is no handshake, or a part of one, or nothing."""
    frame = encode_frame(Kind.HANDSHAKE, 0, rng.randbytes(200))
    said = rng.choice((
        b"", b"GET / HTTP/1.1\r\n\r\n", rng.randbytes(rng.randrange(1, 5000)), bytes(100_000),
        frame[: rng.randrange(len(frame))], frame, b"\xff" * 64, frame[:8] + rng.randbytes(500),
    ))  # fmt: skip
    sock.setblocking(False)
    try:
        sock.send(said)
    except (BlockingIOError, ConnectionError):
        pass


async def test_strangers_on_every_port_do_no_harm(base: Path) -> None:
    rng = random.Random(5)
    cluster = await threaded(lambda: Cluster(base / "c"))
    await threaded(cluster.start)
    pids = {name: cluster.pid(name) for name in cluster.names}
    config = cluster.config
    listening = [(one.address, one.socket) for one in config.mds]
    listening += [(one.address, one.socket) for one in config.iod]
    places: list[tuple[int, tuple[str, int] | str]] = []
    for address, path in listening:
        places += [(socket.AF_INET, parse_address(address)), (socket.AF_UNIX, path)]
    data = rng.randbytes(2 * MIB)
    async with Volume.open(config, cluster.key) as volume:
        handle, _ = await volume.create_file(
            ROOT, b"f", stat.S_IFREG | 0o644, uid=0, gid=0, exclusive=True
        )
        await volume.write(handle, 0, data)
        await volume.fsync(handle)
        before = {name: memory(pid) for name, pid in pids.items() if pid}
        with ExitStack() as stack:
            for round_number in range(6):
                for family, target in places:
                    for _ in range(50):
                        sock = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
                        sock.settimeout(5)
                        sock.connect(target)
                        attack(rng, sock)
                    await trio.lowlevel.checkpoint()
                with trio.fail_after(20):  # those who know us are served, and newcomers too
                    assert bytes(await volume.read(handle, 0, 2 * MIB)) == data
                    async with Volume.open(config, cluster.key) as other:
                        name = b"%d" % round_number
                        await other.create(ROOT, name, stat.S_IFDIR | 0o755, uid=0, gid=0)
        await volume.release(handle)
    for daemon, pid in pids.items():
        assert cluster.pid(daemon) == pid
        assert memory(pid or 0) - before[daemon] < 64 * MIB
        assert len(cluster.log(daemon)) < 100_000
    await threaded(cluster.stop)
