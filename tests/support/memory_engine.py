"""A metadata engine in memory: the model that tests hold the real one against.

Owns a dictionary and nothing else; every answer is computed in the most obvious way.  It loses
all when the process ends, so nothing but tests should use it.

Invariant: the same calls give the same answers as on every other engine.
Not here: durability, bounds on memory, speed.
"""

from __future__ import annotations

import trio

from nfsp.mds.engine import Batch, Statistics, TaskStatus, require_epoch, require_keys

__all__ = ["MemoryEngine"]


class _View:
    """A snapshot: a copy of the dictionary."""

    def __init__(self, pairs: dict[bytes, bytes]) -> None:
        self._pairs = pairs

    def get(self, key: bytes) -> bytes | None:
        return self._pairs.get(key)

    def scan(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        pairs = sorted(pair for pair in self._pairs.items() if start <= pair[0] < end)
        return pairs[:limit]

    def close(self) -> None:
        self._pairs = {}


class MemoryEngine(_View):
    """An `Engine` without a disk."""

    def __init__(self) -> None:
        super().__init__({})
        self._epoch = 0
        self._sequence = 0

    @property
    def epoch(self) -> int:
        return self._epoch

    def apply(self, batch: Batch, *, epoch: int) -> int:
        require_epoch(epoch, self._epoch)
        require_keys(batch)
        self._epoch = epoch
        for key, value in batch.items():
            if value is None:
                self._pairs.pop(key, None)
            else:
                self._pairs[key] = value
        self._sequence += 1
        return self._sequence

    async def wait_durable(self, sequence: int) -> None:
        assert sequence <= self._sequence
        await trio.lowlevel.checkpoint()

    async def wait_room(self) -> None:
        await trio.lowlevel.checkpoint()

    async def claim(self, epoch: int) -> None:
        await trio.lowlevel.checkpoint()
        require_epoch(epoch, self._epoch + 1)
        self.apply({}, epoch=epoch)

    async def checkpoint(self) -> None:
        await trio.lowlevel.checkpoint()

    async def snapshot(self) -> _View:
        await trio.lowlevel.checkpoint()
        return _View(dict(self._pairs))

    async def run(self, *, task_status: TaskStatus = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await trio.sleep_forever()

    def statistics(self) -> Statistics:
        return Statistics(
            epoch=self._epoch,
            last_sequence=self._sequence,
            durable_sequence=self._sequence,
            checkpoint_sequence=self._sequence,
            overlay_entries=0,
            overlay_bytes=0,
            journal_bytes=0,
            checkpoint_count=0,
            checkpoint_failure_count=0,
            sync_count=0,
        )
