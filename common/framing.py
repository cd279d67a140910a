"""Frames: bytes in, frames out.  Sans-I/O; `transport` moves the bytes.

A frame is a fixed header, a body (one msgpack message), then an optional raw payload.  Little-
endian (docs/protocol.md#frames):

    offset  size  field
    0       4     magic            b"KaF\\x01": the last byte is the frame format's version
    4       1     kind             `Kind`
    5       1     reserved         0
    6       2     flags            0, none defined
    8       8     request id       pairs answers with requests; 0 in frames without an answer
    16      4     body size        at most the receiver's limit
    20      4     payload size     likewise
    24      8     body sum         XXH3-64 of the body
    32      8     header sum       XXH3-64 of bytes 0..31

The header sum is checked before a size is believed, the body sum before the body is decoded.
Payloads carry their own sums in the body of data messages, so they are not summed again here.

A payload never passes through the parser's buffer except for the part that arrived together with
its header: `FrameReceiver.take_payload` names the caller's buffer, and `want` then points into it.

Bounded: the parser holds at most one body of `body_size_max` bytes, and gives that memory back.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

from common.checksum import digest
from common.errors import Code, KaError

__all__ = [
    "BODY_SIZE_MAX",
    "HEADER_SIZE",
    "PAYLOAD_SIZE_MAX",
    "Frame",
    "FrameReceiver",
    "Kind",
    "encode_frame",
]

MAGIC = b"KaF\x01"
HEADER_SIZE = 40
BODY_SIZE_MAX = 2 * 1024 * 1024
"""A page of 1,000 directory entries of the largest kind stays below."""
PAYLOAD_SIZE_MAX = 16 * 1024 * 1024
RECEIVE_SIZE = 16 * 1024
"""Small: what it holds of a payload must be copied once more."""

_HEAD = struct.Struct("<4sBBHQIIQ")
_SUM = struct.Struct("<Q")
assert _HEAD.size + _SUM.size == HEADER_SIZE


class Kind(enum.IntEnum):
    """What a frame is for."""

    HANDSHAKE = 1
    REQUEST = 2
    REPLY = 3
    ERROR = 4
    CANCEL = 5
    """The sender no longer wants the answer of this request id; no body."""
    NOTIFY = 6
    """A message without an answer."""


_KINDS = {kind.value: kind for kind in Kind}
_WITH_PAYLOAD = frozenset((Kind.REQUEST, Kind.REPLY, Kind.NOTIFY))


class Frame(NamedTuple):
    kind: Kind
    request_id: int
    body: bytes
    payload_size: int


def encode_frame(kind: Kind, request_id: int, body: bytes, payload_size: int = 0) -> bytes:
    """Return header and body; the payload follows them on the wire.

    Raises KaError E2BIG for what the receiver would refuse, and the connection with it.
    """
    if len(body) > BODY_SIZE_MAX or payload_size > PAYLOAD_SIZE_MAX:
        raise KaError(Code.E2BIG, f"message too large: {len(body)} + {payload_size} bytes")
    head = _HEAD.pack(MAGIC, kind, 0, 0, request_id, len(body), payload_size, digest(body))
    return b"".join((head, _SUM.pack(digest(head)), body))


class FrameReceiver:
    """Turns received bytes into frames.

    Loop: receive into `want()`, tell `got(count)`, then call `next_frame()` until it returns None.
    After a frame with a payload call `take_payload` (or `discard_payload`); `next_frame` returns
    None until the payload is complete (`payload_complete`).
    """

    def __init__(self, *, body_size_max: int, payload_size_max: int) -> None:
        self.body_size_max = body_size_max
        self.payload_size_max = payload_size_max
        self._buffer = bytearray(RECEIVE_SIZE)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self._target: memoryview | None = None
        self._payload_left = 0
        self._header: tuple[Kind, int, int, int, int] | None = None

    @property
    def payload_left(self) -> int:
        """Return how much of the current payload has not come yet."""
        return self._payload_left

    @property
    def payload_complete(self) -> bool:
        return self._payload_left == 0

    def want(self) -> memoryview:
        """Return where the next received bytes go; never empty."""
        if self._payload_left and self._start == self._end:
            if self._target is not None:
                return self._target[-self._payload_left :]
            return self._view[: self._payload_left]
        if self._end == len(self._buffer):
            self._make_room(HEADER_SIZE if self._header is None else self._header[2])
        return self._view[self._end :]

    def got(self, count: int) -> None:
        """Account for *count* bytes received into `want()`."""
        if self._payload_left and self._start == self._end:
            self._payload_left -= count
            if not self._payload_left:
                self._target = None
        else:
            self._end += count
            if self._payload_left:
                self._feed_payload()

    def next_frame(self) -> Frame | None:
        """Return the next complete header and body, or None when more bytes are needed.

        Raises KaError PROTOCOL; the stream is then useless.
        """
        if self._payload_left:
            return None
        if self._header is None:
            if self._end - self._start < HEADER_SIZE:
                return None
            self._header = self._parse_header()
            self._start += HEADER_SIZE
        kind, request_id, body_size, payload_size, body_sum = self._header
        if self._end - self._start < body_size:
            if len(self._buffer) - self._start < body_size:
                self._make_room(body_size)
            return None
        body = bytes(self._view[self._start : self._start + body_size])
        self._start += body_size
        if digest(body) != body_sum:
            raise KaError(Code.PROTOCOL, "frame body fails its checksum")
        self._header = None
        self._payload_left = payload_size
        if self._start == self._end:
            self._emptied()
        return Frame(kind, request_id, body, payload_size)

    def take_payload(self, target: memoryview) -> None:
        """Receive the announced payload into *target*, which has exactly its size."""
        assert len(target) == self._payload_left
        self._target = target
        self._feed_payload()

    def discard_payload(self) -> None:
        """Throw away the rest of the current payload: its buffer is not touched any more."""
        self._target = None
        self._feed_payload()

    def _feed_payload(self) -> None:
        count = min(self._payload_left, self._end - self._start)
        if count:
            if self._target is not None:
                at = len(self._target) - self._payload_left
                self._target[at : at + count] = self._view[self._start : self._start + count]
            self._start += count
            self._payload_left -= count
        if not self._payload_left:
            self._target = None
        if self._start == self._end:
            self._emptied()

    def _parse_header(self) -> tuple[Kind, int, int, int, int]:
        head = self._view[self._start : self._start + _HEAD.size]
        magic, kind, reserved, flags, request_id, body_size, payload_size, body_sum = _HEAD.unpack(
            head
        )
        if magic != MAGIC:
            raise KaError(Code.PROTOCOL, "not a Ka frame")
        (head_sum,) = _SUM.unpack_from(self._view, self._start + _HEAD.size)
        if digest(head) != head_sum:
            raise KaError(Code.PROTOCOL, "frame header fails its checksum")
        if kind not in _KINDS or reserved or flags:
            raise KaError(Code.PROTOCOL, f"unknown frame kind {kind} or flags")
        if body_size > self.body_size_max or payload_size > self.payload_size_max:
            raise KaError(Code.PROTOCOL, f"frame too large: {body_size} + {payload_size} bytes")
        if payload_size and kind not in _WITH_PAYLOAD:
            raise KaError(Code.PROTOCOL, f"{_KINDS[kind].name} frame with a payload")
        return _KINDS[kind], request_id, body_size, payload_size, body_sum

    def _emptied(self) -> None:
        self._start = self._end = 0
        if len(self._buffer) > RECEIVE_SIZE:
            self._resize(RECEIVE_SIZE)

    def _make_room(self, size: int) -> None:
        """Move what is unread, less than *size* bytes, to the front of a buffer for *size*."""
        unread = bytes(self._view[self._start : self._end])
        assert len(unread) < size, "frames were not taken"
        if len(self._buffer) != max(size, RECEIVE_SIZE):
            self._resize(max(size, RECEIVE_SIZE))
        self._view[: len(unread)] = unread
        self._start, self._end = 0, len(unread)

    def _resize(self, size: int) -> None:
        self._buffer = bytearray(size)
        self._view = memoryview(self._buffer)
