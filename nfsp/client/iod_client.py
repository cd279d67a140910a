"""The client's side of the data protocol: verified reads and writes of pieces of chunks.

The writer computes the sums that the iods store; the reader checks them again.  A block that does
not match is asked for once more, checked by the iod itself: a race with a writer then resolves,
damage is confirmed.  Nothing here knows about files, sizes or caching.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from common import log
from common.checksum import Buffer
from common.errors import Code, KaError
from common.metrics import counter
from common.session import Identity
from nfsp import wire
from nfsp.client import local_reads
from nfsp.client.block_sums import bad_blocks
from nfsp.client.local_reads import LocalReads
from nfsp.iod_links import IodLinks
from nfsp.model import ClusterMap, Layout
from nfsp.striping import Piece

__all__ = ["IodClient"]

_READ_ATTEMPTS = 3

_log = log.get("nfsp.client")
_corrupt = counter("nfsp_corrupt_blocks_total", "Blocks that failed their checksum when read")


class IodClient(IodLinks):
    """Verified reads and writes on the links to all iods.  `run` must be running."""

    def __init__(
        self,
        *,
        identity: Identity,
        key: bytes,
        patience_s: float,
        fetch_map: Callable[[], Awaitable[ClusterMap]],
    ) -> None:
        super().__init__(
            identity=identity, key=key, patience_s=patience_s, fetch_map=fetch_map
        )
        self._local_reads = LocalReads(self._locate, patience_s=patience_s)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._local_reads.run)
            await super().run(task_status=task_status)

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
        if (
            piece.length >= local_reads.SIZE_MIN
            and self.is_local(iod)
            and await self._local_reads.read(self.epoch, iod, layout, ino, piece, into)
        ):
            return
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
            bad = bad_blocks(reply.sums, into, size)
            if not bad:
                return
        self._report(iod, layout, ino, piece, f"blocks {bad} fail their checksum")
        raise KaError(Code.CHUNK_CORRUPT, "data fail their checksum", ino=ino, iod=iod)

    async def _locate(self, iod: int, message: wire.Locate) -> wire.LocateReply:
        try:
            return await self.request(iod, message, wire.LocateReply)
        except KaError as error:
            if error.code is not Code.CHUNK_CORRUPT:
                raise
            return wire.LocateReply(b"", 0, 0, b"")  # the ordinary read reports it

    def _report(self, iod: int, layout: Layout, ino: int, piece: Piece, reason: str) -> None:
        _corrupt.inc()
        chunk_index = piece.row * layout.stripe_width + piece.column
        _log.error("read.corrupt", ino=ino, chunk_index=chunk_index, iod=iod, reason=reason)
