"""An image down the broadcast chain to nodes that are processes here: all real but ssh."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from kadeploy import archive
from kadeploy.broadcast import Receiver, broadcast
from kadeploy.links import SshLink, SshOptions
from kadeploy.orders import WriteImage
from tests.support.loop_disk import Node

__all__ = ["send"]

ADDRESS = "127.0.0.1"


class _LocalLink(SshLink):
    """A node whose program is started here, from the one file that it would get."""

    def __init__(self, name: str, directory: Path) -> None:
        super().__init__(name, SshOptions())
        self._node = Node(directory)
        self._program = directory / "node.pyz"

    async def push(self) -> None:
        self._program.write_bytes(archive.build())

    @asynccontextmanager
    async def started(self, *words: str) -> AsyncIterator[trio.Process]:
        process = await trio.lowlevel.open_process(
            [sys.executable, str(self._program), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._node.environment,
        )
        try:
            yield process
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


def send(image: Path, orders: Mapping[str, WriteImage], directory: Path) -> dict[str, str]:
    """Broadcast an image as the head does; return what was reported of each node ("": good)."""
    reports: dict[str, str] = {}

    def report(name: str, fault: str) -> None:
        reports[name] = fault

    async def go() -> None:
        receivers = {}
        for name, order in orders.items():
            own = directory / name
            own.mkdir(exist_ok=True)
            receivers[name] = Receiver(name, _LocalLink(name, own), order, ADDRESS)
        with trio.fail_after(120):
            await broadcast(image, receivers, ADDRESS, report)

    trio.run(go)
    return reports
