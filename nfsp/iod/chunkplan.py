"""Decisions on one chunk: what a write, a cut, a read or a recovery of it needs.

Pure.  A header and a range go in; a plan comes out, with the headers to be written before and
after the data.  chunkfile.py does what the plan says, in the order that makes it safe.

Invariants
  * no header given out calls a block in flight or unsynced that is not present;
  * the version grows with every change of content.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from common.checksum import ABSENT
from nfsp.iod.chunk import BLOCK_SIZE, ChunkHeader, Overlap, bits, block_overlaps, data_start

__all__ = [
    "ClearPlan",
    "WritePlan",
    "plan_clear",
    "plan_write",
    "present_runs",
    "recovered_header",
    "settled_header",
    "stored_length",
    "suspects",
]


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
    overlaps: Sequence[Overlap]
    merged: dict[int, int]
    intent: int
    absent: int
    barrier: bool
    data_end: int

    def intent_header(self, boot_id: bytes) -> ChunkHeader:
        """Return the header to be written before the data."""
        return self._header(self.header.version, boot_id, self.intent, 0, self.header.sums)

    def final_header(self, sums: Sequence[int], boot_id: bytes) -> ChunkHeader:
        """Return the header to be written after the data; *sums* are those of the new content."""
        first, old = self.overlaps[0].block, self.header.sums
        new = (*old[:first], *sums, *old[first + len(sums) :])
        return self._header(self.header.version + 1, boot_id, 0, self.intent | self.absent, new)

    def _header(
        self, version: int, boot_id: bytes, in_flight: int, unsynced: int, sums: tuple[int, ...]
    ) -> ChunkHeader:
        # dataclasses.replace would be shorter, and the dearest line of a small write.
        old = self.header
        return ChunkHeader(
            old.chunk_size,
            old.inode,
            old.column,
            old.row,
            version,
            old.chain_epoch,
            self.data_end,
            boot_id,
            in_flight,
            old.unsynced | unsynced,
            sums,
        )


def plan_write(header: ChunkHeader, overlaps: Sequence[Overlap]) -> WritePlan:
    """Plan writing the range of the chunk that *overlaps* cover."""
    assert not header.in_flight, "a chunk is recovered before it is used"
    merged = {}
    intent = absent = 0
    old = header.sums
    for block, start, end in overlaps:
        if old[block] == ABSENT:
            absent |= 1 << block
            continue
        intent |= 1 << block
        old_end = _old_end(header, block)
        if old_end and (start > 0 or end < old_end):
            merged[block] = old_end
    barrier = bool(intent & ~header.unsynced)
    data_end = max(header.data_end, overlaps[-1].block * BLOCK_SIZE + overlaps[-1].end)
    return WritePlan(header, overlaps, merged, intent, absent, barrier, data_end)


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
