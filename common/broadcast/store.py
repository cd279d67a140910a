"""What a relay needs of a source and of a sink.  Pure: interfaces only.

Methods block, and are called in worker threads unless they say otherwise.  They raise OSError or
KaError; a sink's failure is that node's alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from common.broadcast.image import Entry
from common.broadcast.manifest import Manifest

__all__ = ["Sink", "Store"]


class Store(Protocol):
    """Where chunks are read from, to be sent."""

    def locate(self, chunk: int) -> tuple[int, int] | None:
        """Return (fd, offset) when the chunk lies in one open file; else it must be `read`.

        Does not block; called in the main thread.  The file stays open until the store is closed.
        """

    def read(self, chunk: int) -> bytes:
        """Return a chunk; its sum is for the receiver to check."""


class Sink(Store, Protocol):
    """Where chunks are written to."""

    @property
    def is_prompt(self) -> bool:
        """Whether writing waits for nothing but memory, most of the time.

        If so it is done in the main thread, by `put`, as long as that stays true.
        """

    def open(self, manifest: Manifest, entries: Sequence[Entry]) -> int:
        """Get ready; return the chunks that are there already, each with its sum found right."""

    def put(self, chunk: int, at: int, part: memoryview) -> None:
        """Take a part of a chunk while it comes, *at* bytes from its beginning.

        It counts when all of the chunk was given and its sum is right; till then the place of the
        chunk may hold anything.  Only called if `is_prompt`.
        """

    def write(self, chunks: Sequence[tuple[int, memoryview]]) -> list[int]:
        """Take chunks, in any order; return those that can now be read back or are used up.

        A chunk may be returned by a later call.  May take its time: the sender is held back.
        """

    def verify(self) -> list[int]:
        """Flush, read back, return the damaged chunks; if there is none, put all in its place."""

    def abort(self) -> None:
        """Make a `write` or `verify` that hangs end soon; called from another thread."""

    def close(self) -> None:
        """Release everything; what is incomplete stays for a later transfer to resume."""
