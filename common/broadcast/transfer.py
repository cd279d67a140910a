"""A transfer: what karun and kadeploy call to send something to many nodes.

    source = Source(path); source.scan()                 # how much is there?
    job = new_job(plan.chosen.shape, addresses)          # the planner's shape; an address each
    summary = await run_source(job, source, ...)         # here
    await run_node(job, rank, FileSink(path), ...)       # in a process on every node

Every process listens (`listen`) before its address is put into the job, and gets the job by a way
that keeps its token secret.  `run_source` returns what became of every node; its `exit_code` is 0
when all have verified the data, 2 when some have, 1 when none has.  A node's own summary is of
itself alone.  Cancelling either ends its part; the other nodes go on as after a crash.
"""

from __future__ import annotations

import dataclasses
import functools
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio

from common import checksum
from common.broadcast.job import Job
from common.broadcast.manifest import Algorithm
from common.broadcast.node import Finished, HopOptions
from common.broadcast.outcome import Summary
from common.broadcast.relay import Relay
from common.broadcast.source import Source
from common.broadcast.store import Sink
from common.broadcast.topology import SOURCE, Shape
from common.errors import Code, KaError

__all__ = ["Progress", "new_job", "run_node", "run_source"]

TOKEN_SIZE = 32
SLOW_SINK_RATE = 25e6
"""Bytes a second that the slowest disk is trusted to read back when the network has nothing to
do: the source is as patient as that, for a node is silent meanwhile."""
SLOW_SINK_FILE_RATE = 1000
"""Files a second, likewise."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a node is; at the source: how far all are."""

    chunk_count: int
    have_count: int
    """Chunks that this node has."""
    total_count: int
    """Chunks that this node and all below it have, as last heard."""
    sent_size: int
    verified_count: int
    """Nodes that have verified everything, as last heard."""


OnProgress = Callable[[Progress], None]


def new_job(shape: Shape, addresses: Sequence[str], options: HopOptions | None = None) -> Job:
    """Return a job with an id and a token of its own."""
    return Job(
        secrets.token_bytes(16),
        secrets.token_bytes(TOKEN_SIZE),
        shape,
        tuple(addresses),
        options or HopOptions(),
    )


async def run_source(
    job: Job,
    source: Source,
    *,
    sockets: Sequence[socket.socket],
    name: str,
    chunk_size: int,
    algorithm: Algorithm = Algorithm.XXH3,
    on_progress: OnProgress | None = None,
) -> Summary:
    """Send what *source* has scanned; return when all nodes are done, failed or given up.

    Raises KaError when the source cannot be read or changes meanwhile.  Closes the source.
    """
    patience_s = source.size / SLOW_SINK_RATE + len(source.entries) / SLOW_SINK_FILE_RATE
    options = dataclasses.replace(
        job.options,
        quiet_s=job.options.quiet_s + patience_s,
        late_grace_s=job.options.late_grace_s + patience_s,
    )
    relay = Relay(dataclasses.replace(job, options=options), SOURCE)
    make_plan = functools.partial(
        source.make_plan,
        job.transfer_id,
        job.token,
        name=name,
        chunk_size=chunk_size,
        algorithm=algorithm,
    )

    async def send() -> Finished:
        relay.know(await trio.to_thread.run_sync(make_plan))
        return await relay.run(source, have=0, attempt=1, on_tick=_teller(relay, on_progress))

    try:
        return (await _serving(relay, sockets, send)).summary
    finally:
        source.close()


async def run_node(
    job: Job,
    rank: int,
    sink: Sink,
    *,
    sockets: Sequence[socket.socket],
    restarted: bool = False,
    on_progress: OnProgress | None = None,
) -> Summary:
    """Receive, and pass on; return when the source has ended the transfer.

    *restarted*: a process for this rank took part in this transfer before.  Raises KaError when
    the transfer cannot be joined, or the source is gone before this node has everything.  Closes
    the sink.
    """
    attempt = time.time_ns() // 1_000_000 if restarted else 1
    relay = Relay(job, rank)
    on_tick = _teller(relay, on_progress)

    async def receive() -> Finished:
        plan = await relay.fetch_plan()
        have, failure = 0, ""
        try:
            if plan.manifest.algorithm is Algorithm.XXH3 and not checksum.COMPILED:
                raise KaError(Code.USAGE, "this node has no xxhash: choose blake2b for all")
            have = await trio.to_thread.run_sync(sink.open, plan.manifest, plan.entries)
        except KaError as error:
            failure = str(error)  # the source is to hear of it
        return await relay.run(
            sink, sink=sink, have=have, attempt=attempt, failure=failure, on_tick=on_tick
        )

    try:
        finished = await _serving(relay, sockets, receive)
    finally:
        sink.close()
    if finished.complaint and finished.summary.others:
        raise KaError(Code.UNREACHABLE, finished.complaint)
    return finished.summary


async def _serving(
    relay: Relay, sockets: Sequence[socket.socket], body: Callable[[], Awaitable[Finished]]
) -> Finished:
    """Run *body* while the relay takes connections; raises the body's own KaError."""
    failure: KaError | None = None
    finished: Finished | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(relay.serve, sockets)
        try:
            finished = await body()
        except KaError as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    assert finished is not None
    return finished


def _teller(relay: Relay, on_progress: OnProgress | None) -> Callable[[], None]:
    def tell() -> None:
        hop = relay.hop
        depot = relay.depot
        if hop is not None and depot is not None and on_progress is not None:
            own = hop.node.have.bit_count()
            total = own + hop.downs[-1].total()
            verified = hop.node.ledger.verified_count
            on_progress(Progress(hop.node.chunk_count, own, total, depot.sent_size, verified))

    return tell
