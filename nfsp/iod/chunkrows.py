"""An open chunk file: its headers, their recovery, verified reading, and what of it is durable.

The caller holds the chunk file's lock.  An object lives as long as its descriptor; closing the
file forgets nothing that is not on disk.

Invariants
  * `size` is the file's size: nobody else changes the file;
  * a header is recovered before anybody sees it;
  * data that fail their sum are not returned;
  * a block is called durable only if a sync that began after its last write has succeeded.

Position: chunkplan.py (decisions) -> this -> chunkfile.py (changes).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from common.checksum import ABSENT, block_sum
from common.errors import Code, KaError
from nfsp.iod import chunk, chunkplan
from nfsp.iod.chunk import BLOCK_SIZE, HEADER_SIZE, ChunkHeader
from nfsp.iod.disk import Disk

__all__ = ["ChunkRows", "OpenFile", "Row"]

_log = logging.getLogger(__name__)

# Bounds the headers kept per open file: 64 of 1 MiB chunks, some 100 KB.
_CACHED_BLOCKS_MAX = 2048

# A search for the chunk size looks at so many allocated regions before it gives up.
_PROBES_MAX = 64

_FAILS = "stored data fail their checksum"


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
class Row:
    """A header as it is on disk, and what is known beyond it.

    `durable`: blocks it calls unsynced that are on stable storage.  While a sync runs, `pending`
    are the blocks it will have made durable, `recent` those written since it began.
    """

    header: ChunkHeader
    on_disk: bool
    durable: int = 0
    pending: int = 0
    recent: int = 0

    def touch(self, blocks: int) -> None:
        """Note that the content of *blocks* has changed."""
        self.durable &= ~blocks
        self.recent |= blocks


class ChunkRows:
    """The rows of one chunk file while it is open."""

    def __init__(
        self, inode: int, column: int, fd: int, size: int, *, disk: Disk, boot_id: bytes
    ) -> None:
        self.inode = inode
        self.column = column
        self.file = OpenFile(fd)
        self.fd = fd
        self.size = size
        self.boot_id = boot_id
        self.dirty = True  # an earlier process may have left something to sync
        self.entry_durable = False
        self._disk = disk
        self._rows: OrderedDict[int, Row] = OrderedDict()
        self._chunk_size: int | None = None
        self._tail_checked = size == 0

    # -- headers

    def row(self, row: int, chunk_size: int) -> Row:
        """Return the row, recovered; CHUNK_CORRUPT if its header cannot be believed."""
        cached = self._rows.get(row)
        if cached is not None and cached.header.chunk_size == chunk_size:
            self._rows.move_to_end(row)
            return cached
        if self._chunk_size not in (None, chunk_size):
            raise self.corrupt(row, None, "the chunk file has another chunk size")
        entry = self._load(row, chunk_size)
        if entry.on_disk:
            self._chunk_size = chunk_size
        self._rows[row] = entry
        blocks = len(entry.header.sums)
        while len(self._rows) > 1 and len(self._rows) * blocks > _CACHED_BLOCKS_MAX:
            oldest = next(iter(self._rows))
            self._settle_row(self._rows[oldest])
            del self._rows[oldest]
        return entry

    def header(self, row: int, chunk_size: int) -> ChunkHeader:
        return self.row(row, chunk_size).header

    def known(self, row: int, chunk_size: int) -> ChunkHeader | None:
        """Return the row's header if it is in memory."""
        cached = self._rows.get(row)
        if cached is None or cached.header.chunk_size != chunk_size:
            return None
        return cached.header

    def read_now(self, header: ChunkHeader, offset: int, length: int) -> bytes | None:
        """Return the stored part of an aligned range, unverified, if it is in memory."""
        stored = chunkplan.stored_length(header, offset, length, self.size)
        if not stored:
            return b""
        start = chunk.data_start(header.row, header.chunk_size) + offset
        return self._disk.pread_now(self.fd, stored, start)

    def forget(self, row: int) -> None:
        """Drop a header from memory, because what is on disk may be another."""
        self._rows.pop(row, None)

    def write_header(self, entry: Row, header: ChunkHeader) -> None:
        start = header.row * chunk.row_stride(header.chunk_size)
        self.dirty = True
        self._disk.pwritev(self.fd, [chunk.encode(header)], start)
        self.wrote_header(entry, header)
        self.size = max(self.size, start + HEADER_SIZE)

    def wrote_header(self, entry: Row, header: ChunkHeader) -> None:
        """Note that *header* is on disk now."""
        entry.header = header
        entry.on_disk = True
        self._chunk_size = header.chunk_size

    def _load(self, row: int, chunk_size: int) -> Row:
        start = row * chunk.row_stride(chunk_size)
        page = self._disk.pread(self.fd, HEADER_SIZE, start) if start < self.size else b""
        try:
            header = chunk.decode(page, inode=self.inode, column=self.column, row=row)
            if header is not None and header.chunk_size != chunk_size:
                raise chunk.BadHeader("the header has another chunk size")
        except chunk.BadHeader as error:
            raise self.corrupt(row, None, str(error)) from None
        if header is None:
            header = chunk.new_header(
                self.inode, self.column, row, chunk_size=chunk_size, boot_id=self.boot_id
            )
            return Row(header, on_disk=False)
        entry = Row(header, on_disk=True)
        if chunkplan.suspects(header, self.boot_id, self.size):
            self._recover(entry)
        return entry

    def _recover(self, entry: Row) -> None:
        """Adopt what an interrupted write left in the blocks it may have touched."""
        header = entry.header
        found = {}
        data_end = header.data_end
        for block in chunk.bits_from(chunkplan.suspects(header, self.boot_id, self.size)):
            content = self._read_block(header, block, BLOCK_SIZE)
            found[block] = block_sum([content], BLOCK_SIZE) if content else ABSENT
            if found[block] == header.sums[block]:
                continue
            data_end = max(data_end, block * BLOCK_SIZE + len(content))
            _log.warning(
                "recovered un-fsynced block inode=%d column=%d row=%d block=%d",
                self.inode, self.column, header.row, block,
            )  # fmt: skip
        in_file = self.size - chunk.data_start(header.row, header.chunk_size)
        data_end = max(0, min(data_end, in_file))
        recovered = chunkplan.recovered_header(header, found, self.boot_id, data_end)
        self.write_header(entry, recovered)

    def check_tail(self, row: int, chunk_size: int) -> None:
        """Before *row* makes the file grow, recover the last chunk: the size is all it has."""
        if self._tail_checked:
            return
        last = chunk.rows_in(self.size, chunk_size) - 1
        if last != row and last not in self._rows:
            # A damaged header there is no matter of this row, and nothing can be recovered.
            with contextlib.suppress(KaError):
                self._load(last, chunk_size)
        self._tail_checked = True

    def cut(self, size: int, rows_kept: int) -> None:
        """Cut the file off at *size*; the last of the *rows_kept* was recovered, or is whole."""
        if size < self.size:
            self.dirty = True
            self._disk.ftruncate(self.fd, size)
            self.size = size
        for row in [row for row in self._rows if row >= rows_kept]:
            del self._rows[row]
        self._tail_checked = True
        if size == 0:
            self._chunk_size = None

    def corrupt(self, row: int, block: int | None, message: str) -> KaError:
        context = {} if block is None else {"block": block}
        return KaError(
            Code.CHUNK_CORRUPT, message, inode=self.inode, column=self.column, row=row, **context
        )

    # -- reading

    def _read_block(self, header: ChunkHeader, block: int, length: int) -> bytes:
        start = chunk.data_start(header.row, header.chunk_size) + block * BLOCK_SIZE
        return self._disk.pread(self.fd, length, start)

    def read_checked(self, header: ChunkHeader, block: int, length: int) -> memoryview:
        """Return the first *length* bytes of a present block, behind which it is zero."""
        content = self._read_block(header, block, length)
        if block_sum([content], BLOCK_SIZE) != header.sums[block]:
            raise self.corrupt(header.row, block, _FAILS)
        return memoryview(content)

    def read_verified(self, header: ChunkHeader, offset: int, length: int) -> bytes:
        """Return the stored part of an aligned range; what is missing behind it is zeros."""
        stored = chunkplan.stored_length(header, offset, length, self.size)
        start = chunk.data_start(header.row, header.chunk_size) + offset
        data = self._disk.pread(self.fd, stored, start) if stored else b""
        view = memoryview(data)
        first = offset // BLOCK_SIZE
        absent = []
        for block in range(first, first + length // BLOCK_SIZE):
            at = block * BLOCK_SIZE - offset
            if header.sums[block] == ABSENT:
                absent.append(at)
            elif block_sum([view[at : at + BLOCK_SIZE]], BLOCK_SIZE) != header.sums[block]:
                raise self.corrupt(header.row, block, _FAILS)
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
        os.posix_fadvise(self.fd, start, header.chunk_size, os.POSIX_FADV_DONTNEED)
        damaged = []
        for block, expected in enumerate(header.sums):
            if expected != ABSENT:
                length = min(BLOCK_SIZE, max(0, header.data_end - block * BLOCK_SIZE))
                if block_sum([self._read_block(header, block, length)], BLOCK_SIZE) != expected:
                    damaged.append(block)
        return damaged

    def rows_from(self, row: int, chunk_size: int) -> Iterator[int]:
        """Yield the rows from *row* on that are not holes."""
        stride = chunk.row_stride(chunk_size)
        while row * stride < self.size:
            data = self._disk.next_data(self.fd, row * stride)
            if data is None:
                return
            row = max(row, data // stride)
            yield row
            row += 1

    def discover_chunk_size(self) -> int | None:
        """Return the chunk size that a header in the file tells, None if nothing is present.

        Raises CHUNK_CORRUPT if the file begins with something that is no header.
        """
        position = self._disk.next_data(self.fd, 0)
        for _ in range(_PROBES_MAX):
            if position is None:
                break
            for candidate in chunk.CHUNK_SIZES:
                row = position // chunk.row_stride(candidate)
                if self._is_header(row, candidate) or self._is_header(row + 1, candidate):
                    return candidate
            hole = self._disk.next_hole(self.fd, position)
            position = self._disk.next_data(self.fd, hole)
        self._load(0, chunk.CHUNK_SIZE_MIN)
        return None

    def _is_header(self, row: int, chunk_size: int) -> bool:
        start = row * chunk.row_stride(chunk_size)
        page = self._disk.pread(self.fd, HEADER_SIZE, start)
        try:
            header = chunk.decode(page, inode=self.inode, column=self.column, row=row)
        except chunk.BadHeader:
            return False
        return header is not None and header.chunk_size == chunk_size

    # -- durability

    def begin_sync(self) -> None:
        """Note what a sync beginning now will make durable."""
        self.dirty = False
        for entry in self._rows.values():
            entry.pending, entry.recent = entry.header.unsynced, 0

    def end_sync(self) -> None:
        """Note that the sync succeeded."""
        self.entry_durable = True
        for entry in self._rows.values():
            entry.durable |= entry.pending & ~entry.recent & entry.header.unsynced
            entry.pending = 0

    def settle(self) -> None:
        """Write down which blocks are durable, so that damage to them is never taken for a crash.

        Losing this write is harmless: the blocks are then called unsynced for longer.
        """
        for entry in self._rows.values():
            self._settle_row(entry)

    def _settle_row(self, entry: Row) -> None:
        if entry.durable:
            dirty = self.dirty
            self.write_header(entry, chunkplan.settled_header(entry.header, entry.durable))
            entry.durable = 0
            self.dirty = dirty
