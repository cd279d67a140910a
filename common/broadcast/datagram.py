"""Datagrams of a multicast pass: the bytes.  Pure.

    magic "KaM1" | kind u8 | 3 zero bytes | transfer id, 16 | chunk u32 | piece u16 | 2 zero bytes
    | tag, 8 | payload

`piece` counts within the chunk.  The tag is a BLAKE2b of all else, keyed by the transfer's
token: what a stranger sends into the group is dropped, and so is what belongs to another transfer.
The payload itself is not secret: whoever is in the group can read it.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import struct
from typing import NamedTuple

from common.broadcast.manifest import CHUNK_SIZE_MAX, TRANSFER_ID_SIZE
from common.checksum import Buffer

__all__ = [
    "HEADER_SIZE",
    "PAYLOAD_SIZE_MIN",
    "Datagram",
    "DatagramCodec",
    "DatagramKind",
    "piece_count",
]

MAGIC = b"KaM1"
_HEAD = struct.Struct(">4sB3x16sIH2x")
TAG_SIZE = 8
HEADER_SIZE = _HEAD.size + TAG_SIZE
PAYLOAD_SIZE_MIN = 512
"""Of a piece that is not the last of its chunk."""
assert CHUNK_SIZE_MAX // PAYLOAD_SIZE_MIN <= 1 << 16, "a piece number has 16 bits"


class DatagramKind(enum.IntEnum):
    DATA = 1
    SENT = 2
    """All has been sent once: ask now for what is lacking."""
    OVER = 3
    """The pass is over: go on as hops."""


class Datagram(NamedTuple):
    kind: DatagramKind
    chunk: int
    piece: int
    payload: memoryview


class DatagramCodec:
    """The datagrams of one transfer."""

    def __init__(self, transfer_id: bytes, token: bytes) -> None:
        assert len(transfer_id) == TRANSFER_ID_SIZE
        self._transfer_id = transfer_id
        key = hashlib.blake2b(token, digest_size=32, person=b"ka multicast").digest()
        self._keyed = hashlib.blake2b(key=key, digest_size=TAG_SIZE)

    def header(self, kind: DatagramKind, chunk: int, piece: int, payload: Buffer = b"") -> bytes:
        """Return what goes before the payload."""
        head = _HEAD.pack(MAGIC, kind, self._transfer_id, chunk, piece)
        return head + self._tag(head, payload)

    def decode(self, data: memoryview) -> Datagram | None:
        """Return the datagram in *data*; None for one that is not of this transfer."""
        if len(data) < HEADER_SIZE or data[:4] != MAGIC:
            return None
        head = bytes(data[: _HEAD.size])
        _, kind, transfer_id, chunk, piece = _HEAD.unpack(head)
        payload = data[HEADER_SIZE:]
        if transfer_id != self._transfer_id or kind not in DatagramKind._value2member_map_:
            return None
        tag = bytes(data[_HEAD.size : HEADER_SIZE])
        if not hmac.compare_digest(tag, self._tag(head, payload)):
            return None
        return Datagram(DatagramKind(kind), chunk, piece, payload)

    def _tag(self, head: bytes, payload: Buffer) -> bytes:
        keyed = self._keyed.copy()
        keyed.update(head)
        keyed.update(payload)
        return keyed.digest()


def piece_count(length: int, payload_size: int) -> int:
    """Return into how many datagrams a chunk of this length is cut."""
    return -(-length // payload_size)
