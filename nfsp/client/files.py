"""Open files of one mount: written data on their way to the iods, and the local view of size.

There is one `OpenFile` per inode, shared by its handles.  Writes are *behind*: `write` returns
when the data are accepted here; consecutive writes are gathered into one chunk-sized request.
`settle` waits until the iods have everything; then the size may be reported to the mds.

Invariants
  * an extent is sent only after all earlier extents that overlap it have been answered, so two
    writes to the same bytes take effect in their order even when a request is repeated;
  * a read waits for the extents that it overlaps;
  * accepted and unanswered bytes of all files together stay below `dirty_size` plus one write;
  * a failed write is reported to every handle that was open then, once, by its next write,
    flush or fsync (as Linux's errseq_t does).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import trio

from common import log
from common.errors import Code, KaError
from common.transport import buffers
from nfsp import wire
from nfsp.client.block_sums import piece_sums
from nfsp.client.iod_client import IodClient
from nfsp.iod_links import for_each
from nfsp.model import BLOCK_SIZE, Inode, Layout, following
from nfsp.striping import Piece, columns_used, data_size_max, pieces

__all__ = ["DirtyLimit", "Handle", "OpenFile"]

GATHER_COUNT_MAX = 256
"""Buffers in one request: well below the kernel's limit of a gathering write."""

_log = log.get("nfsp.client")


class DirtyLimit:
    """Counts accepted and unanswered bytes of a mount, and makes writers wait."""

    def __init__(self, size_max: int) -> None:
        self.size = 0
        self._size_max = size_max
        self._lot = trio.lowlevel.ParkingLot()

    async def wait_room(self) -> None:
        while self.size > self._size_max:
            await self._lot.park()

    def give_back(self, size: int) -> None:
        self.size -= size
        if self.size <= self._size_max:
            self._lot.unpark_all()


class _Extent:
    """Consecutive accepted bytes inside one chunk."""

    __slots__ = ("buffers", "done", "length", "piece", "start")

    def __init__(self, piece: Piece, data: memoryview) -> None:
        self.piece = piece
        self.start = piece.file_offset
        self.length = len(data)
        self.buffers = [data]
        self.done = trio.Event()

    @property
    def stop(self) -> int:
        return self.start + self.length

    def overlaps(self, start: int, stop: int) -> bool:
        return self.start < stop and start < self.stop


class Handle:
    """One open of a file."""

    __slots__ = ("errors_seen", "file", "writable")

    def __init__(self, file: OpenFile, *, writable: bool) -> None:
        self.file = file
        self.writable = writable
        self.errors_seen = file.error_count


class OpenFile:
    """What this mount knows about a file that is open here."""

    def __init__(
        self, inode: Inode, iods: IodClient, dirty: DirtyLimit, nursery: trio.Nursery
    ) -> None:
        assert inode.layout is not None
        self.ino = inode.ino
        self.layout: Layout = inode.layout
        self.size = inode.size
        """The local truth: the recorded size, or more by writes not yet reported."""
        self.mtime_ns = inode.mtime_ns
        self.unreported = False
        """Whether size and mtime here are ahead of the mds."""
        self._stored_size = inode.size
        """Up to where the file has its bytes for sure: recorded, or answered by the iods."""
        self._lost = False
        """Whether a write has failed since everything was settled last."""
        self.open_count = 0
        """Opens the mds has counted since this object was made."""
        self.handle_count = 0
        self.writable_count = 0
        self.error: KaError | None = None
        self.error_count = 0
        self._unsynced: dict[tuple[int, int], bytes] = {}
        """(iod, column) pairs that an fsync must reach, and the boot in which the iod's machine was
        at the first write since the last one; empty: unknown."""
        self._unknown_columns = columns_used(self.layout, inode.size)
        """Written before this object was made, perhaps by us and not synced: fsync must know."""
        self._syncing = trio.Lock()
        self.is_stale = False
        self.reporting = trio.Lock()
        self._iods = iods
        self._dirty = dirty
        self._nursery = nursery
        self._gathering: _Extent | None = None
        self._under_way: list[_Extent] = []

    # ------------------------------------------------------------ errors

    def fail(self, error: KaError) -> None:
        """Note a failure for every handle open now."""
        self.error = error
        self.error_count += 1

    def abandon(self) -> None:
        """The mds no longer keeps the file for us: nothing read or written here would be true."""
        self.is_stale = True
        self.unreported = False
        self.fail(_stale_error(self.ino))

    def _require_kept(self) -> None:
        if self.is_stale:
            raise _stale_error(self.ino)

    def raise_new_error(self, handle: Handle) -> None:
        """Raise the last failure if *handle* has not been told yet."""
        if handle.errors_seen != self.error_count:
            handle.errors_seen = self.error_count
            assert self.error is not None
            raise self.error

    # ------------------------------------------------------------ writing

    async def write(self, offset: int, data: memoryview, now_ns: int) -> None:
        """Accept bytes; they must not change afterwards."""
        self._require_kept()
        if offset + len(data) > data_size_max(self.layout):
            raise KaError(Code.EFBIG, "beyond what this file's iods can hold", inode=self.ino)
        await self._dirty.wait_room()
        self._dirty.size += len(data)
        is_first = not self.unreported
        for piece in pieces(self.layout, offset, len(data)):
            start = piece.file_offset - offset
            self._accept(piece, data[start : start + piece.length])
        self.size = max(self.size, offset + len(data))
        self.mtime_ns = following(self.mtime_ns, now_ns)
        self.unreported = True
        if is_first:  # perhaps the only one: under way while the writer comes to its close
            self.push()

    def _accept(self, piece: Piece, data: memoryview) -> None:
        extent = self._gathering
        if extent is not None and extent.stop == piece.file_offset and piece.offset:
            extent.buffers.append(data)
            extent.length += len(data)
        else:
            self.push()
            extent = self._gathering = _Extent(piece, data)
        at_end = (extent.piece.offset + extent.length) == self.layout.chunk_size
        if at_end or len(extent.buffers) >= GATHER_COUNT_MAX:
            self.push()

    def push(self) -> None:
        """Send what has been gathered."""
        extent = self._gathering
        if extent is not None:
            self._gathering = None
            before = [one for one in self._under_way if one.overlaps(extent.start, extent.stop)]
            self._under_way.append(extent)
            self._nursery.start_soon(self._store, extent, before)

    async def _store(self, extent: _Extent, before: list[_Extent]) -> None:
        try:
            for earlier in before:
                await earlier.done.wait()
            piece = extent.piece._replace(length=extent.length)
            sums = piece_sums(piece.offset, extent.buffers)
            boot = await self._iods.write(self.layout, self.ino, piece, extent.buffers, sums)
            for iod in self._iods.iods_of(self.layout, piece.column):
                key = (iod, piece.column)
                self._unsynced[key] = self._unsynced.get(key) or boot
            self._stored_size = max(self._stored_size, extent.stop)
        except Exception as error:  # nobody waits for this task: a bug must not end the mount
            expected = isinstance(error, KaError)
            _log.error(
                "write.failed", ino=self.ino, offset=extent.start, length=extent.length,
                reason=str(error), exc_info=None if expected else error,
            )  # fmt: skip
            self._lost = True
            self.fail(error if isinstance(error, KaError) else KaError(Code.INTERNAL, str(error)))
        finally:
            self._under_way.remove(extent)
            extent.done.set()
            self._dirty.give_back(extent.length)

    def note_trim(self) -> None:
        """The next fsync must make a truncation durable on every iod of the file."""
        self._note_columns(self.layout.stripe_width)

    def _note_columns(self, count: int) -> None:
        for column in range(count):
            for iod in self._iods.iods_of(self.layout, column):
                self._unsynced.setdefault((iod, column), b"")

    async def sync(self) -> None:
        """Have the iods put on stable storage what they were given, by whomever.

        One at a time: who comes second must not be told that all is well before it is.
        """
        async with self._syncing:
            self._note_columns(self._unknown_columns)
            self._unknown_columns = 0
            groups: dict[tuple[int, bytes], list[int]] = {}
            for (iod, column), boot in self._unsynced.items():
                groups.setdefault((iod, boot), []).append(column)
            self._unsynced = {}
            await for_each([partial(self._sync, *group) for group in groups.items()])

    async def _sync(self, group: tuple[int, bytes], columns: list[int]) -> None:
        iod, boot = group
        message = wire.SyncChunks([[self.ino, column] for column in columns], boot)
        try:
            await self._iods.request(iod, message, wire.IodDone)
        except BaseException as error:
            if isinstance(error, KaError) and error.code is Code.DATA_LOST:
                _log.error("sync.failed", ino=self.ino, iod=iod, reason=str(error))
                self.fail(error)  # for every handle, once: it cannot be mended
                return
            for column in columns:
                self._unsynced[iod, column] = boot or self._unsynced.get((iod, column), b"")
            raise

    async def settle(self) -> None:
        """Wait until everything accepted so far has been answered by the iods."""
        self.push()
        for extent in list(self._under_way):
            await extent.done.wait()
        if self._lost and not self._under_way:
            self._lost = False
            self.size = self._stored_size  # do not record a tail that could not be stored

    # ------------------------------------------------------------ reading

    async def read(self, offset: int, length: int) -> memoryview:
        """Return bytes [offset, offset + length) as far as the file has them, verified.

        The memory is borrowed from `transport.buffers`; whoever is done with it may give it back.
        """
        self._require_kept()
        stop = min(offset + length, self.size)
        if stop <= offset:
            return memoryview(b"")
        await self._settle_overlap(offset, stop)
        first = offset - offset % BLOCK_SIZE
        last = stop + -stop % BLOCK_SIZE
        buffer = buffers.take(last - first)
        await self._read_blocks(list(_block_pieces(self.layout, first, last)), first, buffer)
        self._require_kept()  # it may have been purged under our hands
        return buffer[offset - first : stop - first]

    async def _read_blocks(self, parts: list[Piece], first: int, buffer: memoryview) -> None:
        async def fetch(piece: Piece) -> None:
            start = piece.file_offset - first
            into = buffer[start : start + piece.length]
            await self._iods.read(self.layout, self.ino, piece, into)

        if len(parts) == 1:
            await fetch(parts[0])
            return
        error: KaError | None = None

        async def fetch_or_note(piece: Piece) -> None:
            nonlocal error
            try:
                await fetch(piece)
            except KaError as failed:
                error = failed

        async with trio.open_nursery() as nursery:
            for piece in parts:
                nursery.start_soon(fetch_or_note, piece)
        if error is not None:
            raise error

    async def _settle_overlap(self, start: int, stop: int) -> None:
        if self._gathering is not None and self._gathering.overlaps(start, stop):
            self.push()
        for extent in list(self._under_way):
            if extent.overlaps(start, stop):
                await extent.done.wait()

    # ------------------------------------------------------------ the mds's view

    def merge(self, inode: Inode) -> Inode:
        """Return the inode as this mount must show it; take over what others changed."""
        if not self.unreported:
            self.size = self._stored_size = inode.size
            self.mtime_ns = inode.mtime_ns
            return inode
        return inode._replace(size=max(self.size, inode.size), mtime_ns=self.mtime_ns)


def _block_pieces(layout: Layout, first: int, last: int) -> Iterator[Piece]:
    assert first % BLOCK_SIZE == 0 == last % BLOCK_SIZE
    assert layout.chunk_size % BLOCK_SIZE == 0
    return pieces(layout, first, last - first)


def lost_error() -> KaError:
    """Return what a handle gets whose session the mds has let expire with data unreported."""
    return KaError(Code.EIO, "the mount's session expired before these data were recorded")


def _stale_error(ino: int) -> KaError:
    return KaError(Code.ESTALE, "the file went with the mount's expired session", ino=ino)
