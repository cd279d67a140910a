"""`Volume` against real daemons over real sockets: data, names, sessions, and daemons that end.

No FUSE.  Daemons are killed and started again; a proxy loses answers.
"""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from common.errors import Code, KaError
from common.framing import BODY_SIZE_MAX
from nfsp import status, wire
from nfsp.client.volume import Volume
from nfsp.model import ROOT, XATTR_VALUE_SIZE_MAX
from tests.conftest import TOKEN
from tests.support.running import CHUNK_SIZE, Cluster, wait_until
from tests.support.volumes import (
    content,
    fresh,
    make,
    opened,
    stored,
    threaded,
    through_proxy,
    until,
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix=f"ka-{TOKEN}-") as name:
        made = Cluster(Path(name) / "c", timeout_s=20)
        made.start()
        yield made
        made.start()
        report = made.fsck(verify=True)
        made.stop()
        assert not report.results


# ---------------------------------------------------------------- data


async def test_a_files_chunks_lie_on_all_iods(cluster: Cluster) -> None:
    data = random.Random(1).randbytes(6 * CHUNK_SIZE)
    async with opened(cluster) as volume:
        handle, inode = await make(volume, fresh(), data)
        await volume.fsync(handle)
        await volume.release(handle)
    for name in cluster.names[:-1]:
        mine = [p for p in cluster.chunk_files(name) if p.name.startswith(f"{inode.ino:x}.")]
        assert len(mine) == 1
        assert mine[0].stat().st_size == 2 * (4096 + CHUNK_SIZE)


async def test_holes_read_as_zeros_and_store_nothing(cluster: Cluster) -> None:
    name, at = fresh(), 5 << 32
    async with opened(cluster) as volume:
        handle, inode = await make(volume, name)
        await volume.write(handle, at, b"end")
        assert await volume.read(handle, at - 5, 100) == bytes(5) + b"end"
        assert await volume.read(handle, 1 << 32, 1000) == bytes(1000)
        await volume.fsync(handle)
        await volume.release(handle)
        assert (await volume.lookup(ROOT, name)).size == at + 3
    assert sum(path.stat().st_blocks * 512 for path in stored(cluster, inode.ino)) < 1 << 20


@pytest.mark.parametrize("cut", [0, 1, 4096, 32768, 65535, 65536, 200_000, 393_215])
async def test_what_a_truncation_cuts_never_comes_back(cluster: Cluster, cut: int) -> None:
    data, name = random.Random(cut).randbytes(6 * CHUNK_SIZE), fresh()
    async with opened(cluster) as volume:
        handle, inode = await make(volume, name, data)
        await volume.setattr(inode.ino, wire.SET_SIZE, size=cut)
        assert await volume.read(handle, 0, 1 << 20) == data[:cut]
        await volume.setattr(inode.ino, wire.SET_SIZE, size=len(data))
        expected = data[:cut] + bytes(len(data) - cut)
        assert await volume.read(handle, 0, 1 << 20) == expected
        await volume.write(handle, len(data) + 10, b"x")
        await volume.release(handle)
        assert await content(volume, name) == expected + bytes(10) + b"x"


@pytest.mark.parametrize("seed", range(4))
async def test_overlapping_writes_take_effect_in_their_order(cluster: Cluster, seed: int) -> None:
    rng, name = random.Random(seed), fresh()
    model = bytearray()
    async with opened(cluster) as volume:
        handle, inode = await make(volume, name)
        for _ in range(150):
            at, size = rng.randrange(5 * CHUNK_SIZE), rng.choice([1, 700, 4096, 50_000, 90_000])
            data = rng.randbytes(size)
            model.extend(bytes(max(0, at + size - len(model))))
            model[at : at + size] = data
            await volume.write(handle, at, data)
            if rng.random() < 0.15:
                at = rng.randrange(len(model))
                assert await volume.read(handle, at, 80_000) == model[at : at + 80_000]
            if rng.random() < 0.05:
                size = rng.randrange(len(model))
                del model[size:]
                await volume.setattr(inode.ino, wire.SET_SIZE, size=size)
        await volume.release(handle)
        assert await content(volume, name) == model


async def test_closing_here_shows_there(cluster: Cluster) -> None:
    name = fresh()
    async with opened(cluster) as one, opened(cluster) as two:
        handle, _ = await make(one, name, b"first")
        await one.flush(handle)
        assert await content(two, name) == b"first"
        await one.write(handle, 5, b" second")
        await one.flush(handle)
        await one.release(handle)
        assert await content(two, name) == b"first second"
        other, inode, _ = await two.open_file(
            (await two.lookup(ROOT, name)).ino, writable=True
        )
        await two.write(other, inode.size, b" third")  # as O_APPEND does
        await two.flush(other)
        assert await content(one, name) == b"first second third"
        await two.release(other)


async def test_pages_of_an_unchanged_file_may_be_kept(cluster: Cluster) -> None:
    name = fresh()
    async with opened(cluster) as one, opened(cluster) as two:
        handle, inode = await make(one, name, b"data")
        await one.release(handle)

        async def unchanged() -> bool:
            handle, _, kept = await one.open_file(inode.ino, writable=False)
            await one.release(handle)
            return kept

        await unchanged()
        assert await unchanged()
        other, _, _ = await two.open_file(inode.ino, writable=True)
        await two.write(other, 0, b"DATA")
        await two.release(other)
        assert not await unchanged()


async def test_statfs_sums_the_iods_and_counts_inodes(cluster: Cluster) -> None:
    async with opened(cluster) as volume:
        usage = await volume.statfs()
        assert usage.total > 0
        assert 0 < usage.available <= usage.free <= usage.total
        await threaded(cluster.kill, "iod2")
        assert (await volume.statfs()).total > 0
        await threaded(cluster.start)


# ---------------------------------------------------------------- open and unlinked


async def test_fsck_reads_more_records_than_one_answer_can_hold(cluster: Cluster) -> None:
    async with opened(cluster) as volume:
        handle, inode = await make(volume, fresh(), b"")
        for number in range(2 * BODY_SIZE_MAX // XATTR_VALUE_SIZE_MAX):
            value = bytes(XATTR_VALUE_SIZE_MAX)
            await volume.setxattr(inode.ino, b"user.%d" % number, value)
        await volume.release(handle)
    report = await threaded(cluster.fsck)
    assert not report.results
    assert not report.unchecked


async def test_an_unlinked_file_lives_until_its_last_close(cluster: Cluster) -> None:
    name, data = fresh(), random.Random(2).randbytes(4 * CHUNK_SIZE)
    async with opened(cluster) as one, opened(cluster) as two:
        mine, inode = await make(one, name, data)
        await one.flush(mine)
        yours, _, _ = await two.open_file(inode.ino, writable=False)
        await one.unlink(ROOT, name)
        await one.release(mine)
        await one.sync()
        assert await two.read(yours, 0, 1 << 20) == data
        assert (await two.getattr(inode.ino)).nlink == 0
        assert stored(cluster, inode.ino)
        await two.release(yours)
        await until(lambda: not stored(cluster, inode.ino), "the chunks are purged")
        with pytest.raises(KaError) as caught:
            await two.getattr(inode.ino)
        assert caught.value.code is Code.ESTALE


async def test_an_unlinked_open_file_survives_a_restart_of_the_mds(cluster: Cluster) -> None:
    name, data = fresh(), random.Random(3).randbytes(4 * CHUNK_SIZE)
    async with opened(cluster) as volume:
        handle, inode = await make(volume, name, data)
        await volume.unlink(ROOT, name)
        await threaded(cluster.restart, "mds0")
        assert (await volume.getattr(inode.ino)).nlink == 0
        await volume.write(handle, len(data), b"more")
        await volume.fsync(handle)
        assert await volume.read(handle, 0, 1 << 20) == data + b"more"
        await volume.release(handle)
        await until(lambda: not stored(cluster, inode.ino), "the chunks are purged")


# ---------------------------------------------------------------- daemons that end


@pytest.mark.parametrize("victim", ["iod1", "mds0"])
async def test_killing_a_daemon_under_writes_loses_nothing(cluster: Cluster, victim: str) -> None:
    names = [fresh() for _ in range(4)]
    data = {name: random.Random(name).randbytes(30 * CHUNK_SIZE + 17) for name in names}

    async def write(volume: Volume, name: bytes) -> None:
        handle, _ = await make(volume, name)
        for at in range(0, len(data[name]), 10_000):
            await volume.write(handle, at, data[name][at : at + 10_000])
            if at % 100_000 == 0:
                await volume.fsync(handle)
        await volume.fsync(handle)
        await volume.release(handle)

    async with opened(cluster) as volume:
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(write, volume, name)
            for _ in range(3):
                await threaded(cluster.restart, victim)
        for name in names:
            assert await content(volume, name) == data[name]


async def test_an_unlink_needs_no_iod_and_is_finished_when_it_is_back(cluster: Cluster) -> None:
    name = fresh()
    async with opened(cluster) as volume:
        handle, inode = await make(volume, name, bytes(range(256)) * 1024)
        await volume.release(handle)
        await threaded(cluster.kill, "iod1", "iod2", "iod3")
        with trio.fail_after(5):
            await volume.unlink(ROOT, name)
        await threaded(cluster.restart, "mds0")  # the queue is on record
        await threaded(cluster.start)
        await until(lambda: not stored(cluster, inode.ino), "the chunks are purged")


@pytest.mark.parametrize("restart", [False, True])
async def test_a_truncation_waits_for_an_iod_that_is_down(cluster: Cluster, restart: bool) -> None:
    name, data = fresh(), random.Random(4).randbytes(6 * CHUNK_SIZE)
    async with opened(cluster) as volume:
        handle, inode = await make(volume, name, data)
        await volume.fsync(handle)
        await threaded(cluster.kill, "iod2")
        async with trio.open_nursery() as nursery:
            cut = CHUNK_SIZE + 100

            async def truncate() -> None:
                await volume.setattr(inode.ino, wire.SET_SIZE, size=cut)

            nursery.start_soon(truncate)
            async with opened(cluster) as other:  # the size changes at once, for everybody
                while (await other.getattr(inode.ino)).size != cut:  # noqa: ASYNC110
                    await trio.sleep(0.02)
            if restart:
                await threaded(cluster.restart, "mds0")
            await threaded(cluster.start)
        await volume.setattr(inode.ino, wire.SET_SIZE, size=len(data))
        await volume.release(handle)
        assert await content(volume, name) == data[:cut] + bytes(len(data) - cut)


async def test_a_missing_iod_is_an_error_when_patience_is_over(cluster: Cluster) -> None:
    mount = replace(cluster.config.mount, timeout_s=1.0)
    async with Volume.open(cluster.config, cluster.key, mount=mount) as volume:
        handle, inode = await make(volume, fresh())
        await threaded(cluster.kill, "iod1", "iod2", "iod3")
        with trio.fail_after(10):
            await volume.write(handle, 0, b"lost")
            with pytest.raises(KaError) as caught:
                await volume.fsync(handle)
            assert caught.value.code.errno == Code.EIO.errno
            reader, _, _ = await volume.open_file(inode.ino, writable=False)
        await threaded(cluster.start)
        await volume.write(handle, 0, b"kept")
        await volume.fsync(handle)
        assert bytes(await volume.read(reader, 0, 10)) == b"kept"
        await volume.release(reader)
        await volume.release(handle)


# ---------------------------------------------------------------- stable storage


async def syncs(cluster: Cluster) -> int:
    """How many syncs of chunk files the iods were asked for."""
    found = await status.gather(cluster.config, cluster.key)
    name = "nfsp_iod_requests_total{operation=SyncChunks}"
    return sum(int(iod["metrics"].get(name, 0)) for iod in found["iod"])


async def test_fsync_reaches_what_was_written_through_an_earlier_handle(cluster: Cluster) -> None:
    async with opened(cluster) as volume:
        handle, inode = await make(volume, fresh(), bytes(3 * CHUNK_SIZE))
        await volume.flush(handle)
        await volume.release(handle)
        handle, _, _ = await volume.open_file(inode.ino, writable=False)
        before = await syncs(cluster)
        await volume.fsync(handle)
        assert await syncs(cluster) == before + 3
        await volume.fsync(handle)
        assert await syncs(cluster) == before + 3
        await volume.release(handle)


async def test_a_second_fsync_waits_for_what_the_first_has_begun(cluster: Cluster) -> None:
    async with opened(cluster) as volume:
        handle, _ = await make(volume, fresh(), bytes(3 * CHUNK_SIZE))
        await handle.file.settle()
        cluster.signal(signal.SIGSTOP, "iod2")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(volume.fsync, handle)
                with trio.move_on_after(0.3) as scope:
                    await volume.fsync(handle)
                assert scope.cancelled_caught
                cluster.signal(signal.SIGCONT, "iod2")
        finally:
            cluster.signal(signal.SIGCONT, "iod2")
        await volume.release(handle)


@pytest.mark.skipif(os.geteuid() != 0, reason="pretends that the machine was restarted: needs root")
async def test_fsync_fails_once_if_the_iods_machine_was_restarted(cluster: Cluster) -> None:
    """The iod cannot know what it had in memory; the writer must not believe that it is safe."""
    async with opened(cluster) as volume:
        handle, _ = await make(volume, fresh(), bytes(3 * CHUNK_SIZE))
        await handle.file.settle()
        boot = cluster.directory / "boot_id"
        boot.write_text("01234567-89ab-cdef-0123-456789abcdef\n")
        await threaded(cluster.kill, "iod2")
        process = await threaded(start_in_another_boot, cluster, boot)
        try:
            with pytest.raises(KaError) as caught:
                await volume.fsync(handle)
            assert caught.value.code is Code.DATA_LOST
            await volume.fsync(handle)
            await volume.write(handle, CHUNK_SIZE, bytes(10))
            await volume.fsync(handle)
            await volume.release(handle)
        finally:
            await threaded(cluster.kill, "iod2")
            await threaded(process.wait)
            await threaded(cluster.start)


def start_in_another_boot(cluster: Cluster, boot: Path) -> subprocess.Popen[bytes]:
    command = (
        f"mount --bind {boot} /proc/sys/kernel/random/boot_id && "
        f"exec {sys.executable} -m nfsp -c {cluster.config_path} iod 2"
    )
    process = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", command], stderr=subprocess.DEVNULL
    )
    wait_until(lambda: cluster.pid("iod2"), "it runs")
    return process


# ---------------------------------------------------------------- exactly once


async def test_a_mutation_whose_answer_is_lost_is_not_repeated(cluster: Cluster) -> None:
    names = [fresh() for _ in range(4)]
    async with through_proxy(cluster) as (proxy, volume):
        proxy.lose_answers = True
        handle, inode = await make(volume, names[0], b"data")
        proxy.lose_answers = True
        await volume.flush(handle)
        await volume.release(handle)
        proxy.lose_answers = True
        after = await volume.link(inode.ino, ROOT, names[1])
        assert after.nlink == 2
        proxy.lose_answers = True
        await volume.rename(ROOT, names[1], ROOT, names[2])
        proxy.lose_answers = True
        await volume.unlink(ROOT, names[2])
        proxy.lose_answers = True
        await volume.create(ROOT, names[3], stat.S_IFDIR | 0o755, uid=0, gid=0)
        proxy.lose_answers = True
        await volume.setxattr(inode.ino, b"user.x", b"1", 1)  # XATTR_CREATE
        proxy.lose_answers = True
        await volume.removexattr(inode.ino, b"user.x")
        proxy.lose_answers = True
        await volume.rmdir(ROOT, names[3])
        assert proxy.lost_count == 9
        final = await volume.getattr(inode.ino)
        assert (final.nlink, final.size) == (1, 4)


async def test_answers_are_remembered_over_a_restart_of_the_mds(cluster: Cluster) -> None:
    name = fresh()
    async with through_proxy(cluster) as (proxy, volume):
        proxy.lose_answers = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                lambda: volume.create(ROOT, name, stat.S_IFDIR | 0o755, uid=0, gid=0)
            )
            await proxy.lost.wait()
            await threaded(cluster.restart, "mds0")
        await volume.rmdir(ROOT, name)


# ---------------------------------------------------------------- who may come in


async def test_a_wrong_key_is_refused_at_once(cluster: Cluster) -> None:
    with trio.fail_after(5), pytest.raises(KaError) as caught:
        async with Volume.open(cluster.config, bytes(32)):
            pass
    assert caught.value.code is Code.AUTH


async def test_another_cluster_is_refused_at_once(cluster: Cluster) -> None:
    elsewhere = replace(cluster.config, cluster=replace(cluster.config.cluster, id="other"))
    with trio.fail_after(5), pytest.raises(KaError) as caught:
        async with Volume.open(elsewhere, cluster.key):
            pass
    assert caught.value.code is Code.WRONG_CLUSTER
