"""Checksums: XXH3, 64 bits.  The only importer of xxhash.

A *block sum* is the XXH3-64 of a block's content extended with zeros to the full block size, so
it does not change when a file grows behind it.  0 is reserved for "no such block": a sum that
comes out as 0 is stored as 1.  XXH3 finds damage; it is no defence against an adversary.

Without xxhash `xxh3` takes over: right, but a thousand times slower (`COMPILED` tells).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from common.xxh3 import xxh3_64

try:
    import xxhash
except ImportError:
    COMPILED = False
else:
    COMPILED = True
"""Whether bulk data can be summed with XXH3 here."""

__all__ = [
    "ABSENT",
    "COMPILED",
    "Buffer",
    "Summing",
    "block_sum",
    "digest",
    "digest_bytes",
    "summing",
]

Buffer = bytes | bytearray | memoryview

ABSENT = 0
"""The sum of a block that was never written: it reads as zeros."""

_ZEROS = memoryview(bytes(1 << 20))


def digest(data: Buffer) -> int:
    """Return the XXH3-64 of *data*."""
    return int(xxhash.xxh3_64_intdigest(data)) if COMPILED else xxh3_64(data)


def block_sum(pieces: Sequence[Buffer], block_size: int) -> int:
    """Return the block sum of consecutive *pieces*, together at most *block_size* bytes.

    Never returns ABSENT.
    """
    if len(pieces) == 1 and len(pieces[0]) == block_size:  # nearly always
        return digest(pieces[0]) or 1
    if not COMPILED:
        return xxh3_64(b"".join(pieces).ljust(block_size, b"\0")) or 1
    state = xxhash.xxh3_64()
    length = 0
    for piece in pieces:
        state.update(piece)
        length += len(piece)
    assert length <= block_size
    if length < block_size:
        state.update(_ZEROS[: block_size - length])
    return int(state.intdigest()) or 1


class Summing(Protocol):
    """The sum of bytes that come one after the other."""

    def update(self, data: Buffer, /) -> None: ...

    def digest(self) -> bytes: ...


class _Kept:
    def __init__(self) -> None:
        self._data = bytearray()

    def update(self, data: Buffer, /) -> None:
        self._data += data

    def digest(self) -> bytes:
        return digest_bytes(self._data)


def summing() -> Summing:
    """Return an XXH3-64 to be fed with bytes; it ends as `digest_bytes` gives it."""
    return xxhash.xxh3_64() if COMPILED else _Kept()


def digest_bytes(data: Buffer) -> bytes:
    """Return the XXH3-64 of *data* as 8 bytes, big endian: to be stored and compared as such."""
    return xxhash.xxh3_64_digest(data) if COMPILED else xxh3_64(data).to_bytes(8, "big")
