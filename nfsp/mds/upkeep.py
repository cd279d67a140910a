"""What the mds does at the iods: trims, purges, free space.

Both queues are on record before anything is removed (`queues`), so every step may be interrupted
and repeated.  Trims destroy data while the file lives: for each inode they run one at a time, and
one that finds its record gone or changed does nothing.  A trim is repeated on the same link, and
an iod never runs an older connection's requests beside a newer one's, so none can come late.

Not here: deciding what is to go (`attributes`, `sessions`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import trio

from common import log
from common.errors import Code, KaError
from common.metrics import counter
from nfsp import striping, wire
from nfsp.iod_links import IodLinks, for_each
from nfsp.mds import queues
from nfsp.mds.view import View, Writes
from nfsp.model import FILE_SIZE_MAX, Remains

__all__ = ["Upkeep"]

PURGE_COUNT = 512
"""Files whose chunks are removed in one round."""
RETRY_S = 1.0
STATFS_TTL_S = 2.0
STATFS_PATIENCE_S = 0.5

_log = log.get("nfsp.mds")
_purged = counter("nfsp_mds_purged_total", "Deleted files whose chunks are gone")
_trimmed = counter("nfsp_mds_trimmed_total", "Files whose chunks behind the end were dropped")


class Upkeep:
    """Carries out the purge and trim queues; knows the free space."""

    def __init__(self, view: View, apply: Callable[[Writes], object], iods: IodLinks) -> None:
        self._view = view
        self._apply = apply
        self._iods = iods
        self._wake = trio.Event()
        self._trimming: dict[int, trio.Lock] = {}
        self._usage = wire.StatFsReply(0, 0, 0, 0)
        self._usage_at = float("-inf")

    def wake(self) -> None:
        """There is something in a queue."""
        self._wake.set()

    async def run(self) -> None:
        """Announce the cluster map to all iods and work the queues off, for ever."""
        async with trio.open_nursery() as nursery:
            for iod in self._iods.iods:
                nursery.start_soon(self._greet, iod)
            await self._work()

    async def _greet(self, iod: int) -> None:
        """Connect to an iod: with the connection it learns the map's epoch."""
        while True:
            try:
                await self._iods.request(iod, wire.IodStatFs(), wire.IodStatFsReply)
                return
            except KaError as error:
                _log.warning("iod.missing", iod=iod, reason=str(error))
                await trio.sleep(RETRY_S)

    async def _work(self) -> None:
        while True:
            self._wake = trio.Event()
            try:
                done = await self._purge() and await self._trim_all()
            except KaError as error:
                _log.warning("upkeep.failed", reason=str(error))
                done = False
            if done:
                await self._wake.wait()
            else:
                await trio.sleep(RETRY_S)

    # ------------------------------------------------------------ purge

    async def _purge(self) -> bool:
        after, complete = 0, True
        while rows := queues.purge_queue(self._view, after, PURGE_COUNT):
            after = rows[-1][0]
            by_iod: dict[int, list[tuple[int, int]]] = {}
            for ino, remains in rows:
                for column in range(striping.columns_used(remains.layout, remains.size)):
                    for iod in self._iods.iods_of(remains.layout, column):
                        by_iod.setdefault(iod, []).append((ino, column))
            failed = await self._remove(by_iod)
            writes: Writes = {}
            for ino, _remains in rows:
                if ino not in failed:
                    writes.update(queues.purged(ino))
            if writes:
                self._apply(writes)
                _purged.inc(len(writes))
            complete = complete and not failed
        return complete

    async def _remove(self, by_iod: dict[int, list[tuple[int, int]]]) -> set[int]:
        """Remove chunk files; return the inodes for which an iod has not confirmed."""
        failed: set[int] = set()

        async def remove(iod: int, files: list[tuple[int, int]]) -> None:
            try:
                request = wire.Remove(self._iods.epoch, files)
                await self._iods.request(iod, request, wire.IodDone)
            except KaError as error:
                _log.warning("purge.failed", iod=iod, count=len(files), reason=str(error))
                failed.update(ino for ino, _column in files)

        async with trio.open_nursery() as nursery:
            for iod, files in by_iod.items():
                nursery.start_soon(remove, iod, files)
        return failed

    # ------------------------------------------------------------ trim

    async def _trim_all(self) -> bool:
        after, complete = 0, True
        while rows := queues.trim_queue(self._view, after, PURGE_COUNT):
            after = rows[-1][0]
            for ino, remains in rows:
                try:
                    await self.trim(ino, remains, FILE_SIZE_MAX)
                except KaError as error:
                    _log.warning("trim.failed", ino=ino, reason=str(error))
                    complete = False
        return complete

    async def trim(self, ino: int, remains: Remains, end: int) -> None:
        """Drop a file's bytes from the recorded cut on; no chunk reaches behind *end*.

        Raises KaError if an iod cannot be reached: the record stays, `run` tries again.
        """
        lock = self._trimming.setdefault(ino, trio.Lock())
        try:
            async with lock:
                if queues.pending_trim(self._view, ino) != remains:
                    return
                await for_each(self._cuts(ino, remains, end))
                self._apply(queues.trimmed(self._view, ino, remains))
                _trimmed.inc()
        except KaError:
            self.wake()
            raise
        finally:
            if not lock.locked():  # a task that waited may hold it by now
                self._trimming.pop(ino, None)

    def _cuts(self, ino: int, remains: Remains, end: int) -> list[Callable[[], Awaitable[object]]]:
        layout = remains.layout
        calls: list[Callable[[], Awaitable[object]]] = []
        for column in range(striping.columns_used(layout, end)):
            row, offset = striping.column_cut(layout, remains.size, column)
            if striping.file_offset(layout, column, row, offset) >= end:
                continue
            message = wire.Trim(
                self._iods.epoch, ino, column, row, offset, layout.chunk_size
            )
            calls += [
                partial(self._iods.request, iod, message, wire.IodDone)
                for iod in self._iods.iods_of(layout, column)
            ]
        return calls

    # ------------------------------------------------------------ free space

    async def statfs(self, inode_count: int) -> wire.StatFsReply:
        """Return the space of all iods together, at most STATFS_TTL_S old."""
        now = trio.current_time()
        if now - self._usage_at > STATFS_TTL_S:
            usages: list[wire.IodStatFsReply] = []

            async def ask(iod: int) -> None:
                usages.append(
                    await self._iods.request(
                        iod, wire.IodStatFs(), wire.IodStatFsReply, patience_s=STATFS_PATIENCE_S
                    )
                )

            try:
                await for_each([partial(ask, iod) for iod in self._iods.iods])
            except KaError as error:
                _log.warning("statfs.incomplete", reason=str(error))
            if not usages:
                raise KaError(Code.UNREACHABLE, "no iod can be reached")
            self._usage = wire.StatFsReply(
                sum(usage.total for usage in usages),
                sum(usage.free for usage in usages),
                sum(usage.available for usage in usages),
                0,
            )
            self._usage_at = now
        return self._usage._replace(inodes=inode_count)
