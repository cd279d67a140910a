"""Who calls whom: nodes are handed to the head and to nodes that are there, when free.  Pure.

Whoever is free calls next, which is the lambda-tree optimum without knowing lambda.  The head takes
the first window; a node that has attached and can call onwards gets a batch of what is left, and
more when it asks.

Invariants
  * a node is in the hands of one caller at a time; what a lost caller held is handed out again;
  * one node is the trial: until its first call has succeeded no other is given work, and if it
    fails (no key there, no route) the head calls all the rest itself;
  * what a node failed to call the head tries itself, once, before it is called failed;
  * with an `arity` nobody is given more than that many nodes (a tree by force), unless nobody else
    is left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from karun.agent.frames import HEAD

__all__ = ["Launcher"]

BATCH_COUNT_MAX = 32
"""A batch is one message; more would leave too much in the hands of one slow node."""


class Launcher:
    """The nodes that nobody has called yet, and who is calling which."""

    def __init__(self, ranks: Iterable[int], *, window: int, arity: int, relays: bool) -> None:
        """*relays*: whether nodes may be asked to call at all."""
        self._pool = deque(ranks)
        self._window = window
        self._arity = arity
        self._relays = relays or arity > 0
        self._proved = arity > 0
        self._trial: int | None = None
        self._holder: dict[int, int] = {}
        self._given: dict[int, int] = {}
        self._second: set[int] = set()
        self._callers = 1

    @property
    def stuck(self) -> bool:
        """Whether nodes wait and nobody is calling: nobody who may call more has asked for work."""
        return bool(self._pool) and not self._holder and bool(self._given)

    def head_takes(self, room: int) -> list[int]:
        """Return the nodes that the head should call now, having room for so many calls."""
        if self._arity and not self.stuck:
            room = min(room, self._arity - self._given.get(HEAD, 0))
        return self._hand(HEAD, room)

    def node_takes(self, rank: int) -> list[int]:
        """Return a batch for a node that is ready; nothing if it had better not call."""
        if not self._relays or not self._pool:
            return []
        if not self._proved:
            if self._trial is not None:
                return []
            self._trial = rank
            return self._hand(rank, 1)
        if rank not in self._given:
            self._callers += 1
        room = min(self._window, BATCH_COUNT_MAX, len(self._pool) // self._callers + 1)
        if self._arity:
            room = min(room, self._arity - self._given.get(rank, 0))
        return self._hand(rank, room)

    def joined(self, rank: int) -> bool:
        """A node is there; return whether more nodes may call from now on."""
        caller = self._holder.pop(rank, HEAD)
        if caller == HEAD or self._proved:
            return False
        self._proved = True
        return True

    def failed(self, rank: int) -> bool:
        """A call has failed; return whether the head is to try it."""
        caller = self._holder.pop(rank, HEAD)
        if caller == HEAD or rank in self._second:
            return False
        if caller == self._trial and not self._proved:
            self._relays = False
        self._second.add(rank)
        self._holder[rank] = HEAD
        return True

    def lost(self, caller: int) -> bool:
        """A node is lost: what it was calling is handed out again; return whether there is any."""
        held = [rank for rank, holder in self._holder.items() if holder == caller]
        for rank in held:
            del self._holder[rank]
        self._pool.extendleft(reversed(held))
        if caller == self._trial and not self._proved:
            self._trial = None
        return bool(held)

    def _hand(self, caller: int, room: int) -> list[int]:
        ranks = [self._pool.popleft() for _ in range(min(max(0, room), len(self._pool)))]
        for rank in ranks:
            self._holder[rank] = caller
        self._given[caller] = self._given.get(caller, 0) + len(ranks)
        return ranks
