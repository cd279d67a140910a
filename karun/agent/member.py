"""One node's session with the head, whatever way through the tree it takes.  Sans-I/O.

Connections break and relays die; this session does not.  Orders that come down are numbered for
the whole run, events that go up are numbered for this node:

  * an order is obeyed once, in its turn: one that was obeyed is passed over, one that comes too
    early is passed over too, because the head sends all that are missing after each `attach`.  Not
    all are for all, so each says which one must have been obeyed before;
  * an event is kept until the head has said that it has it (`ack`, `welcome`), and sent again
    after an `attach`;
  * nothing is obeyed before the head has welcomed this very incarnation, so that of two agents
    started on one node (one by a relay that was thought dead) just one runs commands;
  * `full` tells the caller to read no more output: WINDOW_SIZE bytes are not acknowledged.

The head's side: karun/roster.py.
"""

from __future__ import annotations

from . import frames

WINDOW_SIZE = 256 << 10
EVENT_COST = 64
"""What an event counts beside its bytes, so that a flood of empty lines is bounded as well."""


def introduction(payload: bytes) -> tuple[bytes, int, int, int, bytes, bool]:
    """Return what a node says to introduce itself (`Member.attach`): its incarnation, how often it
    has done so, the last order obeyed, its parent, boot id, and whether the way is its own.

    Raises FrameError.
    """
    fields = frames.unpack(payload)
    if len(fields) != 6:
        raise frames.FrameError("not what introduces a node")
    count, applied, parent = map(frames.number, fields[1:4])
    return fields[0], count, applied, parent, fields[4], fields[5] == b"1"


class Member:
    """What this node has obeyed, and what it has told that may have to be told again."""

    __slots__ = (
        "_introductions", "_kept", "_kept_size", "_told", "applied", "incarnation", "joined",
        "rank",
    )  # fmt: skip

    def __init__(self, rank: int, incarnation: bytes) -> None:
        self.rank = rank
        self.incarnation = incarnation
        self.applied = 0
        self.joined = False
        """Whether the head has answered the latest attach."""
        self._told = self._introductions = 0
        self._kept: list[tuple[int, bytes]] = []
        self._kept_size = 0

    @property
    def full(self) -> bool:
        return self._kept_size >= WINDOW_SIZE

    def attach(self, parent: int, boot_id: bytes, *, direct: bool = False) -> bytes:
        """Return what introduces this node, over a new way (*direct*: a connection of its own);
        nothing is told until welcomed."""
        self.joined = False
        self._introductions += 1
        return frames.pack(
            self.incarnation, self._introductions, self.applied, parent, boot_id, int(direct)
        )

    def welcome(self, payload: bytes) -> list[bytes]:
        """Take the head's answer; return the events that it lacks."""
        incarnation, received = frames.unpack(payload)
        if incarnation != self.incarnation:
            return []
        self.joined = True
        self.ack(frames.number(received))
        return [self._event(number, told) for number, told in self._kept]

    def refused(self, payload: bytes) -> bool:
        """Return whether it is this incarnation that the head does not want."""
        return frames.unpack(payload)[0] == self.incarnation

    def order(self, payload: bytes) -> tuple[int, int, list[bytes]] | None:
        """Return number, kind and fields of an order that is to be obeyed now."""
        if not self.joined:
            return None
        fields = frames.unpack(payload)
        sequence = frames.number(fields[0])
        before = self._before(fields[1])
        if not before <= self.applied < sequence:
            return None
        self.applied = sequence
        return sequence, frames.number(fields[2]), fields[3:]

    def _before(self, field: bytes) -> int:
        """Return the order before: the last one to all, or to this node alone, if it is named."""
        before, *others = field.split(b" ")
        for rank, last in zip(others[::2], others[1::2], strict=False):
            if frames.number(rank) == self.rank:
                before = last
        return frames.number(before)

    def event(self, kind: int, *parts: bytes | str | int) -> bytes | None:
        """Keep an event; return what is to be sent now, if anything may be."""
        self._told += 1
        told = frames.pack(kind, *parts)
        self._kept.append((self._told, told))
        self._kept_size += EVENT_COST + len(told)
        return self._event(self._told, told) if self.joined else None

    def ack(self, received: int) -> None:
        """Forget the events up to this one."""
        kept = self._kept
        count = 0
        while count < len(kept) and kept[count][0] <= received:
            self._kept_size -= EVENT_COST + len(kept[count][1])
            count += 1
        del kept[:count]

    def _event(self, number: int, told: bytes) -> bytes:
        return frames.pack(number, self.applied) + told
