"""The manifest: what a transfer consists of, chunk by chunk, signed.  Pure.

It binds a transfer id (in every message, so that nobody is fed another stream), the image's id,
size and chunk size, and a sum of each chunk by a named algorithm, xxh3-64, or blake2b-128 where a
node lacks xxhash.

XXH3 finds damage, not forgery.  What keeps strangers out is the session that chunks travel in, and
the HMAC over the manifest under the session token: a node writes nothing that is not in it.

    signed manifest: msgpack [fields: bin, HMAC-SHA-256(token, "ka manifest", fields): bin]
    fields:          msgpack [format, transfer id, image id, size, chunk size, algorithm, sums]

A set of chunks is an int (`chunkset`).  Not here: reading and writing chunks.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from common import checksum, codec
from common.checksum import Buffer, Summing
from common.errors import Code, KaError
from common.framing import PAYLOAD_SIZE_MAX

__all__ = [
    "CHUNK_COUNT_MAX",
    "CHUNK_SIZE_MAX",
    "TOKEN_SIZE_MIN",
    "TRANSFER_ID_SIZE",
    "Algorithm",
    "Manifest",
    "Summing",
    "decode_signed",
    "encode_signed",
]

FORMAT = 1
TRANSFER_ID_SIZE = 16
IMAGE_ID_SIZE_MAX = 1024
TOKEN_SIZE_MIN = 16
CHUNK_SIZE_MAX = PAYLOAD_SIZE_MAX
"""A chunk is the payload of one message."""
CHUNK_COUNT_MAX = 1 << 18
"""With the longer sums a manifest stays below 4.1 MiB; with the largest chunks it is for 4 TiB."""
assert CHUNK_COUNT_MAX * 16 + 4096 < PAYLOAD_SIZE_MAX, "a manifest is the payload of one message"


_blake2b = partial(hashlib.blake2b, digest_size=16)


class Algorithm(enum.Enum):
    """How chunks are summed: the name in the manifest, and the size of a sum."""

    XXH3 = ("xxh3-64", 8)
    BLAKE2B = ("blake2b-128", 16)

    @property
    def sum_size(self) -> int:
        size: int = self.value[1]
        return size

    def sum_of(self, data: Buffer) -> bytes:
        summing = self.begin()
        summing.update(data)
        return summing.digest()

    def begin(self) -> Summing:
        return _SUMMING[self]()


_SUMMING: dict[Algorithm, Callable[[], Summing]] = {
    Algorithm.XXH3: checksum.summing,
    Algorithm.BLAKE2B: _blake2b,
}
_BY_NAME = {algorithm.value[0]: algorithm for algorithm in Algorithm}


@dataclass(frozen=True, slots=True)
class Manifest:
    """A transfer.  Raises KaError PROTOCOL when its parts do not fit together."""

    transfer_id: bytes
    image_id: str
    size: int
    chunk_size: int
    algorithm: Algorithm
    sums: bytes
    """One after the other, `algorithm.sum_size` bytes each."""

    def __post_init__(self) -> None:
        if len(self.transfer_id) != TRANSFER_ID_SIZE:
            raise KaError(Code.PROTOCOL, f"a transfer id has {TRANSFER_ID_SIZE} bytes")
        if len(self.image_id.encode("utf-8", "surrogatepass")) > IMAGE_ID_SIZE_MAX:
            raise KaError(Code.PROTOCOL, "the id of the image is too long")
        if self.size < 0 or not 0 < self.chunk_size <= CHUNK_SIZE_MAX:
            raise KaError(Code.PROTOCOL, f"impossible sizes: {self.size} in {self.chunk_size}")
        if self.chunk_count > CHUNK_COUNT_MAX:
            raise KaError(Code.PROTOCOL, f"too many chunks: {self.chunk_count}")
        if len(self.sums) != self.chunk_count * self.algorithm.sum_size:
            raise KaError(Code.PROTOCOL, "the sums do not match the number of chunks")

    @property
    def chunk_count(self) -> int:
        return -(-self.size // self.chunk_size)

    def extent(self, index: int) -> tuple[int, int]:
        """Return (offset, length) of a chunk; only the last may be short."""
        offset = index * self.chunk_size
        return offset, min(self.chunk_size, self.size - offset)

    def sum_at(self, index: int) -> bytes:
        size = self.algorithm.sum_size
        return self.sums[index * size : (index + 1) * size]

    def verify(self, index: int, data: Buffer) -> bool:
        """Return whether *data* is chunk *index*, whole and unharmed."""
        return (
            0 <= index < self.chunk_count
            and len(data) == self.extent(index)[1]
            and self.algorithm.sum_of(data) == self.sum_at(index)
        )


def encode_signed(manifest: Manifest, token: bytes) -> bytes:
    """Return the form that travels."""
    fields = _fields(manifest)
    return codec.encode((fields, _mac(token, fields)))


def decode_signed(data: Buffer, token: bytes) -> Manifest:
    """Return the manifest in *data*.

    Raises KaError AUTH when it was not signed under *token*, PROTOCOL when it is not a manifest.
    """
    match codec.decode(data):
        case [bytes(fields), bytes(mac)]:
            if not hmac.compare_digest(mac, _mac(token, fields)):
                raise KaError(Code.AUTH, "the manifest is not signed by this session")
        case _:
            raise KaError(Code.PROTOCOL, "not a manifest")
    match codec.decode(fields):
        case [
            int(version),
            bytes(transfer_id),
            str(image_id),
            int(size),
            int(chunk_size),
            str(name),
            bytes(sums),
        ] if version == FORMAT:
            return Manifest(transfer_id, image_id, size, chunk_size, _algorithm(name), sums)
    raise KaError(Code.PROTOCOL, "the manifest has another format")


def _fields(manifest: Manifest) -> bytes:
    fields: list[Any] = [
        FORMAT,
        manifest.transfer_id,
        manifest.image_id,
        manifest.size,
        manifest.chunk_size,
        manifest.algorithm.value[0],
        manifest.sums,
    ]
    return codec.encode(fields)


def _algorithm(name: str) -> Algorithm:
    algorithm = _BY_NAME.get(name)
    if algorithm is None:
        raise KaError(Code.PROTOCOL, f"chunks are summed by {name[:40]!r}, which is not known here")
    return algorithm


def _mac(token: bytes, fields: bytes) -> bytes:
    assert len(token) >= TOKEN_SIZE_MIN, "a token that can be guessed signs nothing"
    return hmac.new(token, b"ka manifest" + fields, "sha256").digest()
