"""What a program that has joined a session and the session say to each other.  Pure.

Frames (karun/agent/frames.py) over the session's socket; the rank of a frame is a node's place
among those that were joined.

    client (karun/joined.py)                           session (karun/joining.py)
    JOIN(version, names of nodes; none: all)       ->
                                                   <-  JOINED(connector, onehost, names)
                                                       or REFUSED(code, line)
    COMMAND(number, ranks, invocation)             ->
    FEED(number, data), FEED_END(number)           ->
    SIGNAL(number, signal), ABANDON(number)        ->
                                                   <-  OUTPUT(number, stream, data)
                                                   <-  EXITED(number, code, signal)
                                                   <-  FAILED(number, stage, reason)
                                                   <-  TAKEN(number, size), of what was fed

Commands are numbered by the client.  The end of the connection is the end of all its commands.
"""

from __future__ import annotations

from karun.agent import frames

__all__ = ["fields_of", "ranks_in", "version"]

VERSION = 1
"""Of this page."""
OTHER_VERSION = (
    "the session was started by another version of karun: stop it, and start it anew"
    " (karun session stop, karun session start)"
)

JOIN, COMMAND, FEED, FEED_END, SIGNAL, ABANDON = range(32, 38)
JOINED, REFUSED, OUTPUT, EXITED, FAILED, TAKEN = range(48, 54)

_FIELD_COUNTS = {
    COMMAND: 7, FEED: 2, FEED_END: 1, SIGNAL: 2, ABANDON: 1, JOINED: 3, REFUSED: 2,
    OUTPUT: 3, EXITED: 3, FAILED: 3, TAKEN: 2,
}  # fmt: skip


def version(digest: str) -> str:
    """Return what both must have in common: this page, and what the agents are made of."""
    return f"{VERSION} {digest}"


def fields_of(kind: int, payload: bytes) -> list[bytes]:
    """Return the fields of a frame; raises FrameError."""
    fields = frames.unpack(payload)
    if _FIELD_COUNTS.get(kind) != len(fields):
        raise frames.FrameError(f"a frame of kind {kind} with {len(fields)} fields")
    return fields


def ranks_in(field: bytes, count: int) -> list[int]:
    """Return the ranks that a field names, all below *count*; raises FrameError."""
    ranks = [frames.number(word) for word in field.split()]
    if any(not 0 <= rank < count for rank in ranks) or len(set(ranks)) < len(ranks):
        raise frames.FrameError(f"not nodes among the {count} that were joined")
    return ranks
