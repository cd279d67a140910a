"""The overlay: the batches of one journal segment, merged, sorted, in memory.

Pure.  Owns the newest value (or tombstone) of each key that was changed since a segment was
begun.  lmdb_engine keeps one or two: the active one that takes batches, and a frozen one that a
checkpoint writes to the main store; `merge_scan` lays them over a page of the main store.

Invariants
  * `keys` holds exactly the keys of `entries`, sorted, so a page of a scan costs its own length
    and never the overlay's;
  * a frozen overlay no longer changes: another thread may read it.

Not here: any bound on its size.  The journal segment behind it is the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice

from sortedcontainers import SortedList

__all__ = ["Overlay", "Pair", "merge_scan"]

Pair = tuple[bytes, bytes]


class Overlay:
    """Changed keys: value, or None where the key was deleted."""

    __slots__ = ("entries", "keys", "size")

    def __init__(self) -> None:
        self.entries: dict[bytes, bytes | None] = {}
        self.keys: SortedList = SortedList()
        self.size = 0

    @classmethod
    def from_batches(cls, batches: Iterable[Mapping[bytes, bytes | None]]) -> Overlay:
        """Return what updating with all *batches* would give; much quicker for many."""
        self = cls()
        for batch in batches:
            self.entries.update(batch)
        self.keys.update(self.entries)
        self.size = sum(len(key) + len(value or b"") for key, value in self.entries.items())
        return self

    def update(self, batch: Mapping[bytes, bytes | None]) -> None:
        """Take the changes of one batch."""
        entries = self.entries
        size = 0
        for key, value in batch.items():
            if key in entries:
                size -= len(entries[key] or b"")
            else:
                self.keys.add(key)
                size += len(key)
            size += len(value or b"")
            entries[key] = value
        self.size += size

    def range(self, start: bytes, end: bytes, limit: int) -> list[bytes]:
        """Return at most *limit* changed keys, start <= key < end, in order."""
        return list(islice(self.keys.irange(start, end, inclusive=(True, False)), limit))

    def ordered(self) -> Iterable[tuple[bytes, bytes | None]]:
        """Return all changes in key order."""
        entries = self.entries
        return ((key, entries[key]) for key in self.keys)


def merge_scan(
    read_page: Callable[[bytes, bytes, int], list[Pair]],
    decode_page: Callable[[list[Pair]], list[Pair]],
    overlays: Sequence[Overlay],
    start: bytes,
    end: bytes,
    limit: int,
) -> list[Pair]:
    """Scan the main store with *overlays* (oldest first) laid over it.

    *read_page* is the main store's scan, *decode_page* verifies the pairs that are returned from
    it.  Each round settles the interval from *start* up to the first key that some layer could
    not show within *limit* keys; runs of tombstones may take several rounds.
    """
    found: list[Pair] = []
    while start < end and len(found) < limit:
        page = read_page(start, end, limit)
        stop = _after(page[-1][0]) if len(page) == limit else end
        changed: list[list[bytes]] = []
        for overlay in overlays:
            keys = overlay.range(start, stop, limit)
            if len(keys) == limit:
                stop = min(stop, _after(keys[-1]))
            changed.append(keys)
        if any(changed):
            found += _merge(page, decode_page, overlays, changed, stop)
        else:
            found += decode_page(page)
        start = stop
    del found[limit:]
    return found


def _merge(
    page: list[Pair],
    decode_page: Callable[[list[Pair]], list[Pair]],
    overlays: Sequence[Overlay],
    changed: list[list[bytes]],
    stop: bytes,
) -> list[Pair]:
    changes: dict[bytes, bytes | None] = {}
    for overlay, keys in zip(overlays, changed, strict=True):
        entries = overlay.entries
        changes.update((key, entries[key]) for key in keys if key < stop)
    merged = decode_page([pair for pair in page if pair[0] < stop and pair[0] not in changes])
    merged += [(key, value) for key, value in changes.items() if value is not None]
    merged.sort()
    return merged


def _after(key: bytes) -> bytes:
    """Return the smallest key greater than *key*."""
    return key + b"\0"
