"""Frames between head, relays and agents, and the fields inside them.  Sans-I/O.

    length u32 | kind u8 | rank u32 | payload

`rank` is whom a frame that goes down is for (or ALL), and whom one that goes up is from; relays
forward by it and read nothing else.  A payload is a row of fields, each a length and bytes, so two
payloads in a row are one; numbers are decimal.  Nothing in a frame is ever code.  Tables:
docs/karun.md#the-wire.

Invariants
  * a frame longer than FRAME_SIZE_MAX is an error before its payload is held;
  * `Decoder` gives whole frames only, whatever pieces the bytes come in, and once they are sealed
    only those whose tag is right.
"""

from __future__ import annotations

from _struct import Struct
from _struct import error as StructError  # type: ignore[attr-defined]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEADER = Struct("<IBI")
_U32 = Struct("<I")
FRAME_SIZE_MAX = 4 << 20
"""An archive of some 10 KiB, a batch of nodes or 64 KiB of output: all far below."""

TAG_SIZE = 16
"""What follows a frame where frames are sealed (karun/agent/proof.py)."""

ALL = 0xFFFFFFFF
HEAD = 0xFFFFFFFE

# Down: parent to child.
SETUP = 1
ORDER = 2
ACK = 3
WELCOME = 4
REFUSE = 5
RESYNC = 6
CALL = 7
QUIT = 8
RECALL = 9
MOVE = 10
# Up: child to parent.
ATTACH = 16
EVENT = 17
BARRIER = 18
# To the parent only.
ASK = 20
RETURN = 21
SETTLED = 22
CANNOT = 23
# Between neighbours.
PING = 30
PROVE = 31
CHALLENGE = 32
ACCEPT = 33

# What an ORDER says.
COMMAND = 1
INPUT = 2
INPUT_END = 3
SIGNAL = 4
WORLD = 5
RANK = 6
PASSED = 7
# What an EVENT tells.
OUTPUT = 1
EXITED = 2
FAILED = 3
LOST = 4
CONSUMED = 5
ABORTED = 6


class FrameError(ValueError):
    """The peer sent what no agent of this version sends."""


def encode(kind: int, rank: int, payload: bytes = b"") -> bytes:
    return HEADER.pack(len(payload), kind, rank) + payload


def pack(*fields: bytes | str | int) -> bytes:
    """Return fields as a payload; text is UTF-8 (with bytes that were none kept), int decimal."""
    parts: list[bytes] = []
    for field in fields:
        if isinstance(field, int):
            field = b"%d" % field
        elif isinstance(field, str):
            field = field.encode("utf-8", "surrogateescape")
        parts += _U32.pack(len(field)), field
    return b"".join(parts)


def unpack(payload: bytes) -> list[bytes]:
    """Return the fields of a payload; raises FrameError."""
    fields = []
    at, size = 0, len(payload)
    try:
        while at < size:
            (length,) = _U32.unpack_from(payload, at)
            at += 4 + length
            fields.append(payload[at - length : at])
    except StructError:
        raise FrameError("a field is cut off") from None
    if at > size:
        raise FrameError("a field is longer than its frame")
    return fields


def text(field: bytes) -> str:
    return field.decode("utf-8", "surrogateescape")


def number(field: bytes) -> int:
    """Return a decimal field; raises FrameError."""
    if len(field) > 20 or not (field.isdigit() or field.removeprefix(b"-").isdigit()):
        raise FrameError(f"not a number: {field[:20]!r}")
    return int(field)


def number_in(field: bytes, least: int, most: int) -> int:
    """Return a decimal field, of this range; raises FrameError."""
    value = number(field)
    if not least <= value <= most:
        raise FrameError(f"{value} is not between {least} and {most}")
    return value


class Decoder:
    """Bytes in, frames out: (kind, rank, payload)."""

    __slots__ = ("_buffer", "fits", "size_max")

    def __init__(self, size_max: int = FRAME_SIZE_MAX) -> None:
        self._buffer = bytearray()
        self.size_max = size_max
        self.fits: Callable[[bytes, bytes], bool] | None = None
        """Whether a tag is a frame's; once it is set, all frames are sealed."""

    def feed(self, data: bytes) -> Iterator[tuple[int, int, bytes]]:
        """Take bytes; yield the frames they complete; raises FrameError."""
        buffer = self._buffer
        buffer += data
        at = 0
        try:
            while len(buffer) - at >= 9:
                size, kind, rank = HEADER.unpack_from(buffer, at)
                if size > self.size_max:
                    raise FrameError(f"a frame of {size} bytes")
                end = at + 9 + size
                if self.fits is not None:
                    if len(buffer) < end + TAG_SIZE:
                        break
                    tag = bytes(buffer[end : end + TAG_SIZE])
                    if not self.fits(bytes(buffer[at:end]), tag):
                        raise FrameError("a wrong tag")
                    end += TAG_SIZE
                elif len(buffer) < end:
                    break
                payload = bytes(buffer[at + 9 : at + 9 + size])
                at = end
                yield kind, rank, payload
        finally:
            del buffer[:at]
