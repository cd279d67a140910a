"""The least a metadata engine can be: a dictionary and its sorted keys."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping


class MemoryView:
    """Satisfies nfsp.mds.view.View; `apply` writes a batch."""

    def __init__(self) -> None:
        self.records: dict[bytes, bytes] = {}
        self._keys: list[bytes] = []

    def get(self, key: bytes, /) -> bytes | None:
        return self.records.get(key)

    def scan(self, start: bytes, end: bytes, limit: int, /) -> list[tuple[bytes, bytes]]:
        first = bisect_left(self._keys, start)
        last = min(bisect_left(self._keys, end), first + limit)
        return [(key, self.records[key]) for key in self._keys[first:last]]

    def apply(self, batch: Mapping[bytes, bytes | None]) -> None:
        for key, value in batch.items():
            known = key in self.records
            if value is not None:
                assert type(value) is bytes
                self.records[key] = value
                if not known:
                    insort(self._keys, key)
            elif known:
                del self.records[key]
                del self._keys[bisect_left(self._keys, key)]
