"""How a node and an ancestor prove themselves over TCP, and what protects all they say after it.

    node                                       ancestor
                                            <- CHALLENGE(nonce)
    PROVE(own nonce, MAC("node"))            ->
                                            <- ACCEPT(rank, MAC("ancestor"))

The MACs are keyed BLAKE2b (RFC 7693) under the run's token over both nonces and the node's rank.
The token came down the connector's own (encrypted) channel.  The ancestor proves itself only to who
has proved itself.  Every frame after that carries a tag (`Seal`), so who sits on the way can read
what is said and can cut the connection, but cannot put in a word, change, drop or repeat one.
"""

from __future__ import annotations

from _blake2 import blake2b
from _operator import _compare_digest as is_equal

from . import frames

NONCE_SIZE = 16
UNPROVED_SIZE_MAX = 256
"""All that a stranger can make us hold."""
MAC_SIZE = 32


class Seal:
    """Tags of one direction of one connection: each is of a frame and of its number."""

    __slots__ = ("_count", "_key")

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._count = 0

    def tag(self, frame: bytes) -> bytes:
        """Return the tag of the next frame."""
        self._count += 1
        mac = blake2b(b"%16x" % self._count, key=self._key, digest_size=frames.TAG_SIZE)
        mac.update(frame)
        return mac.digest()

    def fits(self, frame: bytes, tag: bytes) -> bool:
        """Return whether this is the tag of the next frame."""
        return bool(is_equal(self.tag(frame), tag))


def nonce_of(challenge: bytes) -> bytes:
    """Return what a CHALLENGE asks to be proved over; raises FrameError."""
    fields = frames.unpack(challenge)
    if len(fields) != 1:
        raise frames.FrameError("no challenge")
    return fields[0]


def prove(token: bytes, rank: int, challenge: bytes, nonce: bytes) -> bytes:
    """Return the answer to a CHALLENGE; raises FrameError."""
    return frames.pack(nonce, _mac(token, b"node", nonce_of(challenge), nonce, rank))


def proved(token: bytes, rank: int, nonce: bytes, payload: bytes) -> bytes | None:
    """Return the node's nonce if its PROVE is right."""
    fields = frames.unpack(payload)
    if len(fields) != 2:
        return None
    theirs, mac = fields
    return theirs if is_equal(mac, _mac(token, b"node", nonce, theirs, rank)) else None


def accept(token: bytes, own_rank: int, rank: int, nonce: bytes, theirs: bytes) -> bytes:
    return frames.pack(own_rank, _mac(token, b"ancestor", nonce, theirs, rank))


def accepted(token: bytes, rank: int, challenge: bytes, nonce: bytes, payload: bytes) -> int | None:
    """Return the ancestor's rank if its ACCEPT is right."""
    fields = frames.unpack(payload)
    if len(fields) != 2:
        return None
    ancestor, mac = fields
    right = _mac(token, b"ancestor", nonce_of(challenge), nonce, rank)
    return frames.number(ancestor) if is_equal(mac, right) else None


def seals(token: bytes, rank: int, ancestors: bytes, nodes: bytes) -> tuple[Seal, Seal]:
    """Return what seals frames that go down, and those that go up; of both their nonces."""
    down, up = (_mac(token, way, ancestors, nodes, rank) for way in (b"down", b"up"))
    return Seal(down), Seal(up)


def _mac(token: bytes, who: bytes, first: bytes, second: bytes, rank: int) -> bytes:
    said = frames.pack(who, first, second, rank)
    return blake2b(said, key=token, digest_size=MAC_SIZE).digest()
