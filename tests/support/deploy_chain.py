"""An image down the broadcast chain to nodes that are processes here: all real but ssh."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import trio

from kadeploy import archive
from kadeploy.broadcast import Receiver, broadcast
from kadeploy.links import SshLink, SshOptions
from kadeploy.orders import WriteImage
from tests.support.loop_disk import Node

__all__ = ["Sent", "send", "sending"]

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
            # What it keeps while it works goes with the directory: it is killed at the end.
            env={**self._node.environment, "TMPDIR": str(self._program.parent)},
        )
        try:
            yield process
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


class Sent(NamedTuple):
    """What a broadcast came to, by node where it says."""

    reports: dict[str, str]
    """What went wrong; "": nothing."""
    notes: dict[str, str]
    size: int
    """Bytes of the image that left the head."""


def send(image: Path, orders: Mapping[str, WriteImage], directory: Path) -> dict[str, str]:
    """Broadcast an image as the head does; return what was reported of each node ("": good)."""
    return trio.run(sending, image, orders, directory).reports


async def sending(image: Path, orders: Mapping[str, WriteImage], directory: Path) -> Sent:
    """Broadcast an image as the head does."""
    sent = Sent({}, {}, 0)

    def report(name: str, fault: str, note: str = "", /) -> None:
        sent.reports[name], sent.notes[name] = fault, note

    receivers = {}
    for name, order in orders.items():
        own = directory / name
        own.mkdir(exist_ok=True)
        receivers[name] = Receiver(name, _LocalLink(name, own), order, ADDRESS)
    with trio.fail_after(120):
        return sent._replace(size=await broadcast(image, receivers, ADDRESS, report))
