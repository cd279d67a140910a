"""The head's side of every node's session: who is there, what each has obeyed and told.  Pure.

The counterpart of karun/agent/member.py.  One log of orders serves all nodes; a node that attaches
gets what it lacks of it, which is how a command reaches a node that has just joined, and one that
lost its relay.  An order is for all nodes or for some, and tells a node that gets it which one it
must have obeyed before: the last one to all, or what was ordered of it alone since then.

Invariants
  * the first incarnation of a node that attaches is the node; another one is refused;
  * an event counts once, in its turn, whatever way and how often it comes;
  * an order is kept until every node that it is for, and that may still attach, has obeyed it.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Iterator

from karun.agent import frames
from karun.agent.member import EVENT_COST, WINDOW_SIZE, introduction

__all__ = ["Event", "Roster", "State"]

ACK_SIZE = WINDOW_SIZE // 4
_TRIM_COUNT = 64
_FIELD_COUNTS = {
    frames.OUTPUT: 3, frames.EXITED: 3, frames.FAILED: 4, frames.LOST: 3, frames.CONSUMED: 2,
    frames.ABORTED: 4,
}  # fmt: skip

Event = tuple[int, list[bytes]]


class State(enum.Enum):
    """What the head knows of a node."""

    ABSENT = "not there yet"
    JOINED = "attached"
    DETACHED = "lost its way, may come back"
    FAILED = "given up"


class Roster:
    """All nodes of a run, by rank."""

    def __init__(self, size: int) -> None:
        self.states = [State.ABSENT] * size
        self.parents = [frames.HEAD] * size
        self.direct = [False] * size
        """Whether each has a connection of its own with its parent, not that of a connector."""
        self.loss_counts = [0] * size
        """How often each has lost its way: a wait for its return is about one loss."""
        self._incarnations = [b""] * size
        self._boot_ids = [b""] * size
        self._introductions = [0] * size
        self._applied = [0] * size
        self._received = [0] * size
        self._unacked = [0] * size
        self._last_to_all = 0
        self._unheard: dict[int, int] = {}
        """Since the last order to all: of each node that got one of its own, and has not been heard
        to have obeyed it, the last."""
        self._log: list[tuple[bytes, Collection[int] | None]] = []
        """Of each order what is sent, and whom it is for; None: all."""
        self._log_base = 0
        """How many orders have been dropped from the front of the log."""

    @property
    def size(self) -> int:
        return len(self.states)

    @property
    def unheard_count(self) -> int:
        """How many nodes an order names that have one of their own to obey."""
        return len(self._unheard)

    def boot_id(self, rank: int) -> bytes:
        return self._boot_ids[rank]

    def order(
        self, kind: int, *fields: bytes | str | int, ranks: Collection[int] | None = None
    ) -> tuple[int, bytes]:
        """Number an order to all, or to *ranks*, and keep it; return number and payload."""
        number = self._log_base + len(self._log) + 1
        before = f"{self._last_to_all}"
        for rank, last in self._unheard.items():
            before += f" {rank} {last}"
        payload = frames.pack(number, before, kind, *fields)
        self._log.append((payload, ranks))
        if ranks is None:
            self._last_to_all = number
            self._unheard.clear()
        else:
            for rank in ranks:
                if self.states[rank] is not State.FAILED:
                    self._unheard[rank] = number
        if len(self._log) % _TRIM_COUNT == 0:
            self._trim()
        return number, payload

    def attach(self, rank: int, payload: bytes) -> tuple[bool, bytes, list[bytes]]:
        """Return whether the node is welcome, what to answer, and the orders that it lacks."""
        incarnation, count, obeyed, parent, boot_id, direct = introduction(payload)
        known = self._incarnations[rank]
        if self.states[rank] is State.FAILED or (known and known != incarnation):
            return False, frames.pack(incarnation), []
        self.states[rank] = State.JOINED
        self._incarnations[rank] = incarnation
        self._boot_ids[rank] = boot_id
        self.parents[rank] = parent
        self.direct[rank] = direct
        self._introductions[rank] = count
        self._has_obeyed(rank, obeyed)
        answer = frames.pack(incarnation, self._received[rank])
        later = self._log[max(0, obeyed - self._log_base) :]
        return True, answer, [order for order, ranks in later if ranks is None or rank in ranks]

    def event(self, rank: int, payload: bytes) -> Event | None:
        """Return kind and fields of an event that is news; raises FrameError."""
        if self.states[rank] is State.FAILED:
            return None
        fields = frames.unpack(payload)
        if len(fields) < 3:
            raise frames.FrameError("an event without its number")
        number = frames.number(fields[0])
        if number != self._received[rank] + 1:
            return None
        self._received[rank] = number
        self._has_obeyed(rank, frames.number(fields[1]))
        self._unacked[rank] += EVENT_COST + len(payload)
        kind = frames.number(fields[2])
        if _FIELD_COUNTS.get(kind) != len(fields) - 3:
            raise frames.FrameError(f"an event of kind {kind} with {len(fields) - 3} fields")
        return kind, fields[3:]

    def ack_due(self, rank: int) -> bytes | None:
        """Return the acknowledgement that is due, if one is."""
        if self._unacked[rank] < ACK_SIZE:
            return None
        self._unacked[rank] = 0
        return frames.pack(self._received[rank])

    def lost(self, rank: int, parent: int, count: int) -> list[int]:
        """A parent misses a child; return the nodes that have thereby lost their way.

        Nothing is lost if the child, or its children, have found another parent meanwhile, or have
        come back to this one: the child that is missed had introduced itself *count* times.
        """
        is_same = self.parents[rank] == parent and self._introductions[rank] == count
        if not is_same or self.states[rank] is not State.JOINED:
            return []
        found = list(self.below(rank))
        for one in found:
            self.states[one] = State.DETACHED
            self.loss_counts[one] += 1
        return found

    def below(self, rank: int) -> Iterator[int]:
        """Yield a node and the joined nodes that reach the head through it."""
        children: dict[int, list[int]] = {}
        for one, parent in enumerate(self.parents):
            if self.states[one] is State.JOINED and parent != frames.HEAD:
                children.setdefault(parent, []).append(one)
        queue = [rank]
        while queue:
            one = queue.pop()
            yield one
            queue.extend(children.pop(one, ()))

    def fail(self, rank: int) -> None:
        """Give a node up: it is refused from now on."""
        self.states[rank] = State.FAILED
        self._unheard.pop(rank, None)

    def in_state(self, state: State) -> Iterable[int]:
        return (rank for rank, one in enumerate(self.states) if one is state)

    def _has_obeyed(self, rank: int, number: int) -> None:
        self._applied[rank] = number
        if self._unheard and self._unheard.get(rank, number + 1) <= number:
            del self._unheard[rank]

    def _trim(self) -> None:
        needed = self._log_base + len(self._log)
        for rank, applied in enumerate(self._applied):
            last = self._unheard.get(rank, self._last_to_all)
            if applied < last and self.states[rank] is not State.FAILED:
                needed = min(needed, applied)
        if needed > self._log_base:
            del self._log[: needed - self._log_base]
            self._log_base = needed
