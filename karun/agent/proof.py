"""How a node that lost its way to the head proves itself to an ancestor, and the other way round.

    node                                       ancestor
                                            <- CHALLENGE(nonce)
    PROVE(own nonce, MAC("node"))            ->
                                            <- ACCEPT(rank, MAC("ancestor"))

The MACs are HMAC-SHA-256 under the run's token over both nonces and the node's rank.  The token
came down the connector's own (encrypted) channel.  The ancestor proves itself only to who has
proved itself.  hmac is imported when somebody has lost their way, not before.
"""

from __future__ import annotations

from . import frames

NONCE_SIZE = 16
UNPROVED_SIZE_MAX = 256
"""All that a stranger can make us hold."""


def prove(token: bytes, rank: int, challenge: bytes, nonce: bytes) -> bytes:
    """Return the answer to a CHALLENGE."""
    theirs = frames.unpack(challenge)[0]
    return frames.pack(nonce, _mac(token, b"node", theirs, nonce, rank))


def proved(token: bytes, rank: int, nonce: bytes, payload: bytes) -> bytes | None:
    """Return the node's nonce if its PROVE is right."""
    fields = frames.unpack(payload)
    if len(fields) != 2:
        return None
    theirs, mac = fields
    return theirs if _equal(mac, _mac(token, b"node", nonce, theirs, rank)) else None


def accept(token: bytes, own_rank: int, rank: int, nonce: bytes, theirs: bytes) -> bytes:
    return frames.pack(own_rank, _mac(token, b"ancestor", nonce, theirs, rank))


def accepted(token: bytes, rank: int, challenge: bytes, nonce: bytes, payload: bytes) -> int | None:
    """Return the ancestor's rank if its ACCEPT is right."""
    ancestor, mac = frames.unpack(payload)
    right = _mac(token, b"ancestor", frames.unpack(challenge)[0], nonce, rank)
    return frames.number(ancestor) if _equal(mac, right) else None


def _mac(token: bytes, who: bytes, first: bytes, second: bytes, rank: int) -> bytes:
    import hmac

    return hmac.digest(token, frames.pack(who, first, second, rank), "sha256")


def _equal(left: bytes, right: bytes) -> bool:
    import hmac

    return hmac.compare_digest(left, right)
