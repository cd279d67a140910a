"""The metadata engine's interface: an ordered, transactional, fenced key-value store.

Owns the contract between the metadata server and whatever keeps its records.  Implementations:
lmdb_engine (embedded, the default); tests compare it with a dumb one in memory.

Contract
  * `apply` is atomic: all of a batch or nothing, visible at once, numbered 1, 2, 3 ...
  * a batch that was applied survives the death of the process; one that `wait_durable` answered
    for survives the loss of power;
  * a batch of a lower epoch than the store's is refused: the caller is no longer the owner;
  * a call that raises has changed nothing.

The synchronous calls are made from one thread, the event loop's, and take microseconds.

Not here: what keys and values mean, transactions over several batches, watching for changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from common.errors import Code, KaError

__all__ = [
    "KEY_END",
    "KEY_SIZE_MAX",
    "Batch",
    "Engine",
    "Snapshot",
    "Statistics",
    "TaskStatus",
    "require_epoch",
    "require_keys",
]

KEY_SIZE_MAX = 511
"""Bytes; LMDB's built-in limit.  The longest key of the schema holds a name of 255 bytes."""

KEY_END = b"\xff" * (KEY_SIZE_MAX + 1)
"""Greater than every key: `scan(b"", KEY_END, n)` walks the whole store."""

Batch = Mapping[bytes, bytes | None]
"""New values by key; None deletes the key (which need not exist)."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """A reading of an engine's gauges and counters."""

    epoch: int
    last_sequence: int
    """The batch applied last."""
    durable_sequence: int
    """Batches up to this one survive the loss of power."""
    checkpoint_sequence: int
    """Batches up to this one are in the main store and no longer needed elsewhere."""
    overlay_entries: int
    overlay_bytes: int
    """Keys and values held in memory until the next checkpoint."""
    journal_bytes: int
    """Journal content that a restart would replay."""
    checkpoint_count: int
    checkpoint_failure_count: int
    sync_count: int
    """Group commits: far fewer than batches when many callers wait at once."""


class TaskStatus(Protocol):
    """What `run` tells the nursery that started it (trio.TaskStatus fits)."""

    def started(self) -> None: ...


class Snapshot(Protocol):
    """A consistent read-only view; it keeps old pages alive, so close it."""

    def get(self, key: bytes) -> bytes | None: ...

    def scan(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, bytes]]: ...

    def close(self) -> None: ...


class Engine(Protocol):
    """An ordered key-value store with atomic, durable, fenced batches."""

    @property
    def epoch(self) -> int:
        """The fencing epoch; 0 in a new store."""

    def get(self, key: bytes) -> bytes | None:
        """Return the value of *key*, or None.  Raises ENGINE_DAMAGED."""

    def scan(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """Return at most *limit* pairs with start <= key < end, in key order."""

    def apply(self, batch: Batch, *, epoch: int) -> int:
        """Apply *batch* and return its sequence number.

        Raises EPOCH_STALE for a lower epoch (a higher one raises the store's), EINVAL for a key
        of a forbidden size, E2BIG for a batch that can never fit, BUSY where waiting for
        `wait_room` helps, ENOSPC where space on the disk must come back first.
        """

    async def wait_durable(self, sequence: int) -> None:
        """Return when batches up to *sequence* survive the loss of power."""

    async def wait_room(self) -> None:
        """Return when a batch that was refused with BUSY or ENOSPC may be tried again."""

    async def claim(self, epoch: int) -> None:
        """Raise the fencing epoch, durably.  Raises EPOCH_STALE unless it is a higher one."""

    async def checkpoint(self) -> None:
        """Move everything applied so far into the main store."""

    async def snapshot(self) -> Snapshot:
        """Return a view of the store that holds at least all that was applied so far."""

    async def run(self, *, task_status: TaskStatus) -> None:
        """Do the background work until cancelled."""

    def statistics(self) -> Statistics: ...

    def close(self) -> None:
        """Release files and memory; what was applied stays, unsynced batches unsynced."""


def require_keys(batch: Batch) -> None:
    """Raise EINVAL if *batch* holds a key that no engine could store."""
    for key in batch:
        if not 0 < len(key) <= KEY_SIZE_MAX:
            raise KaError(Code.EINVAL, f"a key must have 1 to {KEY_SIZE_MAX} bytes", size=len(key))


def require_epoch(epoch: int, epoch_min: int) -> None:
    """Raise EPOCH_STALE if *epoch* is too old."""
    if epoch < epoch_min:
        raise KaError(
            Code.EPOCH_STALE,
            "another metadata server has taken over this store",
            epoch=epoch,
            epoch_min=epoch_min,
        )
