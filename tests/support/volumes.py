"""Short words for tests that use `Volume` against a cluster of `tests.support.running`."""

from __future__ import annotations

import secrets
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import trio

from nfsp.client.files import Handle
from nfsp.client.volume import Volume
from nfsp.model import ROOT, Inode
from tests.support.proxy import Proxy, in_front_of_mds
from tests.support.running import Cluster, wait_until

__all__ = [
    "content", "fresh", "make", "opened", "stored", "threaded", "through_proxy", "until",
]  # fmt: skip

_T = TypeVar("_T")


async def threaded(call: Callable[..., _T], *arguments: object) -> _T:
    return await trio.to_thread.run_sync(lambda: call(*arguments))


async def until(condition: Callable[[], object], what: str) -> None:
    await threaded(wait_until, condition, what)


@asynccontextmanager
async def opened(cluster: Cluster) -> AsyncIterator[Volume]:
    async with Volume.open(cluster.config, cluster.key) as volume:
        yield volume


@asynccontextmanager
async def through_proxy(cluster: Cluster) -> AsyncIterator[tuple[Proxy, Volume]]:
    async with (
        in_front_of_mds(cluster.config) as (proxy, config),
        Volume.open(config, cluster.key) as volume,
    ):
        yield proxy, volume


def fresh() -> bytes:
    return secrets.token_hex(8).encode()


async def make(volume: Volume, name: bytes, data: bytes = b"") -> tuple[Handle, Inode]:
    handle, inode = await volume.create_file(
        ROOT, name, stat.S_IFREG | 0o644, uid=0, gid=0, exclusive=True
    )
    if data:
        await volume.write(handle, 0, data)
    return handle, inode


async def content(volume: Volume, name: bytes) -> bytes:
    inode = await volume.lookup(ROOT, name)
    handle, inode, _ = await volume.open_file(inode.ino, writable=False)
    try:
        return bytes(await volume.read(handle, 0, inode.size + 1))
    finally:
        await volume.release(handle)


def stored(cluster: Cluster, ino: int) -> list[Path]:
    """The chunk files of an inode on all iods."""
    return [
        path
        for name in cluster.names[:-1]
        for path in cluster.chunk_files(name)
        if path.name.startswith(f"{ino:x}.")
    ]
