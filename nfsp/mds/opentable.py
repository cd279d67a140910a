"""Who is connected and what they have open.  Pure: no clock, no sockets.

Kept in memory only; after a restart each session tells its opens anew (`SessionResume`).  Until
every session on record has come back or has run out, nobody knows what is open, and `is_open`
says yes: what is unlinked then becomes an orphan, to be swept when the table is complete.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["ClientSession", "OpenTable"]


@dataclass(slots=True)
class ClientSession:
    """One mount."""

    session: int
    host: str
    pid: int
    mountpoint: str
    durable: bool
    """Mutations are answered when they are on stable storage."""
    seen_at: float
    """Of the mds's clock: when the client last said anything."""
    resumed: bool
    """Whether it has said what it has open since the mds started."""
    opens: dict[int, list[int]] = field(default_factory=dict)
    """Inode -> [open count, 1 if opened for writing]."""


class OpenTable:
    """All sessions, and for each inode how many of them have it open."""

    def __init__(self) -> None:
        self.sessions: dict[int, ClientSession] = {}
        self._open: dict[int, int] = {}
        self._written: dict[int, int] = {}
        self._unresumed = 0

    @property
    def complete(self) -> bool:
        """Whether every session on record has told its opens."""
        return self._unresumed == 0

    def is_open(self, ino: int) -> bool:
        return self._unresumed > 0 or ino in self._open

    def is_written(self, ino: int) -> bool:
        return self._unresumed > 0 or ino in self._written

    def add(self, session: ClientSession) -> None:
        self.sessions[session.session] = session
        self._unresumed += not session.resumed

    def resume(self, session: ClientSession, opens: list[tuple[int, int, bool]]) -> list[int]:
        """Take a client's list of opens for the truth; return inodes it no longer has open."""
        if not session.resumed:
            session.resumed = True
            self._unresumed -= 1
        before = set(session.opens)
        for ino in before:
            self._drop(session, ino)
        for ino, count, writable in opens:
            self.opened(session, ino, writable=writable, count=count)
        return sorted(before - set(session.opens))

    def remove(self, session: ClientSession) -> None:
        """Forget a session and all its opens."""
        for ino in list(session.opens):
            self._drop(session, ino)
        del self.sessions[session.session]
        self._unresumed -= not session.resumed

    def opened(
        self, session: ClientSession, ino: int, *, writable: bool, count: int = 1
    ) -> None:
        """Count an open of a session."""
        entry = session.opens.get(ino)
        if entry is None:
            entry = session.opens[ino] = [0, 0]
            self._open[ino] = self._open.get(ino, 0) + 1
        entry[0] += count
        if writable and not entry[1]:
            entry[1] = 1
            self._written[ino] = self._written.get(ino, 0) + 1

    def closed(self, session: ClientSession, ino: int, count: int) -> bool:
        """Count closes of a session; return whether it has the inode open no longer."""
        entry = session.opens.get(ino)
        if entry is None:
            return False
        entry[0] -= count
        if entry[0] > 0:
            return False
        self._drop(session, ino)
        return True

    def _drop(self, session: ClientSession, ino: int) -> None:
        _count, writable = session.opens.pop(ino)
        _decrement(self._open, ino)
        if writable:
            _decrement(self._written, ino)


def _decrement(counts: dict[int, int], ino: int) -> None:
    counts[ino] -= 1
    if not counts[ino]:
        del counts[ino]
