"""Which chunk files are open, and who may use one now.

Invariants
  * there is at most one `ChunkFile` per (inode, column), and it stays while somebody uses it;
  * at most `files_max` are kept beyond those in use; the one not used for longest goes first;
  * the cache's own lock is never held during a system call, and nobody waits for a second chunk
    file while holding one.

A file whose sync failed is kept whatever the bound says: it must not forget that.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator

from common.errors import Code, KaError
from nfsp.iod.chunkfile import ChunkFile

__all__ = ["ChunkFileCache"]

_log = logging.getLogger(__name__)

Key = tuple[int, int]


class ChunkFileCache:
    """Chunk files by (inode, column); *make* makes the object of one."""

    def __init__(self, files_max: int, make: Callable[[int, int], ChunkFile]) -> None:
        self._files_max = files_max
        self._make = make
        self._lock = threading.Lock()
        self._files: OrderedDict[Key, ChunkFile] = OrderedDict()
        self._closed = False

    @contextlib.contextmanager
    def pinned(self, inode: int, column: int) -> Iterator[ChunkFile]:
        """Keep the chunk file's object during the `with`; its lock is not taken."""
        file = self._pin((inode, column))
        try:
            yield file
        finally:
            with self._lock:
                file.pins -= 1
                victim = self._choose_victim()
            if victim is not None:
                self._evict(victim)

    @contextlib.contextmanager
    def locked_now(self, inode: int, column: int) -> Iterator[ChunkFile | None]:
        """Lock a chunk file that is open and not in use during the `with`; None: not now."""
        file = self._files.get((inode, column))
        if file is None or not file.lock.acquire(blocking=False):
            yield None
            return
        try:
            yield file
        finally:
            file.lock.release()

    def idle(self) -> list[Key]:
        """Return the chunk files that nobody uses at this moment."""
        with self._lock:
            return [key for key, file in self._files.items() if not file.pins]

    def close(self) -> None:
        """Close all files; nobody uses one now, and nobody gets one from now on."""
        with self._lock:
            self._closed = True
            files = list(self._files.values())
            self._files.clear()
        for file in files:
            with file.lock:
                _close(file)

    def _pin(self, key: Key) -> ChunkFile:
        with self._lock:
            if self._closed:
                raise KaError(Code.EBADF, "the chunk store is closed")
            file = self._files.get(key)
            if file is None:
                file = self._files[key] = self._make(*key)
            else:
                self._files.move_to_end(key)
            file.pins += 1
            return file

    def _choose_victim(self) -> ChunkFile | None:
        """Pin and return the file to be closed, if there are too many."""
        if len(self._files) <= self._files_max:
            return None
        for file in self._files.values():
            if not file.pins and not file.sync_failed:
                file.pins += 1
                return file
        return None

    def _evict(self, file: ChunkFile) -> None:
        with file.lock:
            _close(file)
        with self._lock:
            file.pins -= 1
            if not file.pins:  # else somebody wants it again, and will open it again
                self._files.pop((file.inode, file.column), None)


def _close(file: ChunkFile) -> None:
    try:
        file.close()
    except OSError as error:
        _log.warning("cannot settle inode=%d column=%d: %s", file.inode, file.column, error)
