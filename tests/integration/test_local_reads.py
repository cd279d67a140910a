"""A client on the iods' host reads their files itself, and is as right as one that is not."""

from __future__ import annotations

import os
import random
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import metrics
from common.errors import Code, KaError
from nfsp import wire
from nfsp.client.files import Handle
from nfsp.client.volume import LAYOUT_XATTR, Volume
from nfsp.model import Inode
from tests.conftest import TOKEN
from tests.support.running import Cluster
from tests.support.volumes import content, fresh, make, opened, stored

CHUNK_SIZE = 1 << 20
SEED = int(os.environ.get("KA_LOCAL_SEED", "1"))
ROUNDS = int(os.environ.get("KA_LOCAL_ROUNDS", "25"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix=f"ka-{TOKEN}-") as name:
        made = Cluster(Path(name) / "c")
        made.start()
        yield made
        made.stop()


async def make_striped(volume: Volume, name: bytes, data: bytes = b"") -> tuple[Handle, Inode]:
    """Make a file whose chunks are large enough to be read locally."""
    handle, inode = await make(volume, name)
    await volume.release(handle)
    await volume.setxattr(inode.ino, LAYOUT_XATTR, f"chunk_size={CHUNK_SIZE}".encode())
    handle, inode, _ = await volume.open_file(inode.ino, writable=True)
    if data:
        await volume.write(handle, 0, data)
        await volume.flush(handle)
    return handle, inode


def read_locally() -> int:
    return int(metrics.values().get("nfsp_local_read_bytes_total", 0))


async def test_large_pieces_do_not_pass_through_the_iods(cluster: Cluster) -> None:
    data = secrets.token_bytes(7 * CHUNK_SIZE + 300_000)
    async with opened(cluster) as volume:
        handle, _ = await make_striped(volume, fresh(), data)
        before = read_locally()
        assert bytes(await volume.read(handle, 0, len(data) + 1)) == data
        assert read_locally() - before >= len(data)
        await volume.release(handle)


async def test_damage_in_a_file_read_locally_is_an_error_never_data(cluster: Cluster) -> None:
    data = secrets.token_bytes(3 * CHUNK_SIZE)
    async with opened(cluster) as volume:
        handle, inode = await make_striped(volume, fresh(), data)
        await volume.fsync(handle)
        path = stored(cluster, inode.ino)[0]
        with path.open("r+b") as file:
            file.seek(500_000)
            byte = file.read(1)[0]
            file.seek(500_000)
            file.write(bytes([byte ^ 4]))
        refused = []
        for at in range(0, len(data), CHUNK_SIZE):
            try:
                assert await volume.read(handle, at, CHUNK_SIZE) == data[at : at + CHUNK_SIZE]
            except KaError as error:
                refused.append(error.code)
        assert refused == [Code.CHUNK_CORRUPT]
        await volume.release(handle)


async def test_what_another_mount_wrote_and_cut_is_read_at_once(cluster: Cluster) -> None:
    rng, name = random.Random(SEED), fresh()
    model = bytearray(rng.randbytes(5 * CHUNK_SIZE))
    async with opened(cluster) as writer, opened(cluster) as reader:
        handle, inode = await make_striped(writer, name, bytes(model))
        assert await content(reader, name) == model
        before = read_locally()
        for _ in range(ROUNDS):
            offset = rng.randrange(6 * CHUNK_SIZE)
            if rng.random() < 0.3:
                size = rng.choice((0, offset, len(model)))
                await writer.setattr(inode.ino, wire.SET_SIZE, size=size)
                model = model[:size].ljust(size, b"\0")
            else:
                data = rng.randbytes(rng.choice((1, 5000, 300_000, CHUNK_SIZE, 2 * CHUNK_SIZE)))
                await writer.write(handle, offset, data)
                await writer.flush(handle)
                model = model.ljust(offset, b"\0")
                model[offset : offset + len(data)] = data
            assert await content(reader, name) == model
        assert read_locally() > before
        await writer.release(handle)


async def test_who_cannot_open_the_files_reads_through_the_iods(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = secrets.token_bytes(3 * CHUNK_SIZE)
    async with opened(cluster) as volume:
        handle, _ = await make_striped(volume, fresh(), data)
        opening = os.open

        def refuse(path: str | bytes, *arguments: int) -> int:
            if os.fsencode(path).startswith(os.fsencode(cluster.directory)):
                raise PermissionError(13, "another user's")
            return opening(path, *arguments)

        monkeypatch.setattr(os, "open", refuse)
        before = read_locally()
        assert bytes(await volume.read(handle, 0, len(data))) == data
        assert read_locally() == before
        await volume.release(handle)
