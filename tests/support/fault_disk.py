"""Disks for the chunk store's tests: one that fails at a chosen call, one that loses power.

Both do the real thing on real files first; what they add is where it stops, and what of it is
still there afterwards.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.checksum import Buffer
from nfsp.iod.disk import Disk

PAGE = 4096


class Killed(BaseException):
    """The process is dead from here on: nothing may run after it, like after kill -9."""


class FaultDisk(Disk):
    """Fails at the n-th changing call after `arm`; of a write a part may have been done."""

    def __init__(self) -> None:
        self.calls = 0
        self._fail_at: int | None = None
        self._part = 0.0
        self._failure: BaseException | None = None
        self._lasting = False

    def arm(self, fail_at: int, failure: BaseException, *, part: float = 0.0) -> None:
        self.calls, self._fail_at, self._part, self._failure = 0, fail_at, part, failure
        self._lasting = isinstance(failure, Killed)

    def disarm(self) -> None:
        self._fail_at = None

    def _step(self) -> bool:
        """Count a call; return whether it fails."""
        self.calls += 1
        if self._fail_at is None or self.calls <= self._fail_at:
            return False
        return self._lasting or self.calls == self._fail_at + 1

    def _fail(self) -> None:
        assert self._failure is not None
        raise self._failure

    def pwritev(self, fd: int, pieces: Sequence[Buffer], offset: int) -> None:
        if self._step():
            assert self._fail_at is not None
            data = b"".join(pieces)
            # The kernel copies page by page and looks for a reason to stop between two of them.
            stop = (offset + int(len(data) * self._part)) // PAGE * PAGE
            if self.calls == self._fail_at + 1 and stop > offset:
                super().pwritev(fd, [data[: stop - offset]], offset)
            self._fail()
        super().pwritev(fd, pieces, offset)

    def ftruncate(self, fd: int, size: int) -> None:
        if self._step():
            self._fail()
        super().ftruncate(fd, size)

    def punch(self, fd: int, offset: int, length: int) -> None:
        if self._step():
            self._fail()
        super().punch(fd, offset, length)

    def allocate(self, fd: int, offset: int, length: int) -> None:
        if self._step():
            self._fail()
        super().allocate(fd, offset, length)

    def fdatasync(self, fd: int) -> None:
        if self._step():
            self._fail()


@dataclass
class _Snapshot:
    """A page after one event; `meta` is the number of the truncation or punch that made it."""

    content: bytes
    meta: int | None
    end: int


@dataclass
class _File:
    fd: int
    durable: bytes
    pages: dict[int, list[_Snapshot]] = field(default_factory=dict)
    sizes: list[tuple[int, int, int]] = field(default_factory=list)
    metas: int = 0


class PowerDisk(Disk):
    """Remembers what is not on stable storage yet, and can lose any part of it.

    The model is that of a journaling file system: of each page one of the states it went through
    since the last sync survives, independent of other pages; truncations and punches survive up
    to some point in their order, and a page is never older than one that survived nor newer than
    one that did not.  A file whose directory was not synced may be gone.
    """

    def __init__(self) -> None:
        self._files: dict[tuple[int, int], _File] = {}
        self._durable_entries: set[str] = set()

    def _file(self, fd: int) -> _File:
        status = os.fstat(fd)
        key = (status.st_dev, status.st_ino)
        if key not in self._files:
            # The duplicate keeps the inode number from being used again.
            self._files[key] = _File(os.dup(fd), os.pread(fd, status.st_size, 0))
        return self._files[key]

    def _note(self, file: _File, start: int, end: int, meta: int | None) -> None:
        for page in range(start // PAGE, -(-end // PAGE)):
            content = os.pread(file.fd, PAGE, page * PAGE).ljust(PAGE, b"\0")
            snapshot = _Snapshot(content, meta, min(end, (page + 1) * PAGE))
            file.pages.setdefault(page, []).append(snapshot)

    def pwritev(self, fd: int, pieces: Sequence[Buffer], offset: int) -> None:
        file = self._file(fd)
        super().pwritev(fd, pieces, offset)
        self._note(file, offset, offset + sum(map(len, pieces)), None)

    def ftruncate(self, fd: int, size: int) -> None:
        file = self._file(fd)
        old_size = os.fstat(fd).st_size
        super().ftruncate(fd, size)
        file.metas += 1
        file.sizes.append((file.metas, size, old_size))
        self._note(file, size, old_size, file.metas)

    def punch(self, fd: int, offset: int, length: int) -> None:
        file = self._file(fd)
        super().punch(fd, offset, length)
        file.metas += 1
        self._note(file, offset, min(offset + length, os.fstat(fd).st_size), file.metas)

    def fdatasync(self, fd: int) -> None:
        file = self._file(fd)
        file.durable = os.pread(fd, os.fstat(fd).st_size, 0)
        file.pages.clear()
        file.sizes.clear()
        file.metas = 0

    def fsync_directory(self, path: str) -> None:
        if os.path.isdir(path):
            self._durable_entries.update(f"{path}/{name}" for name in os.listdir(path))

    def lose_power(self, rng: random.Random, root: Path) -> None:
        """Change the files below *root* to what a power loss could have left."""
        keep = rng.choice([0.0, 0.3, 0.7, 1.0])
        for file in self._files.values():
            if os.fstat(file.fd).st_nlink:
                path = os.readlink(f"/proc/self/fd/{file.fd}")
                if rng.random() >= keep and not self._entry_is_durable(path, str(root)):
                    os.unlink(path)
                else:
                    self._rewrite(file, self._survivors(file, rng, keep))
            os.close(file.fd)
        self._files.clear()

    def _entry_is_durable(self, path: str, root: str) -> bool:
        while path != root:
            if path not in self._durable_entries:
                return False
            path = os.path.dirname(path)
        return True

    @staticmethod
    def _survivors(file: _File, rng: random.Random, keep: float) -> bytes:
        metas_kept = sum(1 for _ in range(file.metas) if rng.random() < keep)
        size = len(file.durable)
        for meta, new_size, _ in file.sizes:
            if meta <= metas_kept:
                size = min(size, new_size)
        chosen: dict[int, bytes] = {}
        for page, snapshots in file.pages.items():
            lowest, highest = -1, len(snapshots) - 1
            for number, snapshot in enumerate(snapshots):
                if snapshot.meta is not None and snapshot.meta <= metas_kept:
                    lowest = number
                elif snapshot.meta is not None:
                    highest = number - 1
                    break
            pick = lowest
            while pick < highest and rng.random() < keep:
                pick += 1
            if pick >= 0:
                chosen[page] = snapshots[pick].content
                grown = [s.end for s in snapshots[lowest + 1 : pick + 1] if s.meta is None]
                size = max(size, *grown) if grown else size
        content = bytearray(file.durable.ljust(size, b"\0"))
        for page, page_content in chosen.items():
            if len(content) < (page + 1) * PAGE:
                content.extend(bytes((page + 1) * PAGE - len(content)))
            content[page * PAGE : (page + 1) * PAGE] = page_content
        return bytes(content[:size])

    @staticmethod
    def _rewrite(file: _File, content: bytes) -> None:
        os.ftruncate(file.fd, 0)
        os.ftruncate(file.fd, len(content))
        for at in range(0, len(content), PAGE):
            page = content[at : at + PAGE]
            if any(page):
                os.pwrite(file.fd, page, at)
