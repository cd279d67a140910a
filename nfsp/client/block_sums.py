"""Block sums of what a client writes and reads: computed once by the writer, checked by the reader.

Pure.  What a block sum is: `common.checksum`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from common.checksum import ABSENT, Buffer, block_sum, digest
from common.errors import Code, KaError
from nfsp.model import BLOCK_SIZE
from nfsp.striping import block_spans

__all__ = ["bad_blocks", "piece_sums"]

_ZERO_BLOCK = bytes(BLOCK_SIZE)


def piece_sums(offset: int, data: Sequence[Buffer]) -> bytes:
    """Return the sums of a write: for each block touched, of the data's part inside it."""
    views = iter([memoryview(buffer) for buffer in data if len(buffer)])
    view, at = memoryview(b""), 0
    sums = []
    for start, stop in block_spans(offset, sum(map(len, data))):
        parts = []
        missing = stop - start
        while missing:
            if at == len(view):
                view, at = next(views), 0
            parts.append(view[at : at + missing])
            at += len(parts[-1])
            missing -= len(parts[-1])
        sums.append(block_sum(parts, BLOCK_SIZE))
    return struct.pack(f"<{len(sums)}Q", *sums)


def bad_blocks(packed: bytes, data: memoryview, received: int) -> list[int]:
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
