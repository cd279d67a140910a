"""Sets of chunk indexes as whole numbers: bit i is chunk i.  Pure.

A plain `int` is the set: `|`, `&` and `& ~` are one pass over an eighth of a byte per chunk, far
below the cost of moving a chunk.  On the wire and on disk a set is as small as it can be: runs
(the usual case: a few holes), or the bits where that is shorter.

    byte 0   0: runs, then for each the gap before it and its length, as varints (7 bits a byte,
             lowest first, the high bit says "more")
             1: the bits, lowest byte first, without trailing zeros
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from common.errors import Code, KaError

__all__ = ["count_of", "decode", "encode", "first", "from_indexes", "full", "indexes", "runs"]

_RUNS, _BITS = b"\x00", b"\x01"
_ONES = re.compile("1+")


def full(count: int) -> int:
    """Return the set of chunks 0 .. count - 1."""
    return (1 << count) - 1


def from_indexes(indexes: Iterable[int]) -> int:
    bits = 0
    for index in indexes:
        bits |= 1 << index
    return bits


def first(bits: int) -> int:
    """Return the lowest index of a set that is not empty."""
    return (bits & -bits).bit_length() - 1


def count_of(bits: int) -> int:
    return bits.bit_count()


def runs(bits: int) -> Iterator[tuple[int, int]]:
    """Yield (first index, count) of each run, in order."""
    for match in _ONES.finditer(format(bits, "b")[::-1]):
        yield match.start(), match.end() - match.start()


def indexes(bits: int) -> Iterator[int]:
    """Yield the indexes of a set, in order."""
    for start, count in runs(bits):
        yield from range(start, start + count)


def encode(bits: int) -> bytes:
    """Return the shorter of the two forms."""
    flat = _BITS + bits.to_bytes((bits.bit_length() + 7) // 8, "little")
    found = bytearray(_RUNS)
    end = 0
    for start, count in runs(bits):
        _append_varint(found, start - end)
        _append_varint(found, count)
        end = start + count
        if len(found) >= len(flat):
            return flat
    return bytes(found)


def decode(data: bytes, count: int) -> int:
    """Return the set in *data*; raises KaError PROTOCOL, also for an index >= *count*."""
    if data[:1] == _BITS:
        bits = int.from_bytes(data[1:], "little")
    elif data[:1] == _RUNS:
        bits = _decode_runs(data, count)
    else:
        raise KaError(Code.PROTOCOL, "not a set of chunks")
    if bits >> count:
        raise KaError(Code.PROTOCOL, "a set of chunks names one that does not exist")
    return bits


def _append_varint(found: bytearray, value: int) -> None:
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)


def _decode_runs(data: bytes, count: int) -> int:
    numbers: list[int] = []
    value = shift = 0
    for byte in data[1:]:
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            numbers.append(value)
            value = shift = 0
        elif shift > 63:
            raise KaError(Code.PROTOCOL, "not a set of chunks: a number is too long")
    if shift or len(numbers) % 2:
        raise KaError(Code.PROTOCOL, "not a set of chunks: it is cut short")
    flat = bytearray((count + 7) // 8)
    end = 0
    for gap, length in zip(numbers[::2], numbers[1::2], strict=True):
        start, end = end + gap, end + gap + length
        if end > count:
            raise KaError(Code.PROTOCOL, "a set of chunks names one that does not exist")
        _set(flat, start, end)
    return int.from_bytes(flat, "little")


def _set(flat: bytearray, start: int, end: int) -> None:
    """Set the bits from *start* up to *end*: whole bytes at once, so that runs stay cheap."""
    low, high = (start + 7) // 8, end // 8
    if low >= high:
        for index in range(start, end):
            flat[index // 8] |= 1 << index % 8
        return
    flat[low:high] = b"\xff" * (high - low)
    for index in (*range(start, low * 8), *range(high * 8, end)):
        flat[index // 8] |= 1 << index % 8
