"""Chunk format: the header page of a chunk, and block arithmetic.

Pure.  A *chunk file* holds all chunks of one (inode, column), row after row: one header page of
4096 bytes, then `chunk_size` bytes of data.  Row r starts at r * (4096 + chunk_size).  A header
page of zeros means that the chunk is absent and reads as zeros.

Position: this (format) -> chunkplan.py (decisions) -> chunkrows.py, chunkfile.py (order of system
calls) -> chunkstore.py.

Invariants
  * the last 8 bytes of a header page are the XXH3 of all others: any flipped byte is noticed;
  * a block is present when its sum is not ABSENT; what lies on the disk under an absent block
    means nothing;
  * a present block is zero from `data_end` on, so a sum never depends on what follows it;
  * `in_flight` and `unsynced` are subsets of the present blocks: for them, and only for them,
    an interrupted write may have left content that differs from the sum.

Not here: what a change needs (chunkplan.py), system calls, locks, the directory tree.
Format: docs/on-disk-format.md.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
    "Overlap",
    "bits",
    "bits_from",
    "block_overlaps",
    "data_start",
    "decode",
    "encode",
    "is_chunk_size",
    "new_header",
    "row_stride",
    "rows_in",
    "split_by_block",
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


class Overlap(NamedTuple):
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
    view, at = memoryview(b""), 0
    result = []
    for overlap in overlaps:
        missing = overlap.end - overlap.start
        parts = []
        while missing:
            if at == len(view):
                view, at = next(views), 0
            parts.append(view[at : at + missing])
            at += len(parts[-1])
            missing -= len(parts[-1])
        result.append(parts)
    return result
