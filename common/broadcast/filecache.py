"""The files that chunks are written to: open ones by number, and writing whole parts.

A tree of many small files does not exhaust descriptors.  Thread-safe: a descriptor that is lent is
not closed before it is given back.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["FileCache", "write_at"]

OPEN_COUNT_MAX = 64


class FileCache:
    """Lends descriptors; opens with the function it is given, closes the one unused longest."""

    def __init__(self, open_file: Callable[[int], int]) -> None:
        self._open = open_file
        self._lock = threading.Lock()
        self._fds: dict[int, int] = {}
        """In the order of last use."""
        self._lent: dict[int, int] = {}
        """How often each descriptor is lent."""
        self._stale: set[int] = set()

    @contextmanager
    def lend(self, index: int) -> Iterator[int]:
        """Yield the descriptor of file *index*; raises what opening it raises."""
        with self._lock:
            fd = self._fds.pop(index, -1)
            if fd < 0:
                fd = self._open(index)
            self._fds[index] = fd
            self._lent[fd] = self._lent.get(fd, 0) + 1
            self._shrink(OPEN_COUNT_MAX)
        try:
            yield fd
        finally:
            with self._lock:
                self._lent[fd] -= 1
                if not self._lent[fd]:
                    del self._lent[fd]
                    if fd in self._stale:
                        self._stale.remove(fd)
                        os.close(fd)

    def forget(self) -> None:
        """Open everything anew from now on: files have moved."""
        with self._lock:
            self._shrink(0)

    def close(self) -> None:
        self.forget()

    def _shrink(self, count: int) -> None:
        while len(self._fds) > count:
            fd = self._fds.pop(next(iter(self._fds)))
            if fd in self._lent:
                self._stale.add(fd)
            else:
                os.close(fd)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of *data*."""
    while data:
        count = os.pwrite(fd, data, offset)
        data = data[count:]
        offset += count
