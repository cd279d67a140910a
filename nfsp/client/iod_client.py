"""The client's side of the data protocol: verified reads and writes of pieces of chunks.

The writer computes the sums that the iods store; the reader checks them again.  A block that does
not match is asked for once more, checked by the iod itself: a race with a writer then resolves,
damage is confirmed.  Nothing here knows about files, sizes or caching.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from common import log
from common.checksum import ABSENT, Buffer, block_sum, digest
from common.errors import Code, KaError
from common.metrics import counter
from nfsp import wire
from nfsp.iod_links import IodLinks
from nfsp.model import BLOCK_SIZE, Layout
from nfsp.striping import Piece, block_spans

__all__ = ["IodClient", "piece_sums"]

_READ_ATTEMPTS = 3
_ZERO_BLOCK = bytes(BLOCK_SIZE)

_log = log.get("nfsp.client")
_corrupt = counter("nfsp_corrupt_blocks_total", "Blocks that failed their checksum when read")


class IodClient(IodLinks):
    """Verified reads and writes on the links to all iods."""

    async def write(
        self, layout: Layout, ino: int, piece: Piece, data: Sequence[Buffer], sums: bytes
    ) -> bytes:
        """Store consecutive buffers as one piece; returns when every replica has it in memory.

        The answer names the boot of the iod's machine: see `wire.SyncChunks`.
        """
        message = wire.Write(
            self.epoch, ino, piece.column, piece.row, piece.offset, layout.chunk_size, sums, False
        )
        head = self.iods_of(layout, piece.column)[0]
        answer, _size = await self.call(head, message, wire.IodDone, data=data)
        return answer.boot

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
                reply, size = await self.call(iod, message, wire.ReadReply, into=into)
            except KaError as error:
                if error.code is Code.CHUNK_CORRUPT:
                    self._report(iod, layout, ino, piece, str(error))
                raise
            bad = _check_blocks(reply.sums, into, size)
            if not bad:
                return
        self._report(iod, layout, ino, piece, f"blocks {bad} fail their checksum")
        raise KaError(Code.CHUNK_CORRUPT, "data fail their checksum", ino=ino, iod=iod)

    def _report(self, iod: int, layout: Layout, ino: int, piece: Piece, reason: str) -> None:
        _corrupt.inc()
        chunk_index = piece.row * layout.stripe_width + piece.column
        _log.error("read.corrupt", ino=ino, chunk_index=chunk_index, iod=iod, reason=reason)


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
