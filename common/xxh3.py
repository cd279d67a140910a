"""XXH3-64 in plain Python: for a node that has the interpreter and nothing else.  Pure.

`common.checksum` uses it where xxhash, which is compiled, cannot be imported: the headers and
bodies of frames are summed with XXH3 by everybody.  It takes about 20 microseconds for those, and
a second for a few megabytes: data are then summed by blake2b (`common.broadcast.manifest`).

Source: the XXH3 specification (xxHash 0.8), seed 0 and the default secret.
"""

from __future__ import annotations

import struct

__all__ = ["xxh3_64"]

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
assert len(_SECRET) == 192

_PRIME32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_PRIME64 = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)
_MASK = (1 << 64) - 1
_MASK32 = (1 << 32) - 1
_STRIPE_SIZE = 64
_BLOCK_SIZE = 1024
_EIGHT = struct.Struct("<8Q")
_STRIPE_KEYS = [_EIGHT.unpack_from(_SECRET, 8 * n) for n in range(16)]
_SCRAMBLE_KEYS = _EIGHT.unpack_from(_SECRET, 192 - 64)
_LAST_KEYS = _EIGHT.unpack_from(_SECRET, 192 - 64 - 7)


def xxh3_64(data: bytes | bytearray | memoryview) -> int:
    """Return the XXH3-64 of *data*."""
    data = bytes(data)
    size = len(data)
    if size > 240:
        return _long(data)
    if size > 128:
        return _up_to_240(data)
    if size > 16:
        return _up_to_128(data)
    return _up_to_16(data)


def _read64(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")


def _read32(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")


def _swap64(value: int) -> int:
    return int.from_bytes(value.to_bytes(8, "little"), "big")


def _rotated(value: int, count: int) -> int:
    return (value << count | value >> (64 - count)) & _MASK


def _fold(one: int, other: int) -> int:
    product = one * other
    return (product & _MASK) ^ (product >> 64)


def _avalanche(value: int) -> int:
    value ^= value >> 37
    value = value * 0x165667919E3779F9 & _MASK
    return value ^ value >> 32


def _avalanche_64(value: int) -> int:
    value ^= value >> 33
    value = value * _PRIME64[1] & _MASK
    value ^= value >> 29
    value = value * _PRIME64[2] & _MASK
    return value ^ value >> 32


def _mix(data: bytes, at: int, key_at: int) -> int:
    return _fold(
        _read64(data, at) ^ _read64(_SECRET, key_at),
        _read64(data, at + 8) ^ _read64(_SECRET, key_at + 8),
    )


def _up_to_16(data: bytes) -> int:
    size = len(data)
    if size > 8:
        low = _read64(data, 0) ^ _read64(_SECRET, 24) ^ _read64(_SECRET, 32)
        high = _read64(data, size - 8) ^ _read64(_SECRET, 40) ^ _read64(_SECRET, 48)
        return _avalanche((size + _swap64(low) + high + _fold(low, high)) & _MASK)
    if size >= 4:
        value = _read32(data, size - 4) + (_read32(data, 0) << 32)
        value ^= _read64(_SECRET, 8) ^ _read64(_SECRET, 16)
        value ^= _rotated(value, 49) ^ _rotated(value, 24)
        value = value * 0x9FB21C651E98DF25 & _MASK
        value ^= (value >> 35) + size
        value = value * 0x9FB21C651E98DF25 & _MASK
        return value ^ value >> 28
    if size:
        value = data[0] << 16 | data[size >> 1] << 24 | data[-1] | size << 8
        return _avalanche_64(value ^ _read32(_SECRET, 0) ^ _read32(_SECRET, 4))
    return _avalanche_64(_read64(_SECRET, 56) ^ _read64(_SECRET, 64))


def _up_to_128(data: bytes) -> int:
    size = len(data)
    total = size * _PRIME64[0]
    for pair in range((size - 1) // 32, -1, -1):
        total += _mix(data, 16 * pair, 32 * pair)
        total += _mix(data, size - 16 * (pair + 1), 32 * pair + 16)
    return _avalanche(total & _MASK)


def _up_to_240(data: bytes) -> int:
    size = len(data)
    total = size * _PRIME64[0]
    for n in range(8):
        total += _mix(data, 16 * n, 16 * n)
    total = _avalanche(total & _MASK)
    for n in range(8, size // 16):
        total += _mix(data, 16 * n, 16 * (n - 8) + 3)
    total += _mix(data, size - 16, 136 - 17)
    return _avalanche(total & _MASK)


def _long(data: bytes) -> int:
    size = len(data)
    lanes = [
        _PRIME32[2], _PRIME64[0], _PRIME64[1], _PRIME64[2],
        _PRIME64[3], _PRIME32[1], _PRIME64[4], _PRIME32[0],
    ]  # fmt: skip
    block_count = (size - 1) // _BLOCK_SIZE
    for block in range(block_count):
        for n, keys in enumerate(_STRIPE_KEYS):
            _accumulate(lanes, data, block * _BLOCK_SIZE + n * _STRIPE_SIZE, keys)
        for lane, key in enumerate(_SCRAMBLE_KEYS):
            value = lanes[lane]
            lanes[lane] = (value ^ value >> 47 ^ key) * _PRIME32[0] & _MASK
    start = block_count * _BLOCK_SIZE
    for n in range((size - 1 - start) // _STRIPE_SIZE):
        _accumulate(lanes, data, start + n * _STRIPE_SIZE, _STRIPE_KEYS[n])
    _accumulate(lanes, data, size - _STRIPE_SIZE, _LAST_KEYS)
    total = size * _PRIME64[0]
    for n in range(4):
        total += _fold(
            lanes[2 * n] ^ _read64(_SECRET, 11 + 16 * n),
            lanes[2 * n + 1] ^ _read64(_SECRET, 19 + 16 * n),
        )
    return _avalanche(total & _MASK)


def _accumulate(lanes: list[int], data: bytes, at: int, keys: tuple[int, ...]) -> None:
    for lane, value in enumerate(_EIGHT.unpack_from(data, at)):
        keyed = value ^ keys[lane]
        lanes[lane ^ 1] = (lanes[lane ^ 1] + value) & _MASK
        lanes[lane] = (lanes[lane] + (keyed & _MASK32) * (keyed >> 32)) & _MASK
