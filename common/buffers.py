"""Payload buffers, reused: a fresh megabyte costs more in page faults than in copying.

`BufferPool.take` lends a memoryview; `give` returns it.  A buffer that is not given back is
simply collected.  Bounded: what does not fit into the pool is dropped.  A buffer given back twice
would be lent to two borrowers: that is found and raised.  Not for use from several threads.
"""

from __future__ import annotations

__all__ = ["BufferPool"]

_CLASSES = tuple(1 << bits for bits in range(12, 25))  # 4 KiB ... 16 MiB


class BufferPool:
    """Lends bytearrays in sizes of powers of two."""

    def __init__(self, size_max: int = 64 * 1024 * 1024) -> None:
        self._free: dict[int, list[bytearray]] = {size: [] for size in _CLASSES}
        self._pooled: set[int] = set()
        self._size_max = size_max
        self.size = 0

    def take(self, size: int) -> memoryview:
        """Return a writable view of exactly *size* bytes with undefined content."""
        rounded = max(_CLASSES[0], 1 << (size - 1).bit_length()) if size else _CLASSES[0]
        free = self._free.get(rounded)
        if free:
            self.size -= rounded
            buffer = free.pop()
            self._pooled.remove(id(buffer))
            return memoryview(buffer)[:size]
        return memoryview(bytearray(rounded if free is not None else size))[:size]

    def give(self, view: memoryview) -> None:
        """Take back what `take` returned; nobody may use it afterwards."""
        buffer = view.obj
        view.release()
        assert isinstance(buffer, bytearray)
        assert id(buffer) not in self._pooled, "given back twice"
        size = len(buffer)
        if size in self._free and self.size + size <= self._size_max:
            self._free[size].append(buffer)
            self._pooled.add(id(buffer))
            self.size += size
