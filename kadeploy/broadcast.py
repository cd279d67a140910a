"""One image to many nodes through the broadcast engine: the head is the source.

Position: deploying.py (when) -> this -> common/broadcast (how).  On every node the node's program
(`receive`) starts a hop that feeds what it gets to a writer, which reads back and answers.  The job
with its token goes to the nodes over ssh.

A node that cannot be started is left out; one that is lost on the way costs itself alone.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio

from common import log
from common.broadcast.cost import Network
from common.broadcast.job import Job, encode_job
from common.broadcast.node import HopOptions
from common.broadcast.planner import Request, make_plan
from common.broadcast.source import Source
from common.broadcast.transfer import Progress, new_job, run_source
from common.errors import Code, KaError, first_error
from common.sizes import format_size
from common.sockets import listen
from kadeploy.head import Report
from kadeploy.links import SshLink
from kadeploy.orders import WriteImage, to_json

__all__ = ["Receiver", "broadcast"]

LINK_RATE = 110e6
LATENCY_S = 0.0002
START_S = 30.0
OPTIONS = HopOptions(
    silence_s=5.0, attach_s=2.0, stall_s=30.0, join_s=10.0, lost_grace_s=10.0, quiet_s=300.0
)
"""A node unpacks, writes and reads back while it relays: it may be silent for seconds and be well,
and what it reads back in the end may take it minutes."""
LINE_SIZE_MAX = 1 << 20
_logger = log.get("kadeploy.broadcast")


class Receiver:
    """A node's part: its program, started and waiting for the job."""

    def __init__(self, name: str, link: SshLink, order: WriteImage, listen_on: str) -> None:
        self.name = name
        self._link = link
        self._order = order
        self._listen_on = listen_on
        self.address = ""
        self.ready = trio.Event()
        self.job: Job | None = None
        self.go = trio.Event()
        self._rank = 0

    def begin(self, job: Job | None, rank: int) -> None:
        """Give the job to the node; None: it is not wanted."""
        self.job, self._rank = job, rank
        self.go.set()

    async def run(self, report: Report) -> None:
        fault, note = "", ""
        try:
            note = _note(await self._take_part())
        except KaError as error:
            fault = str(error)
        self.ready.set()
        report(self.name, fault, note)

    async def _take_part(self) -> dict[str, Any]:
        """Return the node's answer when it has the image; raises KaError with what went wrong."""
        await self._link.push()
        async with self._link.started("receive", self._listen_on) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                await process.stdin.send_all(json.dumps(to_json(self._order)).encode() + b"\n")
                lines = bytearray()
                with trio.move_on_after(START_S):
                    while b"\n" not in lines and len(lines) < LINE_SIZE_MAX:
                        data = await process.stdout.receive_some(4096)
                        if not data:
                            break
                        lines += data
                if b"\n" not in lines:
                    raise KaError(Code.EIO, "its receiver did not start")
                first, _, rest = bytes(lines).partition(b"\n")
                if first.startswith(b"{"):
                    self._link.answer(process, first)  # a refusal
                    raise KaError(Code.EIO, "its receiver did not start")
                self.address = first.decode(errors="replace").strip()
                self.ready.set()
                await self.go.wait()
                if self.job is None:
                    raise KaError(Code.EIO, "the broadcast was not begun")
                word = base64.b64encode(encode_job(self.job)).decode()
                await process.stdin.send_all(f"{self._rank} {word}\n".encode())
            except trio.BrokenResourceError:
                raise KaError(Code.EIO, "its receiver ended early") from None
            said = bytearray(rest)
            async for data in process.stdout:
                said += data[: LINE_SIZE_MAX - len(said)]
            await process.wait()
            return self._link.answer(process, bytes(said))


def _note(answer: Mapping[str, Any]) -> str:
    """Return what is to be told of a node that has the image."""
    there, content = answer.get("there_size"), answer.get("content_size")
    if isinstance(there, int) and isinstance(content, int) and there > 0:
        return f"{format_size(there)} of {format_size(content)} were there already"
    return ""


async def broadcast(
    image: Path,
    receivers: Mapping[str, Receiver],
    listen_on: str,
    report: Report,
) -> int:
    """Send an image; report every node; return how many bytes of it left this host.

    Raises KaError when the source cannot be read.
    """
    source = Source(str(image))
    await trio.to_thread.run_sync(source.scan)
    sockets = listen(f"{listen_on}:0")
    host, port = sockets[0].getsockname()[:2]
    try:
        async with contextlib.AsyncExitStack() as stack:
            for sock in sockets:
                stack.enter_context(sock)
            nursery = await stack.enter_async_context(trio.open_nursery())
            for one in receivers.values():
                nursery.start_soon(one.run, report)
            for one in receivers.values():
                await one.ready.wait()
            there = [one for one in receivers.values() if one.address]
            if not there:
                source.close()
                return 0
            network = Network(LINK_RATE, LINK_RATE, latency_s=LATENCY_S)
            choice = make_plan(Request(source.size, (len(there),), network)).chosen
            addresses = [f"{host}:{port}", *(one.address for one in there)]
            job = new_job(choice.shape, addresses, OPTIONS)
            for rank, one in enumerate(there, start=1):
                one.begin(job, rank)
            sent_size = 0

            def on_progress(progress: Progress) -> None:
                nonlocal sent_size
                sent_size = progress.sent_size

            summary = await run_source(
                job,
                source,
                sockets=sockets,
                name=image.name,
                chunk_size=choice.chunk_size,
                on_progress=on_progress,
            )
    except BaseExceptionGroup as group:
        raise first_error(group) from None
    for rank, one in enumerate(there, start=1):
        if entry := summary.others.get(rank):
            _logger.warning("send.failed", node=one.name, reason=entry.reason)
        elif note := summary.notes.get(rank):
            _logger.warning("send.noted", node=one.name, note=note)
    _logger.info("send.ended", image=image.name, size=source.size, sent_size=sent_size)
    return sent_size
