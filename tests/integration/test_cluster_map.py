"""The cluster map in motion: what happens to a client when iods join while it works."""

from __future__ import annotations

import socket
from pathlib import Path

import trio

from nfsp import wire
from nfsp.client.volume import Volume
from nfsp.model import ROOT
from tests.support.running import Cluster


def _add_iod(cluster: Cluster, number: int) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    lines = [
        "", "[[iod]]", f"id = {number}", f'address = "127.0.0.1:{port}"', f'data = "iod{number}"',
    ]  # fmt: skip
    with cluster.config_path.open("a") as file:
        file.write("\n".join(lines) + "\n")
    cluster.names.insert(-1, f"iod{number}")


async def test_client_follows_the_map_when_an_iod_joins(short_path: Path) -> None:
    cluster = await trio.to_thread.run_sync(lambda: Cluster(short_path / "c", iods=2))
    try:
        await trio.to_thread.run_sync(cluster.start)
        async with Volume.open(cluster.config, cluster.key, mountpoint="t") as volume:
            handle, old = await volume.create_file(
                ROOT, b"old", 0o100644, uid=0, gid=0, exclusive=True
            )
            await volume.write(handle, 0, b"before" * 100_000)
            await volume.flush(handle)
            first_epoch = volume.iods.epoch

            def join() -> None:
                cluster.kill("mds0")
                _add_iod(cluster, 3)
                cluster.start()

            await trio.to_thread.run_sync(join)
            # Whatever it asks an iod from here on is refused until it has fetched the map.
            await volume.write(handle, 0, b"after!" * 100_000)
            await volume.flush(handle)
            assert bytes(await volume.read(handle, 0, 6)) == b"after!"
            await volume.release(handle)
            while volume.iods.epoch == first_epoch:  # the mds announces it as it reaches each iod
                handle, _inode, _same = await volume.open_file(old.ino, writable=True)
                await volume.write(handle, 0, b"again!")
                await volume.flush(handle)
                await volume.release(handle)
                await trio.sleep(0.05)
            assert volume.iods.iods == [1, 2, 3]
            handle, new = await volume.create_file(
                ROOT, b"new", 0o100644, uid=0, gid=0, exclusive=True
            )
            assert new.layout is not None
            assert set(new.layout.chains) == {1, 2, 3}
            await volume.write(handle, 0, bytes(range(256)) * 4096)
            await volume.fsync(handle)
            await volume.release(handle)
            reply = await volume.iods.request(3, wire.ListChunks(0, 0, 10), wire.ListChunksReply)
            assert [item[0] for item in reply.files] == [new.ino]
    finally:
        await trio.to_thread.run_sync(cluster.stop)


async def test_first_file_that_begins_on_a_new_iod_can_be_written(short_path: Path) -> None:
    cluster = await trio.to_thread.run_sync(lambda: Cluster(short_path / "c", iods=2))
    try:
        await trio.to_thread.run_sync(cluster.start)
        async with Volume.open(cluster.config, cluster.key, mountpoint="t") as volume:

            def join() -> None:
                cluster.kill("mds0")
                _add_iod(cluster, 3)
                cluster.start()

            await trio.to_thread.run_sync(join)
            for number in range(3):  # inode numbers turn the beginning; no iod is asked meanwhile
                handle, inode = await volume.create_file(
                    ROOT, b"%d" % number, 0o100644, uid=0, gid=0, exclusive=True
                )
                assert inode.layout is not None
                if inode.layout.chains[0] == 3:
                    break
                await volume.release(handle)
            else:
                raise AssertionError("no file begins on the new iod")
            await volume.write(handle, 0, b"data")
            await volume.fsync(handle)
            await volume.release(handle)
    finally:
        await trio.to_thread.run_sync(cluster.stop)
