"""One chunk file: the order of system calls that makes its changes safe.

The caller holds `lock` around every method, and `sync_lock` around a whole sync.  The file is
opened at its first use and may be closed and opened again at any time.

Invariants (why they hold at every crash point: docs/on-disk-format.md)
  * a present block is marked in flight on disk before a byte of it changes, and if it was durable
    that mark is durable first;
  * a header that names a new sum is written after the data, or in one call with them at the end
    of the file, where the file's size tells how far the call came;
  * an absent block is all zeros on disk before a part of it is written;
  * a failed change is undone; what cannot be undone is recovered as after a crash;
  * after a failed sync none succeeds until the store is opened anew: the kernel forgets what it
    could not write.

Not here: who may enter, which files stay open, checking of payloads, translation of OSError.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from common.checksum import Buffer, block_sum
from common.errors import KaError
from nfsp.iod import chunk, chunkplan
from nfsp.iod.chunk import BLOCK_SIZE, HEADER_SIZE, ChunkHeader, Overlap
from nfsp.iod.chunkplan import ClearPlan, WritePlan
from nfsp.iod.chunkrows import ChunkRows, Row
from nfsp.iod.chunktree import ChunkTree
from nfsp.iod.disk import Disk

__all__ = ["ChunkFile", "Payload"]

_ZEROS = memoryview(bytes(BLOCK_SIZE))

# From here on a write is taken for part of a stream, which soon has to reach the disk anyway: the
# disk is kept busy meanwhile, instead of idle until the fsync.
WRITEBACK_SIZE_MIN = 512 * 1024


@dataclass(frozen=True, slots=True)
class Payload:
    """Verified data for a range of one chunk.

    For each block that the range overlaps, `parts` has its share of `pieces` and `sums` the block
    sum of that share.
    """

    offset: int
    length: int
    pieces: Sequence[Buffer]
    overlaps: Sequence[Overlap]
    parts: Sequence[Sequence[Buffer]]
    sums: Sequence[int]


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
        self.sync_failed = False
        self._tree = tree
        self._disk = disk
        self._boot_id = boot_id
        self._rows: ChunkRows | None = None

    def open(self) -> ChunkRows | None:
        """Return the open chunk file, or None if there is none."""
        if self._rows is None:
            fd = self._tree.open(self.inode, self.column)
            if fd is None:
                return None
            self._rows = self._opened(fd, os.fstat(fd).st_size)
        return self._rows

    @property
    def rows(self) -> ChunkRows | None:
        """The chunk file, if it is open now."""
        return self._rows

    def _create(self) -> ChunkRows:
        if self._rows is None:
            self._rows = self._opened(*self._tree.create(self.inode, self.column))
        return self._rows

    def _opened(self, fd: int, size: int) -> ChunkRows:
        return ChunkRows(
            self.inode, self.column, fd, size, disk=self._disk, boot_id=self._boot_id
        )

    def close(self) -> None:
        """Write down what is known to be durable and forget everything."""
        rows, self._rows = self._rows, None
        if rows is not None:
            try:
                rows.settle()
            finally:
                rows.file.release()

    def remove(self) -> bool:
        removed = self._tree.remove(self.inode, self.column)
        rows, self._rows = self._rows, None
        if rows is not None:
            rows.file.release()
        self.sync_failed = False
        return removed

    # -- writing

    def write(self, row: int, payload: Payload, *, chunk_size: int, refuse_new: bool) -> int:
        """Write *payload* to the chunk; return its new version.

        With *refuse_new* only blocks that are there may be written.
        """
        existed = self._rows is not None
        rows = self._create()
        try:
            entry = rows.row(row, chunk_size)
            plan = chunkplan.plan_write(entry.header, payload.overlaps)
            if plan.absent and refuse_new:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            final = plan.final_header(_new_sums(rows, plan, payload), self._boot_id)
            self._prepare(rows, plan, payload)
            try:
                self._write_data(rows, entry, plan, final, payload)
            except OSError:
                self._undo(rows, plan)
                raise
        except OSError:
            if not existed and rows.size == 0:
                self.remove()
            raise
        entry.touch(plan.intent | plan.absent)
        return final.version

    def _prepare(self, rows: ChunkRows, plan: WritePlan, payload: Payload) -> None:
        """Make sure the write cannot fail half way, nor uncover what lies under absent blocks."""
        header = plan.header
        start = chunk.data_start(header.row, header.chunk_size)
        at, end = start + payload.offset, start + payload.offset + payload.length
        if end > rows.size:
            rows.check_tail(header.row, header.chunk_size)
        if plan.absent and start + plan.overlaps[0].block * BLOCK_SIZE < rows.size:
            self._wipe(rows, start, plan.absent)
        if plan.intent and self._disk.next_hole(rows.fd, at) < end:
            self._disk.allocate(rows.fd, at, payload.length)

    def _wipe(self, rows: ChunkRows, start: int, absent: int) -> None:
        """Zero what a write that was never completed left under *absent* blocks."""
        wiped = False
        for block in chunk.bits_from(absent):
            at = start + block * BLOCK_SIZE
            data = self._disk.next_data(rows.fd, at)
            if data is None:
                break
            if data >= at + BLOCK_SIZE:
                continue
            if self._disk.pread(rows.fd, BLOCK_SIZE, at).strip(b"\0"):
                self._disk.punch(rows.fd, at, BLOCK_SIZE)
                wiped = True
        if wiped:
            # Or a power loss could keep the new header and bring the old bytes back.
            self._barrier(rows)

    def _write_data(
        self,
        rows: ChunkRows,
        entry: Row,
        plan: WritePlan,
        final: ChunkHeader,
        payload: Payload,
    ) -> None:
        row_start = final.row * chunk.row_stride(final.chunk_size)
        at = row_start + HEADER_SIZE + payload.offset
        rows.dirty = True
        if not entry.on_disk and payload.offset == 0 and row_start >= rows.size:
            self._disk.pwritev(rows.fd, [chunk.encode(final), *payload.pieces], row_start)
            rows.wrote_header(entry, final)
        else:
            if plan.intent:
                rows.write_header(entry, plan.intent_header(self._boot_id))
                if plan.barrier:
                    self._barrier(rows)
            self._disk.pwritev(rows.fd, payload.pieces, at)
            rows.write_header(entry, final)
        rows.size = max(rows.size, at + payload.length)
        if payload.length >= WRITEBACK_SIZE_MIN:
            self._disk.start_writeback(rows.fd, at, payload.length)

    def _barrier(self, rows: ChunkRows) -> None:
        try:
            self._disk.fdatasync(rows.fd)
        except OSError:
            self.sync_failed = True
            raise

    def _undo(self, rows: ChunkRows, plan: WritePlan) -> None:
        """After a failed write: take back new blocks, recover the others."""
        header = plan.header
        rows.forget(header.row)
        with contextlib.suppress(OSError, KaError):
            if os.fstat(rows.fd).st_size > rows.size:
                self._disk.ftruncate(rows.fd, rows.size)
            start = chunk.data_start(header.row, header.chunk_size)
            for block in chunk.bits_from(plan.absent):
                self._disk.punch(rows.fd, start + block * BLOCK_SIZE, BLOCK_SIZE)
            rows.row(header.row, header.chunk_size)

    # -- clearing

    def trim(self, row: int, offset: int, *, chunk_size: int) -> None:
        """Drop everything at or after that place; a chunk file that keeps nothing is removed."""
        if row == offset == 0:
            self.remove()
            return
        start = row * chunk.row_stride(chunk_size)
        rows = self.open()
        if rows is None or start >= rows.size:
            return
        if offset == 0:
            rows.cut(start, row)
            return
        plan = chunkplan.plan_clear(rows.header(row, chunk_size), offset, chunk_size)
        with self._cleared(rows, plan):
            rows.cut(start + HEADER_SIZE + offset, row + 1)

    def zero(self, row: int, offset: int, length: int, *, chunk_size: int) -> None:
        """Make a range of the chunk read as zeros; whole blocks of it become absent."""
        rows = self.open()
        if rows is None:
            return
        plan = chunkplan.plan_clear(rows.header(row, chunk_size), offset, offset + length)
        start = chunk.data_start(row, chunk_size) + offset
        with self._cleared(rows, plan):
            if start < rows.size:
                rows.dirty = True
                self._disk.punch(rows.fd, start, length)

    @contextlib.contextmanager
    def _cleared(self, rows: ChunkRows, plan: ClearPlan) -> Iterator[None]:
        """Do the headers before and after the punching or cutting inside the `with`."""
        if not plan.changes:
            yield
            return
        header = plan.header
        entry = rows.row(header.row, header.chunk_size)
        sums = _edge_sums(rows, plan)
        final = plan.final_header(sums, self._boot_id)
        try:
            rows.write_header(entry, plan.intent_header(self._boot_id) if sums else final)
            if plan.barrier:
                self._barrier(rows)
            yield
            if sums:
                rows.write_header(entry, final)
        except OSError:
            rows.forget(header.row)  # what was begun is recovered at the next use
            raise
        entry.touch(plan.dropped | chunk.bits(sums))

    # -- durability

    def begin_sync(self) -> ChunkRows | None:
        """Return what must be synced now; None if there is nothing left to do."""
        if self.sync_failed:
            raise OSError(errno.EIO, "an earlier sync of this chunk file failed")
        rows = self.open()
        if rows is None or not (rows.dirty or not rows.entry_durable):
            return None
        rows.begin_sync()
        return rows

    def end_sync(self, rows: ChunkRows) -> None:
        """Note that syncing *rows* succeeded, unless the file was removed meanwhile."""
        if self._rows is rows:
            rows.end_sync()

    def settle(self) -> None:
        if self._rows is not None:
            self._rows.settle()


def _new_sums(rows: ChunkRows, plan: WritePlan, payload: Payload) -> Sequence[int]:
    """Return the sums of the touched blocks as they will be; reads and checks what they keep."""
    if not plan.merged and not plan.overlaps[0].start:
        return payload.sums
    sums = []
    for overlap, parts, given in zip(plan.overlaps, payload.parts, payload.sums, strict=True):
        old_end = plan.merged.get(overlap.block)
        if old_end is not None:
            old = rows.read_checked(plan.header, overlap.block, old_end)
            gap = _ZEROS[: max(0, overlap.start - len(old))]
            merged = [old[: overlap.start], gap, *parts, old[overlap.end :]]
            sums.append(block_sum(merged, BLOCK_SIZE))
        elif overlap.start:
            sums.append(block_sum([_ZEROS[: overlap.start], *parts], BLOCK_SIZE))
        else:
            sums.append(given)
    return sums


def _edge_sums(rows: ChunkRows, plan: ClearPlan) -> dict[int, int]:
    """Return the sums of the blocks that keep something; reads and checks them."""
    sums = {}
    for block, (overlap, old_end) in plan.edges.items():
        old = rows.read_checked(plan.header, block, old_end)
        gap = _ZEROS[: max(0, min(overlap.end, len(old)) - overlap.start)]
        sums[block] = block_sum([old[: overlap.start], gap, old[overlap.end :]], BLOCK_SIZE)
    return sums
