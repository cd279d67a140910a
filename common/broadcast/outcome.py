"""Outcomes: who has verified the data, who failed and why.  Pure.

A `Ledger` is what one hop knows of all ranks.  Ledgers are merged on the way up the control tree.
Merging is a join (the greater of two entries stays), so reports may be repeated, come twice by
different ways, or in any order, and a hop that changes its parent simply tells everything again.

Order of entries: verified beats all; then the higher attempt; then failed, lost, pending.  An
attempt is a node's attach, counted by the node: that a node was lost under an earlier attempt is
void when it has attached again.  Only the node itself says that it has verified.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from common.broadcast import chunkset
from common.broadcast.wire import Report
from common.errors import Code, KaError

__all__ = ["Entry", "Ledger", "Summary", "Verdict"]

REASON_SIZE_MAX = 500


class Verdict(enum.IntEnum):
    PENDING = 0
    LOST = 1
    """A neighbour says that it is gone."""
    FAILED = 2
    """It says itself that it cannot."""
    VERIFIED = 3


class Entry(NamedTuple):
    verdict: Verdict
    attempt: int
    reason: str

    def beats(self, other: Entry) -> bool:
        return (self.attempt, self.verdict) > (other.attempt, other.verdict)


@dataclass(frozen=True, slots=True)
class Summary:
    """The end of a transfer, as the source tells it."""

    verified: int
    """A set of ranks."""
    others: dict[int, Entry]
    """Every other receiver, with the reason."""
    notes: dict[int, str]
    """What an operator should know of a node, whatever became of it."""

    @property
    def exit_code(self) -> int:
        """0: all have it; 2: some; 1: none."""
        if not self.others:
            return 0
        return 2 if self.verified else 1


_NO_REPORT = Entry(Verdict.PENDING, 0, "never joined")
_JOINED = Entry(Verdict.PENDING, 1, "did not report in time")


class Ledger:
    """What one hop knows, and what of it its parent has not been told yet."""

    def __init__(self, receiver_count: int, chunk_count: int = 0) -> None:
        self._all = chunkset.full(receiver_count + 1) & ~1
        self._joined = 0
        self._verified = 0
        self._others: dict[int, Entry] = {}
        self._notes: dict[int, str] = {}
        self.ready = 0
        """Ranks that listen for a multicast pass."""
        self.lacking = 0
        """Chunks that at least one of them lacks."""
        self._told_joined = 0
        self._told_verified = 0
        self._told_ready = self._told_lacking = 0
        self._untold: set[int] = set()
        self._untold_notes: set[int] = set()
        self._rank_count = receiver_count + 1
        self._chunk_count = chunk_count

    @property
    def verified_count(self) -> int:
        return self._verified.bit_count()

    def join(self, rank: int, attempt: int) -> bool:
        """Note that a rank has attached; whether that is news."""
        if attempt > 1:
            return self._learn(rank, Entry(Verdict.PENDING, attempt, _JOINED.reason))
        return self._merge_joined(1 << rank)

    def verify(self, rank: int) -> bool:
        """Note the rank's own word that it has verified everything."""
        return self._merge_verified(1 << rank)

    def fail(self, rank: int, attempt: int, reason: str) -> bool:
        return self._learn(rank, Entry(Verdict.FAILED, attempt, reason[:REASON_SIZE_MAX]))

    def lose(self, rank: int, attempt: int, reason: str) -> bool:
        return self._learn(rank, Entry(Verdict.LOST, attempt, reason[:REASON_SIZE_MAX]))

    def note(self, rank: int, text: str) -> bool:
        """Keep the first thing that is said about a rank."""
        if rank in self._notes:
            return False
        self._notes[rank] = text[:REASON_SIZE_MAX]
        self._untold_notes.add(rank)
        return True

    def entry(self, rank: int) -> Entry:
        if self._verified >> rank & 1:
            return Entry(Verdict.VERIFIED, 0, "")
        least = _JOINED if self._joined >> rank & 1 else _NO_REPORT
        known = self._others.get(rank, least)
        return known if known.beats(least) else least

    def merge(self, report: Report) -> bool:
        """Take in a child's report; whether there was news.  Raises KaError PROTOCOL."""
        joined = chunkset.decode(report.joined, self._rank_count)
        verified = chunkset.decode(report.verified, self._rank_count)
        ready = chunkset.decode(report.ready, self._rank_count)
        lacking = chunkset.decode(report.lacking, self._chunk_count)
        others = [self._checked_entry(item) for item in report.others]
        notes = [self._checked_note(item) for item in report.notes]
        news = self._merge_joined(joined)
        news |= self._merge_verified(verified)
        self.ready |= ready
        self.lacking |= lacking
        for rank, entry in others:
            news |= self._learn(rank, entry)
        for rank, text in notes:
            news |= self.note(rank, text)
        return news

    def untold(self, transfer: bytes) -> Report | None:
        """Return what the parent has not been told, and take it for told; None for nothing."""
        joined = self._joined & ~self._told_joined
        verified = self._verified & ~self._told_verified
        ready = self.ready & ~self._told_ready
        lacking = self.lacking & ~self._told_lacking
        if not (joined or verified or ready or self._untold or self._untold_notes):
            return None
        self._told_joined, self._told_verified = self._joined, self._verified
        self._told_ready, self._told_lacking = self.ready, self.lacking
        others = [[rank, *self._others[rank]] for rank in sorted(self._untold)]
        notes = [[rank, self._notes[rank]] for rank in sorted(self._untold_notes)]
        self._untold.clear()
        self._untold_notes.clear()
        return Report(
            transfer,
            chunkset.encode(joined),
            chunkset.encode(verified),
            others,
            notes,
            chunkset.encode(ready),
            chunkset.encode(lacking),
        )

    def forget_told(self) -> None:
        """A new parent knows nothing yet."""
        self._told_joined = self._told_verified = 0
        self._told_ready = self._told_lacking = 0
        self._untold = set(self._others)
        self._untold_notes = set(self._notes)

    def open_ranks(self) -> int:
        """Return the set of ranks that have neither verified nor failed."""
        failed = chunkset.from_indexes(
            rank for rank in self._others if self.entry(rank).verdict is Verdict.FAILED
        )
        return self._all & ~self._verified & ~failed

    def all_open_are_lost(self, present: int) -> bool:
        """Return whether all that are open are lost, or are not *present* and once were."""
        lost = set(self._absent(present))
        return all(
            rank in lost or self.entry(rank).verdict is Verdict.LOST
            for rank in chunkset.indexes(self.open_ranks())
        )

    def lose_absent(self, present: int) -> None:
        """Note of ranks that have joined, and are open and not *present*, that they are lost.

        Whoever was to say so may be lost itself, or know of an earlier attempt only.
        """
        for rank in self._absent(present):
            self.lose(rank, self.entry(rank).attempt, "nobody hears of it any more")

    def _absent(self, present: int) -> list[int]:
        return [
            rank
            for rank in chunkset.indexes(self.open_ranks() & ~present)
            if self.entry(rank).attempt >= _JOINED.attempt
        ]

    def some_never_joined(self) -> bool:
        """Whether any of the open ranks has never attached."""
        waiting = chunkset.indexes(self.open_ranks() & ~self._joined)
        return any(self.entry(rank).attempt <= 1 for rank in waiting)

    def summary(self) -> Summary:
        others = {rank: self.entry(rank) for rank in chunkset.indexes(self._all & ~self._verified)}
        return Summary(self._verified, others, dict(self._notes))

    def _learn(self, rank: int, entry: Entry) -> bool:
        if not entry.beats(self.entry(rank)) or self._verified >> rank & 1:
            return False
        self._others[rank] = entry
        self._untold.add(rank)
        return True

    def _merge_joined(self, ranks: int) -> bool:
        news = ranks & ~self._joined
        self._joined |= ranks
        return bool(news)

    def _merge_verified(self, ranks: int) -> bool:
        news = ranks & self._all & ~self._verified
        self._verified |= news
        for rank in chunkset.indexes(news):
            self._others.pop(rank, None)
            self._untold.discard(rank)
        return bool(news)

    def _checked_entry(self, item: Any) -> tuple[int, Entry]:
        match item:
            case [int(rank), int(verdict), int(attempt), str(reason)]:
                if 0 < rank < self._rank_count and Verdict.PENDING <= verdict <= Verdict.FAILED:
                    return rank, Entry(Verdict(verdict), attempt, reason[:REASON_SIZE_MAX])
        raise KaError(Code.PROTOCOL, "not an entry of a report")

    def _checked_note(self, item: Sequence[Any]) -> tuple[int, str]:
        match item:
            case [int(rank), str(text)] if 0 < rank < self._rank_count:
                return rank, text
        raise KaError(Code.PROTOCOL, "not a note of a report")
