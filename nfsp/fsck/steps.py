"""How the pure checker reads records: generators that yield a `Scan` and are sent the answer.

Whoever drives them (nfsp/fsck/run.py, or a test over a dict) decides where the records come from:
a pinned snapshot for checking, the same with the repairs made so far for mending.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple, TypeVar

from nfsp import keys

__all__ = ["Record", "Scan", "Steps", "each", "get"]

PAGE_COUNT = 500
"""Records asked for at once.  An extended attribute has up to 64 KiB: 32 MiB at worst."""

Record = tuple[bytes, bytes]


class Scan(NamedTuple):
    """Answered with at most `count_max` records of start <= key < end, in key order."""

    start: bytes
    end: bytes
    count_max: int


T = TypeVar("T")
Steps = Generator[Scan, list[Record], T]


def get(key: bytes) -> Steps[bytes | None]:
    """Return the value of one record."""
    records = yield Scan(key, keys.after(key), 1)
    return records[0][1] if records else None


def each(start: bytes, end: bytes, handle: Callable[[bytes, bytes], None]) -> Steps[None]:
    """Hand every record of start <= key < end to *handle*, in key order.

    Goes on until an empty answer, so that a peer may cut an answer short by size.
    """
    while records := (yield Scan(start, end, PAGE_COUNT)):
        for key, value in records:
            handle(key, value)
        start = keys.after(records[-1][0])
