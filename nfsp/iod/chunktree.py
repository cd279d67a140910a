"""The directory tree of the chunk files: names, creation, removal, durability of entries, listing.

A chunk file is `<inode >> 18>/<inode >> 10 & 0xff>/<inode>.<column>`, all in hexadecimal but the
column.  Inode numbers grow one by one, so 1,024 consecutive inodes share a directory, 256
directories share a parent, and the order of the tree is the order of the numbers.

Invariants
  * an empty directory is removed with its last file, whoever creates one there meanwhile;
  * a directory is `clean` when all entries it had at that moment are durable.

Thread safe.  Not here: what is inside the files.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from nfsp.iod.disk import Disk

__all__ = ["ChunkFileInfo", "ChunkTree"]

_INODE_BITS_PER_DIRECTORY = 10
_DIRECTORY_BITS_PER_PARENT = 8
_CLEAN_MAX = 8192  # remembered directories; forgetting one costs an fsync
_CREATE_TRIES_MAX = 1000  # each try lost means that another thread removed a directory
_HEX = "0123456789abcdef"
_DECIMAL = "0123456789"

_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(frozen=True, slots=True)
class ChunkFileInfo:
    """What the tree knows of one chunk file."""

    inode: int
    column: int
    size: int
    allocated_size: int


class ChunkTree:
    """The tree under *root*, which exists."""

    def __init__(self, root: str, disk: Disk) -> None:
        self._root = root
        self._disk = disk
        self._lock = threading.Lock()
        self._clean: dict[str, None] = {}
        self._creations = 0

    def directory(self, inode: int) -> str:
        group = inode >> _INODE_BITS_PER_DIRECTORY
        parent, leaf = divmod(group, 1 << _DIRECTORY_BITS_PER_PARENT)
        return f"{self._root}/{parent:x}/{leaf:02x}"

    def path(self, inode: int, column: int) -> str:
        return f"{self.directory(inode)}/{inode:x}.{column}"

    def open(self, inode: int, column: int) -> int | None:
        """Return a descriptor of the chunk file, or None if there is none."""
        try:
            return os.open(self.path(inode, column), _FLAGS)
        except FileNotFoundError:
            return None

    def create(self, inode: int, column: int) -> tuple[int, int]:
        """Return a descriptor of the chunk file and its size; makes what is missing."""
        path = self.path(inode, column)
        for _ in range(_CREATE_TRIES_MAX):
            try:
                fd = os.open(path, _FLAGS | os.O_CREAT, 0o600)
            except FileNotFoundError:
                self._make_directory(inode)
                continue
            size = os.fstat(fd).st_size
            if size == 0:
                self._soil(self.directory(inode))
            return fd, size
        raise FileNotFoundError(2, "the directory vanishes again and again", path)

    def remove(self, inode: int, column: int) -> bool:
        """Remove the chunk file and the directories that are empty then."""
        try:
            os.unlink(self.path(inode, column))
        except FileNotFoundError:
            return False
        directory = self.directory(inode)
        for path in (directory, os.path.dirname(directory)):
            try:
                os.rmdir(path)
            except OSError:
                break  # not empty, or somebody else removed it
        return True

    def sync_entry(self, inode: int) -> None:
        """Make the way from the root to the chunk files of *inode* durable."""
        leaf = self.directory(inode)
        for path in (leaf, os.path.dirname(leaf), self._root):
            with self._lock:
                if path in self._clean:
                    continue
                creations = self._creations
            self._disk.fsync_directory(path)
            with self._lock:
                if creations == self._creations:
                    self._clean[path] = None
                    if len(self._clean) > _CLEAN_MAX:
                        del self._clean[next(iter(self._clean))]

    def walk(self, after: tuple[int, int] | None) -> Iterator[ChunkFileInfo]:
        """Yield all chunk files after that (inode, column), in order, one directory at a time."""
        after = after or (-1, -1)
        group_after = after[0] >> _INODE_BITS_PER_DIRECTORY
        parent_after = group_after >> _DIRECTORY_BITS_PER_PARENT
        for parent, parent_path in self._subdirectories(self._root):
            if parent < parent_after:
                continue
            for leaf, leaf_path in self._subdirectories(parent_path):
                if (parent << _DIRECTORY_BITS_PER_PARENT) + leaf >= group_after:
                    yield from self._files(leaf_path, after)

    def _make_directory(self, inode: int) -> None:
        leaf = self.directory(inode)
        parent = os.path.dirname(leaf)
        for path in (parent, leaf):
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:
                continue
            except FileNotFoundError:
                return  # the parent was removed in between; the caller tries again
            self._soil(os.path.dirname(path), path)

    def _soil(self, *paths: str) -> None:
        """Note that entries were made in these directories."""
        with self._lock:
            self._creations += 1
            for path in paths:
                self._clean.pop(path, None)

    @staticmethod
    def _subdirectories(path: str) -> list[tuple[int, str]]:
        try:
            names = os.listdir(path)
        except FileNotFoundError:
            return []
        numbered = [(_number(name, _HEX), f"{path}/{name}") for name in names]
        return sorted((number, path) for number, path in numbered if number is not None)

    @staticmethod
    def _files(path: str, after: tuple[int, int]) -> Iterator[ChunkFileInfo]:
        keys = []
        try:
            names = os.listdir(path)
        except FileNotFoundError:
            return
        for name in names:
            inode_text, _, column_text = name.partition(".")
            inode, column = _number(inode_text, _HEX), _number(column_text, _DECIMAL)
            if inode is None or column is None or name != f"{inode:x}.{column}":
                continue  # not one of ours
            if (inode, column) > after:
                keys.append((inode, column))
        for inode, column in sorted(keys):
            try:
                status = os.stat(f"{path}/{inode:x}.{column}", follow_symlinks=False)
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode):
                yield ChunkFileInfo(inode, column, status.st_size, status.st_blocks * 512)


def _number(text: str, digits: str) -> int | None:
    """Return the number a name stands for; None if it is not one of our names."""
    if not text or set(text) - set(digits):
        return None
    return int(text, len(digits))
