"""Client sessions that run out: what they leave behind, and what they cost a client that lives."""

from __future__ import annotations

import secrets
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from common.errors import Code, KaError
from common.link import Link
from common.session import Identity
from nfsp import wire
from nfsp.client.volume import Volume
from nfsp.model import ROOT, Inode
from tests.conftest import TOKEN
from tests.support.running import Cluster
from tests.support.volumes import (
    content,
    fresh,
    make,
    opened,
    stored,
    through_proxy,
    until,
)

TTL_S = 1.5


@pytest.fixture(scope="module")
def hasty() -> Iterator[Cluster]:
    """A cluster whose sessions end soon."""
    with tempfile.TemporaryDirectory(prefix=f"ka-{TOKEN}-") as name:
        made = Cluster(Path(name) / "c", iods=1, session_ttl_s=TTL_S, timeout_s=20)
        made.start()
        yield made
        report = made.fsck(verify=True)
        made.stop()
        assert not report.results


async def die_with_open_file(cluster: Cluster, name: bytes) -> int:
    """Be a client that opens a file, unlinks it and vanishes."""
    identity = Identity(cluster.config.cluster.id, "client", "", secrets.token_bytes(16))
    mds = cluster.config.mds[0]
    link = Link("mds0", mds.address, mds.socket, identity=identity, key=cluster.key, patience_s=5)
    async with trio.open_nursery() as nursery:
        await nursery.start(link.run)

        async def ask(message: object) -> object:
            return wire.MDS.decode((await link.call(wire.MDS.encode(message)))[0])

        await ask(wire.SessionOpen("here", 1, "", False, 64))
        found = await ask(wire.Lookup(ROOT, name))
        assert isinstance(found, wire.InodeReply)
        inode = Inode.decode(found.inode)
        await ask(wire.Open(inode.ino, True))
        await ask(wire.Unlink(0, 1, ROOT, name))
        nursery.cancel_scope.cancel()
    return inode.ino


async def test_what_a_dead_client_had_open_is_purged_when_its_session_ends(hasty: Cluster) -> None:
    name = fresh()
    async with opened(hasty) as volume:
        handle, inode = await make(volume, name, b"data" * 10_000)
        await volume.release(handle)
        assert await die_with_open_file(hasty, name) == inode.ino
        assert stored(hasty, inode.ino)
        await until(lambda: not stored(hasty, inode.ino), "the chunks are purged")


@asynccontextmanager
async def cut_off(
    hasty: Cluster,
) -> AsyncIterator[tuple[Volume, Callable[[bool], Awaitable[None]]]]:
    """A volume, and a call that lets its session run out, for good if asked to."""
    async with through_proxy(hasty) as (proxy, volume):

        async def lose_session(for_good: bool) -> None:
            proxy.silence()
            await until(lambda: hasty.sessions() == 0, "the session has run out")
            if not for_good:
                proxy.speak()

        yield volume, lose_session


async def test_a_lost_session_costs_unreported_data_an_error_and_nothing_more(
    hasty: Cluster,
) -> None:
    name, other = fresh(), fresh()
    async with cut_off(hasty) as (volume, lose_session):
        for _ in range(5):
            await volume.setxattr(ROOT, b"user.x", b"1")
        handle, inode = await make(volume, name, b"reported")
        await volume.flush(handle)
        await volume.write(handle, 0, b"too late")
        await lose_session(False)
        with pytest.raises(KaError):
            await volume.flush(handle)
        await volume.write(handle, 8, b", later")
        await volume.flush(handle)
        await volume.release(handle)
        for index in range(200):  # every slot is usable
            await volume.setxattr(ROOT, b"user.x", b"%d" % index)
        await volume.removexattr(ROOT, b"user.x")
        handle, _ = await make(volume, other)
        await volume.release(handle)
        assert (await volume.getattr(inode.ino)).size == 15


async def test_mutations_under_way_when_the_session_ends_do_not_spoil_their_slots(
    hasty: Cluster,
) -> None:
    async with cut_off(hasty) as (volume, lose_session):
        for index in range(300):
            await volume.setxattr(ROOT, b"user.x", b"%d" % index)
        async with trio.open_nursery() as nursery:
            for index in range(20):
                nursery.start_soon(volume.setxattr, ROOT, b"user.y%d" % index, b"1")
            await lose_session(False)
        for index in range(300):
            await volume.setxattr(ROOT, b"user.x", b"%d" % index)
        for name in await volume.listxattr(ROOT):
            await volume.removexattr(ROOT, name)


async def test_a_file_purged_with_a_lost_session_is_stale_and_not_empty(hasty: Cluster) -> None:
    name, data = fresh(), b"data" * 10_000
    async with cut_off(hasty) as (volume, lose_session):
        handle, inode = await make(volume, name, data)
        await volume.flush(handle)
        await volume.unlink(ROOT, name)
        await lose_session(False)
        await until(lambda: not stored(hasty, inode.ino), "the chunks are purged")
        await volume.sync()
        for _ in range(2):
            with pytest.raises(KaError) as caught:
                await volume.read(handle, 0, 100)
            assert caught.value.code is Code.ESTALE
        await volume.release(handle)


async def test_a_writer_with_a_new_session_is_on_record_again(hasty: Cluster) -> None:
    """Its unreported chunks must go when it dies: no later growth may uncover them."""
    name = fresh()
    async with cut_off(hasty) as (volume, lose_session):
        handle, inode = await make(volume, name, b"short")
        await volume.flush(handle)
        await lose_session(False)
        await volume.write(handle, 5, b"secret" * 10_000)
        await handle.file.settle()
        await volume.getattr(inode.ino)
        handle.file.unreported = False  # nobody hears of it
        await lose_session(True)
    async with opened(hasty) as volume:
        await volume.setattr(inode.ino, wire.SET_SIZE, size=1000)
        assert await content(volume, name) == b"short" + bytes(995)


async def test_an_mds_that_slept_does_not_blame_its_clients(hasty: Cluster) -> None:
    name, data = fresh(), b"data" * 10_000
    async with opened(hasty) as volume:
        handle, _ = await make(volume, name, data)
        await volume.flush(handle)
        await volume.unlink(ROOT, name)
        hasty.signal(signal.SIGSTOP, "mds0")
        await trio.sleep(2 * TTL_S)
        hasty.signal(signal.SIGCONT, "mds0")
        await volume.write(handle, 0, b"DATA")
        await volume.fsync(handle)
        assert await volume.read(handle, 0, 1 << 20) == b"DATA" + data[4:]
        await volume.release(handle)
