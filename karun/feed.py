"""Standard input for many nodes at once: how much may be under way.  Pure.

Invariant: no more than FEED_SIZE_MAX bytes are sent that some living node has not taken, so the
slowest sets the pace, and neither head nor relays hold more than that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

__all__ = ["CHUNK_SIZE", "FEED_SIZE_MAX", "Feed"]

CHUNK_SIZE = 64 << 10
FEED_SIZE_MAX = 1 << 20


class Feed:
    """The input of one command."""

    def __init__(self, ranks: Iterable[int]) -> None:
        self._taken = dict.fromkeys(ranks, 0)
        self._chunks: list[tuple[int, int]] = []
        """For each chunk that somebody lacks: where it ends, how many lack it."""
        self._sent = 0
        self._done = 0
        self.changed: Callable[[], None] = _nothing

    @property
    def room(self) -> bool:
        """Whether another chunk may be sent.  True as well when nobody is left to take it."""
        return self._sent - self._done < FEED_SIZE_MAX or not self._taken

    def sent(self, size: int) -> None:
        self._sent += size
        if self._taken:
            self._chunks.append((self._sent, len(self._taken)))
        else:
            self._done = self._sent

    def consumed(self, rank: int, size: int) -> None:
        """A node has taken so many bytes more; it is not believed to have taken others' share."""
        if rank in self._taken:
            before = self._taken[rank]
            self._taken[rank] = after = min(before + max(0, size), self._sent)
            self._count(before, after)

    def gone(self, rank: int) -> None:
        """A node has ended its command, or is lost: nobody waits for it."""
        before = self._taken.pop(rank, None)
        if before is not None:
            self._count(before, self._sent)

    def _count(self, before: int, after: int) -> None:
        chunks = self._chunks
        for index, (end, lacking) in enumerate(chunks):
            if end > after:
                break
            if end > before:
                chunks[index] = (end, lacking - 1)
        was_full = not self.room
        while chunks and chunks[0][1] <= 0:
            self._done = chunks.pop(0)[0]
        if not self._taken:
            self._done = self._sent
            chunks.clear()
        if was_full and self.room:
            self.changed()


def _nothing() -> None:
    pass
