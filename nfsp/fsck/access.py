"""What the checker needs of an mds and of iods, and how pure generators are fed from them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol, TypeVar

import trio

from common.errors import Code, KaError
from nfsp.fsck import mend, steps
from nfsp.fsck.chunks import ChunkFile

__all__ = ["IodAccess", "MdsAccess", "Pinned", "drive", "repair"]

CLOSE_TIMEOUT_S = 5.0
"""A view left pinned costs the mds space, so it is closed even when cancelled."""

T = TypeVar("T")
ScanFunction = Callable[[bytes, bytes, int], Awaitable[list[steps.Record]]]


class MdsAccess(Protocol):
    """A connection to the mds (wire.SnapshotOpen, SnapshotScan, SnapshotClose, Repair)."""

    async def snapshot_open(self) -> None: ...

    async def snapshot_close(self) -> None: ...

    async def scan(self, start: bytes, end: bytes, count_max: int) -> list[steps.Record]:
        """Read raw records of the pinned view."""
        ...

    async def repair(
        self, expected: Mapping[bytes, bytes | None], records: Mapping[bytes, bytes | None]
    ) -> None:
        """Write records if *expected* still holds; KaError EBUSY if it does not."""
        ...


class IodAccess(Protocol):
    """A connection to an iod; it knows the epoch that requests carry."""

    async def list_chunks(
        self, after_ino: int, after_column: int, count_max: int
    ) -> list[ChunkFile]: ...

    async def extents(
        self, ino: int, column: int, chunk_size: int, row: int
    ) -> tuple[list[tuple[int, int, int]], int]:
        """Return (row, offset, length) of present blocks, and the row to go on from, or -1."""
        ...

    async def verify(self, ino: int, column: int) -> list[str]: ...

    async def remove(self, files: list[tuple[int, int]]) -> None: ...


async def drive(generator: steps.Steps[T], scan: ScanFunction) -> T:
    """Run a pure generator, answering its questions."""
    try:
        question = next(generator)
        while True:
            question = generator.send(await scan(*question))
    except StopIteration as stop:
        result: T = stop.value
        return result


class Pinned:
    """A pinned view, as a context manager."""

    def __init__(self, mds: MdsAccess) -> None:
        self._mds = mds

    async def __aenter__(self) -> None:
        await self._mds.snapshot_open()

    async def __aexit__(self, *_: object) -> None:
        with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
            await self._mds.snapshot_close()


async def repair(mds: MdsAccess, edit: mend.Edit) -> bool:
    """Write a batch; return False if what it was decided by has changed."""
    try:
        await mds.repair(edit.expected, edit.records)
    except KaError as error:
        if error.code is not Code.EBUSY:
            raise
        return False
    return True
