"""The world of the simulator: machines, their connections, and what is under way.  Pure.

Times are virtual, in seconds; rates in bytes a second.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from common.broadcast.hop import Hop
from common.messages import Message

__all__ = ["ABSENT", "AS_IT_CAME", "RIGHT", "WRONG", "Item", "Link", "Machine"]

ABSENT, RIGHT, WRONG, AS_IT_CAME = 0, 1, 2, 3
"""States of a chunk.  The last one is on its way, passed on before its sender has all of it."""


class Machine:
    """One node: its process, its end of the network, its disk."""

    def __init__(self, hop: Hop, chunk_count: int, rate: float, disk_rate: float) -> None:
        self.hop = hop
        self.alive = True
        self.paused = False
        self.life = 0
        """Counts restarts: what belongs to an earlier one is void."""
        self.waiting: list[Callable[[], None]] = []
        """What happened while it was paused."""
        self.rate = rate
        self.disk_rate = disk_rate
        self.outgoing: dict[int, deque[int]] = {}
        """Chunks to send, by receiver: connections take turns on the link."""
        self.sending = False
        self.under_way: dict[int, float] = {}
        """By receiver: when the last chunk that has left comes."""
        self.coming_s: dict[int, float] = {}
        """When the last byte of a chunk that is passed on meanwhile is expected."""
        self.broken_off: set[tuple[int, int]] = set()
        """Receivers and chunks: the rest of these is not waited for."""
        self.came_s = self.written_s = 0.0
        """When its link is free to receive, and its disk to write."""
        self.sink = bytearray(chunk_count)
        self.sink_full = self.sink_hangs = False
        self.blocked: list[Callable[[], None]] = []
        """What waits for a sink that hangs."""
        self.gained_s = -1.0
        """When it was last sent a chunk that it lacked."""
        self.stall_s = 0.0
        self.verified_s = -1.0


class Link:
    """The connection of two machines."""

    def __init__(self) -> None:
        self.generation = 0
        self.cut = False
        self.held: list[Callable[[], None]] = []
        self.queues: dict[tuple[int, int], deque[Item]] = {}
        """By receiver and generation: what is under way, in the order in which it comes."""


class Item(NamedTuple):
    """Something under way: a message, or a chunk."""

    ready_s: float
    """When it could be there, if nothing were before it, and all of it with the sender."""
    message: Message
    chunk: int = -1
    state: int = ABSENT
