"""One chunk file: the order of system calls that makes its changes safe.

The caller holds `lock` around every method (and `sync_lock` around a whole sync).  The file is
opened at its first use and may be closed and opened again at any time.

Invariants (why they hold at every crash point: docs/on-disk-format.md)
  * a present block is marked in flight on disk before a byte of it changes, and if it was durable
    that mark is durable first;
  * a header that names a new sum is written after the data, or in one call with them at the end
    of the file, where the file's size tells how far the call came;
  * an absent block is all zeros on disk before a part of it is written;
  * a failed change is undone; what cannot be undone is recovered as after a crash;
  * `size` is the file's size: nobody else changes it.

Not here: who may enter, which files stay open, checking of payloads, translation of OSError.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from common.checksum import ABSENT, Buffer, block_sum
from common.errors import Code, KaError
from nfsp.iod import chunk
from nfsp.iod.chunk import BLOCK_SIZE, HEADER_SIZE, ChunkHeader, ClearPlan, WritePlan
from nfsp.iod.chunktree import ChunkTree
from nfsp.iod.disk import Disk

__all__ = ["ChunkFile", "OpenFile"]

_log = logging.getLogger(__name__)

_ZEROS = memoryview(bytes(BLOCK_SIZE))

# Bounds the headers kept per open file: 64 of 1 MiB chunks, some 100 KB.
_CACHED_BLOCKS_MAX = 2048

# A search for the chunk size looks at so many allocated regions before it gives up.
_PROBES_MAX = 64


class OpenFile:
    """A descriptor shared by the chunk file and by reads under way; the last one closes it."""

    __slots__ = ("_count", "_lock", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._count = 1
        self._lock = threading.Lock()

    def acquire(self) -> OpenFile:
        with self._lock:
            assert self._count > 0
            self._count += 1
        return self

    def release(self) -> None:
        with self._lock:
            self._count -= 1
            last = self._count == 0
        if last:
            os.close(self.fd)


@dataclass(slots=True)
class _Row:
    """A header as it is on disk, and what is known beyond it.

    `durable`: blocks it calls unsynced that are on stable storage.  While a sync runs, `pending`
    are the blocks it will have made durable, `recent` those written since it began.
    """

    header: ChunkHeader
    on_disk: bool
    durable: int = 0
    pending: int = 0
    recent: int = 0


class ChunkFile:
    """The chunk file of one (inode, column)."""

    def __init__(
        self, inode: int, column: int, *, tree: ChunkTree, disk: Disk, boot_id: bytes
    ) -> None:
        self.inode = inode
        self.column = column
        self.lock = threading.Lock()
        self.sync_lock = threading.Lock()
        self.pins = 0
        self.size = 0
        self.sync_failed = False
        self._tree = tree
        self._disk = disk
        self._boot_id = boot_id
        self._file: OpenFile | None = None
        self._rows: OrderedDict[int, _Row] = OrderedDict()
        self._chunk_size: int | None = None
        self._created = False
        self._tail_checked = False
        self._dirty = True
        self._entry_durable = False

    # -- opening and closing

    def open(self, *, create: bool = False) -> bool:
        """Open the file if it is not; return whether there is one."""
        if self._file is not None:
            return True
        if create:
            fd, size = self._tree.create(self.inode, self.column)
        else:
            existing = self._tree.open(self.inode, self.column)
            if existing is None:
                return False
            fd, size = existing, os.fstat(existing).st_size
        self._file = OpenFile(fd)
        self.size = size
        self._created = create and size == 0
        self._tail_checked = size == 0
        self._dirty = True
        self._entry_durable = False
        return True

    def share(self) -> OpenFile:
        """Return the open file for a reader, who releases it."""
        assert self._file is not None
        return self._file.acquire()

    def close(self) -> None:
        """Write down what is known to be durable and forget everything."""
        try:
            self.settle()
        finally:
            self._forget()

    def remove(self) -> bool:
        removed = self._tree.remove(self.inode, self.column)
        self._forget()
        self.sync_failed = False
        return removed

    def _forget(self) -> None:
        if self._file is not None:
            self._file.release()
        self._file = None
        self._rows.clear()
        self._chunk_size = None
        self.size = 0

    @property
    def _fd(self) -> int:
        assert self._file is not None
        return self._file.fd

    # -- headers

    def header(self, row: int, chunk_size: int) -> ChunkHeader:
        """Return the header of *row*, recovered; the file is open."""
        return self._row(row, chunk_size).header

    def _row(self, row: int, chunk_size: int) -> _Row:
        cached = self._rows.get(row)
        if cached is not None and cached.header.chunk_size == chunk_size:
            self._rows.move_to_end(row)
            return cached
        if self._chunk_size not in (None, chunk_size):
            raise self._corrupt(row, None, "the chunk file has another chunk size")
        loaded = self._load(row, chunk_size)
        if loaded.on_disk:
            self._chunk_size = chunk_size
        self._keep(row, loaded)
        return loaded

    def _load(self, row: int, chunk_size: int) -> _Row:
        start = row * chunk.row_stride(chunk_size)
        page = self._disk.pread(self._fd, HEADER_SIZE, start) if start < self.size else b""
        try:
            header = chunk.decode(page, inode=self.inode, column=self.column, row=row)
            if header is not None and header.chunk_size != chunk_size:
                raise chunk.BadHeader("the header has another chunk size")
        except chunk.BadHeader as error:
            raise self._corrupt(row, None, str(error)) from None
        if header is None:
            return _Row(self._new_header(row, chunk_size), on_disk=False)
        if chunk.suspects(header, self._boot_id, self.size):
            header = self._recover(header)
        return _Row(header, on_disk=True)

    def _keep(self, row: int, loaded: _Row) -> None:
        self._rows[row] = loaded
        blocks = len(loaded.header.sums)
        while len(self._rows) > 1 and len(self._rows) * blocks > _CACHED_BLOCKS_MAX:
            oldest = next(iter(self._rows))
            self._settle_row(oldest, self._rows[oldest])
            del self._rows[oldest]

    def _new_header(self, row: int, chunk_size: int) -> ChunkHeader:
        return chunk.new_header(
            self.inode, self.column, row, chunk_size=chunk_size, boot_id=self._boot_id
        )

    def _write_header(self, entry: _Row, header: ChunkHeader) -> None:
        start = header.row * chunk.row_stride(header.chunk_size)
        self._disk.pwritev(self._fd, [chunk.encode(header)], start)
        entry.header = header
        entry.on_disk = True
        self._dirty = True
        self.size = max(self.size, start + HEADER_SIZE)

    def _recover(self, header: ChunkHeader) -> ChunkHeader:
        """Adopt what an interrupted write left in the blocks it may have touched."""
        found = {}
        start = chunk.data_start(header.row, header.chunk_size)
        data_end = header.data_end
        for block in chunk.bits_from(chunk.suspects(header, self._boot_id, self.size)):
            content = self._read_block(header, block)
            found[block] = block_sum([content], BLOCK_SIZE) if content else ABSENT
            if found[block] == header.sums[block]:
                continue
            data_end = max(data_end, block * BLOCK_SIZE + len(content))
            _log.warning(
                "recovered un-fsynced block inode=%d column=%d row=%d block=%d",
                self.inode, self.column, header.row, block,
            )  # fmt: skip
        data_end = max(0, min(data_end, self.size - start))
        recovered = chunk.recovered_header(header, found, self._boot_id, data_end)
        self._write_header(_Row(header, on_disk=True), recovered)
        return recovered

    def _check_tail(self, row: int, chunk_size: int) -> None:
        """Recover the last chunk before the file grows: its size is the trace of a cut write."""
        if self._tail_checked:
            return
        last = chunk.rows_in(self.size, chunk_size) - 1
        if last != row and last not in self._rows:
            # A damaged header there is no matter of this row, and nothing can be recovered.
            with contextlib.suppress(KaError):
                self._load(last, chunk_size)
        self._tail_checked = True

    def _corrupt(self, row: int, block: int | None, message: str) -> KaError:
        context = {} if block is None else {"block": block}
        return KaError(
            Code.CHUNK_CORRUPT, message, inode=self.inode, column=self.column, row=row, **context
        )

    # -- reading

    def _read_block(self, header: ChunkHeader, block: int, length: int = BLOCK_SIZE) -> bytes:
        start = chunk.data_start(header.row, header.chunk_size) + block * BLOCK_SIZE
        return self._disk.pread(self._fd, length, start)

    def _read_checked(self, header: ChunkHeader, block: int, length: int) -> bytes:
        content = self._read_block(header, block, length)
        if block_sum([content], BLOCK_SIZE) != header.sums[block]:
            raise self._corrupt(header.row, block, "stored data fail their checksum")
        return content

    def read_verified(self, header: ChunkHeader, offset: int, length: int) -> bytes:
        """Return the stored part of an aligned range; what is missing behind it is zeros."""
        stored = chunk.stored_length(header, offset, length, self.size)
        start = chunk.data_start(header.row, header.chunk_size) + offset
        data = self._disk.pread(self._fd, stored, start) if stored else b""
        view = memoryview(data)
        first = offset // BLOCK_SIZE
        absent = []
        for block in range(first, first + length // BLOCK_SIZE):
            at = block * BLOCK_SIZE - offset
            if header.sums[block] == ABSENT:
                absent.append(at)
            elif block_sum([view[at : at + BLOCK_SIZE]], BLOCK_SIZE) != header.sums[block]:
                raise self._corrupt(header.row, block, "stored data fail their checksum")
        if not any(at < len(data) for at in absent):
            return data
        patched = bytearray(data)
        for at in absent:
            end = min(at + BLOCK_SIZE, len(data))
            patched[at:end] = bytes(max(0, end - at))
        return bytes(patched)

    def damaged_blocks(self, header: ChunkHeader) -> list[int]:
        """Return the present blocks whose data fail their checksum, read from the disk itself."""
        start = chunk.data_start(header.row, header.chunk_size)
        os.posix_fadvise(self._fd, start, header.chunk_size, os.POSIX_FADV_DONTNEED)
        damaged = []
        for block, expected in enumerate(header.sums):
            if expected != ABSENT:
                length = min(BLOCK_SIZE, max(0, header.data_end - block * BLOCK_SIZE))
                if block_sum([self._read_block(header, block, length)], BLOCK_SIZE) != expected:
                    damaged.append(block)
        return damaged

    def discover_chunk_size(self) -> int | None:
        """Return the chunk size that a header in the file tells, None if nothing is present.

        Raises CHUNK_CORRUPT if the file begins with something that is no header.
        """
        position = self._disk.next_data(self._fd, 0)
        for _ in range(_PROBES_MAX):
            if position is None:
                break
            for candidate in chunk.CHUNK_SIZES:
                row = position // chunk.row_stride(candidate)
                if self._is_header(row, candidate) or self._is_header(row + 1, candidate):
                    return candidate
            hole = self._disk.next_hole(self._fd, position)
            position = self._disk.next_data(self._fd, hole)
        self._load(0, chunk.CHUNK_SIZE_MIN)
        return None

    def _is_header(self, row: int, chunk_size: int) -> bool:
        start = row * chunk.row_stride(chunk_size)
        page = self._disk.pread(self._fd, HEADER_SIZE, start)
        try:
            header = chunk.decode(page, inode=self.inode, column=self.column, row=row)
        except chunk.BadHeader:
            return False
        return header is not None and header.chunk_size == chunk_size

    def rows_from(self, row: int, chunk_size: int) -> Iterator[int]:
        """Yield the rows from *row* on that are not holes."""
        stride = chunk.row_stride(chunk_size)
        while row * stride < self.size:
            data = self._disk.next_data(self._fd, row * stride)
            if data is None:
                return
            row = max(row, data // stride)
            yield row
            row += 1

    # -- writing

    def write(
        self,
        row: int,
        offset: int,
        pieces: Sequence[Buffer],
        blocks: Sequence[tuple[Sequence[Buffer], int]],
        *,
        chunk_size: int,
        refuse_new: bool,
    ) -> int:
        """Write *pieces* at *offset* of the chunk; return its new version.

        *blocks* has for each touched block its part of the pieces and that part's block sum.  With
        *refuse_new* only blocks that are there may be written.
        """
        self.open(create=True)
        length = sum(map(len, pieces))
        try:
            entry = self._row(row, chunk_size)
            plan = chunk.plan_write(entry.header, offset, length)
            if plan.absent and refuse_new:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            final = plan.final_header(self._new_sums(plan, blocks), self._boot_id)
            self._prepare(plan, offset, length)
            try:
                self._write_data(entry, plan, final, offset, pieces, length)
            except OSError:
                self._undo(plan)
                raise
        except OSError:
            if self._created and self.size == 0:
                self.remove()
            raise
        touched = plan.intent | plan.absent
        entry.durable &= ~touched
        entry.recent |= touched
        self._chunk_size = chunk_size
        return final.version

    def _new_sums(
        self, plan: WritePlan, blocks: Sequence[tuple[Sequence[Buffer], int]]
    ) -> list[int]:
        """Return the sums of the touched blocks as they will be."""
        sums = []
        for overlap, (parts, given) in zip(plan.overlaps, blocks, strict=True):
            old_end = plan.merged.get(overlap.block)
            if old_end is not None:
                old = memoryview(self._read_checked(plan.header, overlap.block, old_end))
                gap = _ZEROS[: max(0, overlap.start - len(old))]
                merged = [old[: overlap.start], gap, *parts, old[overlap.end :]]
                sums.append(block_sum(merged, BLOCK_SIZE))
            elif overlap.start:
                sums.append(block_sum([_ZEROS[: overlap.start], *parts], BLOCK_SIZE))
            else:
                sums.append(given)
        return sums

    def _prepare(self, plan: WritePlan, offset: int, length: int) -> None:
        """Make sure the write cannot fail half way, nor uncover what lies under absent blocks."""
        header = plan.header
        start = chunk.data_start(header.row, header.chunk_size)
        at = start + offset
        if at + length > self.size:
            self._check_tail(header.row, header.chunk_size)
        if plan.absent and at < self.size:
            self._wipe(start, plan.absent)
        if plan.intent and self._disk.next_hole(self._fd, at) < at + length:
            self._disk.allocate(self._fd, at, length)

    def _wipe(self, start: int, absent: int) -> None:
        """Zero what a write that was never completed left under *absent* blocks."""
        wiped = False
        for block in chunk.bits_from(absent):
            at = start + block * BLOCK_SIZE
            data = self._disk.next_data(self._fd, at)
            if data is None:
                break
            if data < at + BLOCK_SIZE and any(self._disk.pread(self._fd, BLOCK_SIZE, at)):
                self._disk.punch(self._fd, at, BLOCK_SIZE)
                wiped = True
        if wiped:
            # Or a power loss could keep the new header and bring the old bytes back.
            self._disk.fdatasync(self._fd)

    def _write_data(
        self,
        entry: _Row,
        plan: WritePlan,
        final: ChunkHeader,
        offset: int,
        pieces: Sequence[Buffer],
        length: int,
    ) -> None:
        row_start = final.row * chunk.row_stride(final.chunk_size)
        at = row_start + HEADER_SIZE + offset
        self._dirty = True
        if not entry.on_disk and offset == 0 and row_start >= self.size:
            self._disk.pwritev(self._fd, [chunk.encode(final), *pieces], row_start)
            entry.header = final
            entry.on_disk = True
        else:
            if plan.intent:
                self._write_header(entry, plan.intent_header(self._boot_id))
                if plan.barrier:
                    self._barrier()
            self._disk.pwritev(self._fd, pieces, at)
            self._write_header(entry, final)
        self.size = max(self.size, at + length)

    def _barrier(self) -> None:
        try:
            self._disk.fdatasync(self._fd)
        except OSError:
            self.sync_failed = True
            raise

    def _undo(self, plan: WritePlan) -> None:
        """After a failed write: take back new blocks, recover the others."""
        header = plan.header
        self._rows.pop(header.row, None)
        with contextlib.suppress(OSError, KaError):
            reached = os.fstat(self._fd).st_size
            if reached > self.size:
                self._disk.ftruncate(self._fd, self.size)
            start = chunk.data_start(header.row, header.chunk_size)
            for block in chunk.bits_from(plan.absent):
                self._disk.punch(self._fd, start + block * BLOCK_SIZE, BLOCK_SIZE)
            self._row(header.row, header.chunk_size)

    # -- clearing

    def trim(self, row: int, offset: int, *, chunk_size: int) -> None:
        """Drop everything at or after that place; a chunk file that keeps nothing is removed."""
        if row == offset == 0:
            self.remove()
            return
        start = row * chunk.row_stride(chunk_size)
        size = start + HEADER_SIZE + offset if offset else start
        if not self.open() or start >= self.size:
            return
        if offset:
            plan = chunk.plan_clear(self.header(row, chunk_size), offset, chunk_size)
            with self._cleared(plan):
                self._cut(size)
        else:
            self._cut(size)
        kept = row + 1 if offset else row
        for gone in [cached for cached in self._rows if cached >= kept]:
            del self._rows[gone]

    def _cut(self, size: int) -> None:
        if size < self.size:
            self._dirty = True
            self._disk.ftruncate(self._fd, size)
            self.size = size

    def zero(self, row: int, offset: int, length: int, *, chunk_size: int) -> None:
        """Make a range of the chunk read as zeros; whole blocks of it become absent."""
        if not self.open():
            return
        plan = chunk.plan_clear(self.header(row, chunk_size), offset, offset + length)
        with self._cleared(plan):
            start = chunk.data_start(row, chunk_size) + offset
            if start < self.size:
                self._dirty = True
                self._disk.punch(self._fd, start, length)

    @contextlib.contextmanager
    def _cleared(self, plan: ClearPlan) -> Iterator[None]:
        """Do the headers before and after the punching or cutting inside the `with`."""
        if not plan.changes:
            yield
            return
        header = plan.header
        entry = self._row(header.row, header.chunk_size)
        sums = {}
        for block, (overlap, old_end) in plan.edges.items():
            old = memoryview(self._read_checked(header, block, old_end))
            end = overlap.end
            gap = _ZEROS[: max(0, min(end, len(old)) - overlap.start)]
            sums[block] = block_sum([old[: overlap.start], gap, old[end:]], BLOCK_SIZE)
        final = plan.final_header(sums, self._boot_id)
        try:
            self._write_header(entry, plan.intent_header(self._boot_id) if sums else final)
            if plan.barrier:
                self._barrier()
            yield
            if sums:
                self._write_header(entry, final)
        except OSError:
            self._rows.pop(header.row, None)  # recovered when it is used next
            raise
        touched = plan.dropped | chunk.bits(sums)
        entry.durable &= ~touched
        entry.recent |= touched

    # -- durability

    def begin_sync(self) -> OpenFile | None:
        """Note what a sync beginning now will make durable; None if nothing is left to do."""
        if self.sync_failed:
            raise OSError(errno.EIO, "an earlier sync of this chunk file failed")
        if not self.open() or not (self._dirty or not self._entry_durable):
            return None
        for entry in self._rows.values():
            entry.pending, entry.recent = entry.header.unsynced, 0
        self._dirty = False
        return self.share()

    def end_sync(self, synced: OpenFile) -> None:
        """Note that the sync succeeded."""
        if self._file is not synced:
            return  # removed and made anew meanwhile
        self._entry_durable = True
        for entry in self._rows.values():
            entry.durable |= entry.pending & ~entry.recent & entry.header.unsynced
            entry.pending = 0

    def fail_sync(self) -> None:
        """Note that the sync failed: the kernel may have dropped what it could not write."""
        self.sync_failed = True

    @property
    def entry_durable(self) -> bool:
        return self._entry_durable

    def settle(self) -> None:
        """Write down which blocks are durable, so that damage to them is never taken for a crash.

        Losing this write is harmless: the blocks are then called unsynced for longer.
        """
        for row, entry in self._rows.items():
            self._settle_row(row, entry)

    def _settle_row(self, row: int, entry: _Row) -> None:
        if not entry.durable:
            return
        dirty = self._dirty
        self._write_header(entry, chunk.settled_header(entry.header, entry.durable))
        entry.durable = 0
        self._dirty = dirty
