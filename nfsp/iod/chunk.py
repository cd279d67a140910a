"""Chunk format: the header page of a chunk, block arithmetic, and what a write or a cut must do.

Pure.  A *chunk file* holds all chunks of one (inode, column), row after row: one header page of
4096 bytes, then `chunk_size` bytes of data.  Row r starts at r * (4096 + chunk_size).  A header
page of zeros means that the chunk is absent and reads as zeros.

Position: this (format, decisions) -> chunkfile.py (order of system calls) -> chunkstore.py.

Invariants
  * the last 8 bytes of a header page are the XXH3 of all others: any flipped byte is noticed;
  * a block is present when its sum is not ABSENT; what lies on the disk under an absent block
    means nothing;
  * a present block is zero from `data_end` on, so a sum never depends on what follows it;
  * `in_flight` and `unsynced` are subsets of the present blocks: for them, and only for them,
    an interrupted write may have left content that differs from the sum.

Not here: system calls, locks, the directory tree.  Format: docs/on-disk-format.md.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from common.checksum import ABSENT, Buffer, digest

__all__ = [
    "BLOCK_SIZE",
    "BOOT_ID_SIZE",
    "CHUNK_SIZES",
    "CHUNK_SIZE_MAX",
    "CHUNK_SIZE_MIN",
    "HEADER_SIZE",
    "BadHeader",
    "ChunkHeader",
    "ClearPlan",
    "Overlap",
    "WritePlan",
    "bits",
    "bits_from",
    "block_overlaps",
    "data_start",
    "decode",
    "encode",
    "is_chunk_size",
    "new_header",
    "plan_clear",
    "plan_write",
    "present_runs",
    "recovered_header",
    "row_stride",
    "rows_in",
    "settled_header",
    "split_by_block",
    "stored_length",
    "suspects",
]

HEADER_SIZE = 4096
BLOCK_SIZE = 32 * 1024
CHUNK_SIZE_MIN = 64 * 1024
CHUNK_SIZE_MAX = 8 * 1024 * 1024
BLOCKS_MAX = 256
BOOT_ID_SIZE = 16

MAGIC = b"nfspchnk"
FORMAT = 1

# magic, format, block_size, chunk_size, column, inode, row, version, chain_epoch, data_end,
# boot_id, in_flight, unsynced; then zeros up to the sums.
_FIELDS = struct.Struct("<8sIIIIQQQII16s32s32s120x")
_SUMS_OFFSET = 256
_DIGEST = struct.Struct("<Q")
_DIGEST_OFFSET = HEADER_SIZE - _DIGEST.size
_ZERO_PAGE = bytes(HEADER_SIZE)

assert _FIELDS.size == _SUMS_OFFSET
assert CHUNK_SIZE_MAX == BLOCKS_MAX * BLOCK_SIZE
assert _SUMS_OFFSET + 8 * BLOCKS_MAX <= _DIGEST_OFFSET

CHUNK_SIZES = tuple(CHUNK_SIZE_MIN << shift for shift in range(8))
assert CHUNK_SIZES[-1] == CHUNK_SIZE_MAX

_SUM_ARRAYS = {size: struct.Struct(f"<{size // BLOCK_SIZE}Q") for size in CHUNK_SIZES}


class BadHeader(ValueError):
    """A header page that cannot be believed; the text says which field is at fault."""


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """What the header page of one chunk says.

    `sums` has one entry per block of the chunk.  Bit b of the bitmaps is block b.  `boot_id` tells
    under which boot of the machine the `unsynced` blocks were written.
    """

    chunk_size: int
    inode: int
    column: int
    row: int
    version: int
    chain_epoch: int
    data_end: int
    boot_id: bytes
    in_flight: int
    unsynced: int
    sums: tuple[int, ...]


def is_chunk_size(size: int) -> bool:
    """Return whether *size* is a chunk size this format can hold."""
    return size in _SUM_ARRAYS


def new_header(
    inode: int, column: int, row: int, *, chunk_size: int, boot_id: bytes
) -> ChunkHeader:
    """Return the header of a chunk that has no block yet."""
    sums = (ABSENT,) * (chunk_size // BLOCK_SIZE)
    return ChunkHeader(chunk_size, inode, column, row, 0, 0, 0, boot_id, 0, 0, sums)


def encode(header: ChunkHeader) -> bytes:
    """Return the header page."""
    fields = _FIELDS.pack(
        MAGIC,
        FORMAT,
        BLOCK_SIZE,
        header.chunk_size,
        header.column,
        header.inode,
        header.row,
        header.version,
        header.chain_epoch,
        header.data_end,
        header.boot_id,
        header.in_flight.to_bytes(32, "little"),
        header.unsynced.to_bytes(32, "little"),
    )
    sums = _SUM_ARRAYS[header.chunk_size].pack(*header.sums)
    covered = (fields + sums).ljust(_DIGEST_OFFSET, b"\0")
    return covered + _DIGEST.pack(digest(covered))


def decode(page: Buffer, *, inode: int, column: int, row: int | None) -> ChunkHeader | None:
    """Return the header on *page*, or None for a page of zeros or an empty one.

    Raises BadHeader if the page is damaged or does not belong at that place.  With *row* None the
    row is not compared.
    """
    if not page or page == _ZERO_PAGE[: len(page)]:
        return None
    if len(page) != HEADER_SIZE:
        raise BadHeader("the header page is cut short")
    view = memoryview(page)
    if digest(view[:_DIGEST_OFFSET]) != _DIGEST.unpack_from(page, _DIGEST_OFFSET)[0]:
        raise BadHeader("the header fails its checksum")
    (
        magic, format_, block_size, chunk_size, found_column, found_inode, found_row, version,
        chain_epoch, data_end, boot_id, in_flight, unsynced,
    ) = _FIELDS.unpack_from(page)  # fmt: skip
    if magic != MAGIC:
        raise BadHeader("this is not a chunk header")
    if format_ != FORMAT:
        raise BadHeader(f"format {format_} is not known here")
    if block_size != BLOCK_SIZE or not is_chunk_size(chunk_size) or data_end > chunk_size:
        raise BadHeader("the header's sizes are impossible")
    if (found_inode, found_column) != (inode, column) or row not in (None, found_row):
        raise BadHeader("the header belongs to another chunk")
    return ChunkHeader(
        chunk_size,
        inode,
        column,
        found_row,
        version,
        chain_epoch,
        data_end,
        boot_id,
        int.from_bytes(in_flight, "little"),
        int.from_bytes(unsynced, "little"),
        _SUM_ARRAYS[chunk_size].unpack_from(page, _SUMS_OFFSET),
    )


def row_stride(chunk_size: int) -> int:
    """Return the distance between two rows of a chunk file."""
    return HEADER_SIZE + chunk_size


def data_start(row: int, chunk_size: int) -> int:
    """Return where the data of *row* begin in the chunk file."""
    return row * (HEADER_SIZE + chunk_size) + HEADER_SIZE


def rows_in(file_size: int, chunk_size: int) -> int:
    """Return how many rows a chunk file of *file_size* bytes reaches into."""
    return -(-file_size // row_stride(chunk_size))


def bits(blocks: Iterable[int]) -> int:
    """Return the bitmap of *blocks*."""
    bitmap = 0
    for block in blocks:
        bitmap |= 1 << block
    return bitmap


def bits_from(bitmap: int) -> Iterator[int]:
    """Yield the blocks in *bitmap*, ascending."""
    while bitmap:
        low = bitmap & -bitmap
        yield low.bit_length() - 1
        bitmap ^= low


@dataclass(frozen=True, slots=True)
class Overlap:
    """The part [start, end) of one block, counted from the block's beginning."""

    block: int
    start: int
    end: int


def block_overlaps(offset: int, length: int) -> list[Overlap]:
    """Return what [offset, offset + length) of a chunk covers of each block it touches."""
    overlaps = []
    end = offset + length
    while offset < end:
        block, start = divmod(offset, BLOCK_SIZE)
        stop = min(BLOCK_SIZE, start + end - offset)
        overlaps.append(Overlap(block, start, stop))
        offset += stop - start
    return overlaps


def split_by_block(pieces: Sequence[Buffer], overlaps: Sequence[Overlap]) -> list[list[memoryview]]:
    """Return for each overlap the views of *pieces* that fall into it; nothing is copied."""
    views = iter([memoryview(piece) for piece in pieces if len(piece)])
    rest = next(views, memoryview(b""))
    result = []
    for overlap in overlaps:
        missing = overlap.end - overlap.start
        parts = []
        while missing:
            part = rest[:missing]
            parts.append(part)
            missing -= len(part)
            rest = rest[len(part) :] if len(part) < len(rest) else next(views, memoryview(b""))
        result.append(parts)
    return result


def _old_end(header: ChunkHeader, block: int) -> int:
    """Return from where on *block* is zero, counted from its beginning; 0 if it is absent."""
    if header.sums[block] == ABSENT:
        return 0
    return max(0, min(BLOCK_SIZE, header.data_end - block * BLOCK_SIZE))


@dataclass(frozen=True, slots=True)
class WritePlan:
    """What writing a range of one chunk needs.

    `merged` maps a block that keeps some of its old bytes to how many bytes of it must be read.
    `intent` are the present blocks about to change; if `barrier`, the header that says so must be
    durable first.  `absent` are the touched blocks that were not there.
    """

    header: ChunkHeader
    overlaps: tuple[Overlap, ...]
    merged: dict[int, int]
    intent: int
    absent: int
    barrier: bool
    data_end: int

    def intent_header(self, boot_id: bytes) -> ChunkHeader:
        """Return the header to be written before the data."""
        return replace(
            self.header, in_flight=self.intent, data_end=self.data_end, boot_id=boot_id
        )

    def final_header(self, sums: Sequence[int], boot_id: bytes) -> ChunkHeader:
        """Return the header to be written after the data; *sums* are those of the new content."""
        first = self.overlaps[0].block
        old = self.header.sums
        return replace(
            self.header,
            version=self.header.version + 1,
            data_end=self.data_end,
            boot_id=boot_id,
            unsynced=self.header.unsynced | self.intent | self.absent,
            sums=(*old[:first], *sums, *old[first + len(sums) :]),
        )


def plan_write(header: ChunkHeader, offset: int, length: int) -> WritePlan:
    """Plan writing [offset, offset + length) of the chunk that *header* describes."""
    assert not header.in_flight, "a chunk is recovered before it is used"
    overlaps = block_overlaps(offset, length)
    merged = {}
    intent = absent = 0
    for overlap in overlaps:
        if header.sums[overlap.block] == ABSENT:
            absent |= 1 << overlap.block
            continue
        intent |= 1 << overlap.block
        old_end = _old_end(header, overlap.block)
        if old_end and (overlap.start > 0 or overlap.end < old_end):
            merged[overlap.block] = old_end
    barrier = bool(intent & ~header.unsynced)
    data_end = max(header.data_end, offset + length)
    return WritePlan(header, tuple(overlaps), merged, intent, absent, barrier, data_end)


@dataclass(frozen=True, slots=True)
class ClearPlan:
    """What making a range of one chunk read as zeros needs.

    `dropped` blocks become absent; `edges` keep some of their old bytes, the number maps to how
    many must be read.  Both change on disk when the range is punched or cut off, so with
    `barrier` the intent header must be durable before.
    """

    header: ChunkHeader
    edges: dict[int, tuple[Overlap, int]]
    dropped: int
    barrier: bool
    data_end: int

    @property
    def changes(self) -> bool:
        return bool(self.edges or self.dropped)

    def _sums(self, new: dict[int, int]) -> tuple[int, ...]:
        return tuple(
            ABSENT if self.dropped >> block & 1 else new.get(block, old)
            for block, old in enumerate(self.header.sums)
        )

    def intent_header(self, boot_id: bytes) -> ChunkHeader:
        """Return the header to be written before the range is cleared."""
        return replace(
            self.header,
            boot_id=boot_id,
            version=self.header.version + 1,
            in_flight=bits(self.edges),
            unsynced=self.header.unsynced & ~self.dropped,
            sums=self._sums({}),
        )

    def final_header(self, edge_sums: dict[int, int], boot_id: bytes) -> ChunkHeader:
        """Return the header to be written after the range was cleared."""
        return replace(
            self.intent_header(boot_id),
            in_flight=0,
            data_end=self.data_end,
            unsynced=(self.header.unsynced & ~self.dropped) | bits(self.edges),
            sums=self._sums(edge_sums),
        )


def plan_clear(header: ChunkHeader, start: int, end: int) -> ClearPlan:
    """Plan clearing [start, end) of the chunk that *header* describes."""
    assert not header.in_flight, "a chunk is recovered before it is used"
    edges = {}
    dropped = 0
    for overlap in block_overlaps(start, end - start):
        if header.sums[overlap.block] == ABSENT:
            continue
        old_end = _old_end(header, overlap.block)
        if overlap.start == 0 and overlap.end >= old_end:
            dropped |= 1 << overlap.block
        elif overlap.start < old_end:
            edges[overlap.block] = (overlap, old_end)
    barrier = bool((dropped | bits(edges)) & ~header.unsynced)
    data_end = header.data_end if end < header.data_end else min(header.data_end, start)
    return ClearPlan(header, edges, dropped, barrier, data_end)


def stored_length(header: ChunkHeader, offset: int, length: int, file_size: int) -> int:
    """Return how many bytes from *offset* on must be read; all others of the range are zeros.

    The range is aligned to blocks.
    """
    first, last = offset // BLOCK_SIZE, (offset + length) // BLOCK_SIZE
    while last > first and header.sums[last - 1] == ABSENT:
        last -= 1
    in_file = file_size - data_start(header.row, header.chunk_size)
    return max(0, min(last * BLOCK_SIZE, header.data_end, in_file) - offset)


def present_runs(header: ChunkHeader) -> Iterator[tuple[int, int]]:
    """Yield [start, end) of each run of present blocks, in bytes of the chunk."""
    start = None
    for block, block_sum in enumerate((*header.sums, ABSENT)):
        if block_sum != ABSENT and start is None:
            start = block * BLOCK_SIZE
        elif block_sum == ABSENT and start is not None:
            yield start, block * BLOCK_SIZE
            start = None


def suspects(header: ChunkHeader, boot_id: bytes, file_size: int) -> int:
    """Return the blocks whose content an interrupted write may have left different from the sum.

    These are the blocks in flight; after a restart of the machine all unsynced ones; and unsynced
    ones whose data lie beyond the end of the file: header and data of a chunk at the end of the
    file are written in one call, which grows the file as it goes and may be cut by a kill.
    """
    if not header.in_flight and not header.unsynced:
        return 0
    if header.boot_id != boot_id:
        return header.in_flight | header.unsynced
    in_file = file_size - data_start(header.row, header.chunk_size)
    if in_file >= header.data_end:
        return header.in_flight
    whole = bits(range(max(0, in_file) // BLOCK_SIZE))
    return header.in_flight | (header.unsynced & ~whole)


def recovered_header(
    header: ChunkHeader, found: dict[int, int], boot_id: bytes, data_end: int
) -> ChunkHeader:
    """Return the header after a recovery that *found* these sums in the blocks it looked at."""
    sums = tuple(found.get(block, old) for block, old in enumerate(header.sums))
    gone = bits(block for block, block_sum in found.items() if block_sum == ABSENT)
    return replace(
        header,
        version=header.version + (sums != header.sums),
        data_end=data_end,
        boot_id=boot_id,
        in_flight=0,
        unsynced=(header.unsynced | header.in_flight) & ~gone,
        sums=sums,
    )


def settled_header(header: ChunkHeader, durable: int) -> ChunkHeader:
    """Return the header after the content of the *durable* blocks reached stable storage."""
    return replace(header, unsynced=header.unsynced & ~durable)
