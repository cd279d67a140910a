"""Group commit: one sync of the journal for all who wait.

Owns the durable sequence and the thread that syncs.  A caller who needs durability either runs
the next sync or, while one is in progress, waits for its end and looks again: a sync covers what
had been applied when it began.

Invariants
  * at most one sync at a time; no sync is begun after one has failed;
  * durable_sequence only grows.

Not here: what is refused after a failure (lmdb_engine), what a sync does (journal_files).
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from nfsp.mds.journal_files import Journal, sync

__all__ = ["GroupSync"]


class GroupSync:
    """Advances the durable sequence of one journal."""

    def __init__(
        self, journal: Journal, durable_sequence: int, on_failure: Callable[[OSError], object]
    ) -> None:
        self.durable_sequence = durable_sequence
        self.sync_count = 0
        self._journal = journal
        self._on_failure = on_failure
        self._thread = trio.CapacityLimiter(1)
        self._finished: trio.Event | None = None

    @property
    def is_busy(self) -> bool:
        return self._finished is not None

    def note(self, sequence: int) -> None:
        """Learn that batches up to *sequence* are durable by other means."""
        self.durable_sequence = max(self.durable_sequence, sequence)

    async def advance(self, applied_sequence: int) -> None:
        """Make durable what has been applied, or see the sync in progress end.

        A failure is told to `on_failure`, once, before any waiter goes on.
        """
        if self._finished is not None:
            await self._finished.wait()
            return
        self._finished = finished = trio.Event()
        try:
            # Cancelled before the thread starts, or not at all.
            await trio.to_thread.run_sync(sync, self._journal.unsynced(), limiter=self._thread)
            self.sync_count += 1
            self.note(applied_sequence)
            self._journal.mark(self.durable_sequence)
        except OSError as error:
            self._on_failure(error)
        finally:
            self._finished = None
            finished.set()
