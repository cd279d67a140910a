"""The client's side of the data protocol: verified reads and writes of pieces of chunks.

The writer computes the sums that the iods store; the reader checks them again.  A block that does
not match is asked for once more, checked by the iod itself: a race with a writer then resolves,
damage is confirmed.  Nothing here knows about files, sizes or caching.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, TypeVar

import trio

from common import log
from common.checksum import ABSENT, Buffer, block_sum, digest
from common.errors import Code, KaError
from common.link import Link
from common.metrics import counter
from common.session import Identity
from nfsp import wire
from nfsp.model import BLOCK_SIZE, ClusterMap, Layout
from nfsp.striping import Piece, block_spans

__all__ = ["IodClient", "piece_sums"]

_READ_ATTEMPTS = 3
_ZERO_BLOCK = bytes(BLOCK_SIZE)

_log = log.get("nfsp.client")
_corrupt = counter("nfsp_corrupt_blocks_total", "Blocks that failed their checksum when read")
_Reply = TypeVar("_Reply")


class IodClient:
    """Links to all iods of a cluster map.  `run` must be running."""

    def __init__(self, *, identity: Identity, key: bytes, patience_s: float) -> None:
        self._identity = identity
        self._key = key
        self._patience_s = patience_s
        self._links: dict[int, Link] = {}
        self._chains: dict[int, tuple[int, ...]] = {}
        self._nursery: trio.Nursery | None = None
        self.epoch = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    async def use_map(self, cluster_map: ClusterMap) -> None:
        """Take a cluster map into use; links are made as they are needed."""
        assert self._nursery is not None
        self.epoch = cluster_map.epoch
        self._chains = {chain.chain: chain.iods for chain in cluster_map.chains}
        for iod in cluster_map.iods:
            if iod.iod not in self._links:
                link = Link(
                    f"iod{iod.iod}",
                    iod.address,
                    iod.socket,
                    identity=self._identity,
                    key=self._key,
                    patience_s=self._patience_s,
                )
                await self._nursery.start(link.run)
                self._links[iod.iod] = link

    @property
    def iods(self) -> list[int]:
        return sorted(self._links)

    def iods_of(self, layout: Layout, column: int) -> tuple[int, ...]:
        """Return the iods that hold a column, head of the chain first."""
        chain = layout.chains[column]
        try:
            return self._chains[chain]
        except KeyError:
            raise KaError(Code.EIO, f"chain {chain} is not in the cluster map") from None

    async def request(
        self, iod: int, message: Any, reply: type[_Reply], *, patience_s: float | None = None
    ) -> _Reply:
        """Send a repeatable request to one iod; return its answer."""
        body, _size = await self._link(iod).call(wire.IOD.encode(message), patience_s=patience_s)
        return _decode(body, reply)

    async def write(
        self, layout: Layout, ino: int, piece: Piece, data: Sequence[Buffer], sums: bytes
    ) -> None:
        """Store consecutive buffers as one piece; returns when every replica has it in memory."""
        message = wire.Write(
            self.epoch, ino, piece.column, piece.row, piece.offset, layout.chunk_size, sums, False
        )
        iod = self.iods_of(layout, piece.column)[0]
        body, _size = await self._link(iod).call(wire.IOD.encode(message), data)
        _decode(body, wire.IodDone)

    async def read(self, layout: Layout, ino: int, piece: Piece, into: memoryview) -> None:
        """Fill *into* with a piece that begins and ends at block borders.

        What was never written becomes zeros.  Raises CHUNK_CORRUPT, never returns damaged data.
        """
        iod = self.iods_of(layout, piece.column)[0]
        bad: list[int] = []
        for attempt in range(_READ_ATTEMPTS):
            message = wire.Read(
                self.epoch, ino, piece.column, piece.row, piece.offset, piece.length,
                layout.chunk_size, attempt > 0,
            )  # fmt: skip
            try:
                body, size = await self._link(iod).call(wire.IOD.encode(message), into=into)
            except KaError as error:
                if error.code is Code.CHUNK_CORRUPT:
                    self._report(iod, layout, ino, piece, str(error))
                raise
            sums = _decode(body, wire.ReadReply).sums
            bad = _check_blocks(sums, into, size)
            if not bad:
                return
        self._report(iod, layout, ino, piece, f"blocks {bad} fail their checksum")
        raise KaError(Code.CHUNK_CORRUPT, "data fail their checksum", ino=ino, iod=iod)

    def _report(self, iod: int, layout: Layout, ino: int, piece: Piece, reason: str) -> None:
        _corrupt.inc()
        chunk_index = piece.row * layout.stripe_width + piece.column
        _log.error("read.corrupt", ino=ino, chunk_index=chunk_index, iod=iod, reason=reason)

    def _link(self, iod: int) -> Link:
        try:
            return self._links[iod]
        except KeyError:
            raise KaError(Code.EIO, f"iod {iod} is not in the cluster map") from None


def piece_sums(offset: int, data: Sequence[Buffer]) -> bytes:
    """Return the sums of a write: for each block touched, of the data's part inside it."""
    length = sum(map(len, data))
    sums: list[int] = []
    if len(data) == 1:
        view = memoryview(data[0])
        sums = [
            (digest(view[start:stop]) or 1)
            if stop - start == BLOCK_SIZE
            else block_sum((view[start:stop],), BLOCK_SIZE)
            for start, stop in block_spans(offset, length)
        ]
    else:
        sums = [
            block_sum(_cut(data, start, stop), BLOCK_SIZE)
            for start, stop in block_spans(offset, length)
        ]
    return struct.pack(f"<{len(sums)}Q", *sums)


def _cut(data: Sequence[Buffer], start: int, stop: int) -> list[memoryview]:
    """Return the buffers that hold bytes [start, stop) of consecutive *data*."""
    result = []
    for buffer in data:
        size = len(buffer)
        if start < size and stop > 0:
            result.append(memoryview(buffer)[max(start, 0) : min(stop, size)])
        start -= size
        stop -= size
        if stop <= 0:
            break
    return result


def _check_blocks(packed: bytes, data: memoryview, received: int) -> list[int]:
    """Verify whole blocks in place and clear absent ones; return the numbers of bad ones."""
    count = len(data) // BLOCK_SIZE
    if len(packed) != 8 * count or received > len(data):
        raise KaError(Code.PROTOCOL, "a read answered with other blocks than asked for")
    if received < len(data):
        data[received:] = bytes(len(data) - received)
    bad = []
    for index, expected in enumerate(struct.unpack(f"<{count}Q", packed)):
        start = index * BLOCK_SIZE
        if expected == ABSENT:
            if start < received:
                data[start : start + BLOCK_SIZE] = _ZERO_BLOCK
        elif (digest(data[start : start + BLOCK_SIZE]) or 1) != expected:
            bad.append(index)
    return bad


def _decode(body: bytes, reply: type[_Reply]) -> _Reply:
    message = wire.IOD.decode(body)
    if not isinstance(message, reply):
        raise KaError(Code.PROTOCOL, f"expected {reply.__name__}, got {type(message).__name__}")
    return message
