"""One row of numbers for each inode, in columns: about 80 bytes each, 80 MB for a million.

Pure.  Rows are added in the order of inode numbers (that is how the records come), so that a row
is found by bisection; a few late rows, for directories whose inode must be rebuilt, go to the end.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator

from nfsp.model import Layout

__all__ = ["DIR", "REG", "SortedInts", "Table"]

DIR = 0o04
REG = 0o10
LNK = 0o12
KINDS = frozenset((0o01, 0o02, DIR, 0o06, REG, LNK, 0o14))
"""File types as in `model.Dentry.kind`."""
UNREADABLE = 0
"""The kind of a row whose inode record tells nothing."""

REBUILD = 1
"""Flag: a directory whose inode record must be written anew."""
UNSURE = 2
"""Flag: size or layout are not to be trusted, so chunks are not judged by them."""
ORPHAN = 4
"""Flag: the inode has an orphan record."""

COOKIE_MAX = (1 << 62) - 1
"""Far below the 63 bits that readdir has, so that a directory can always go on counting."""

COUNT_CLAMP = (1 << 32) - 1
"""Stands for a count that cannot be right."""


class SortedInts:
    """A set of numbers added in any order, 8 bytes each."""

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        self._numbers = array("Q", sorted(numbers))

    def add_largest(self, number: int) -> None:
        """Add a number that is not below those before it."""
        self._numbers.append(number)

    def __contains__(self, number: int) -> bool:
        at = bisect_left(self._numbers, number)
        return at < len(self._numbers) and self._numbers[at] == number

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)


class Table:
    """What the checker remembers of all inodes."""

    def __init__(self) -> None:
        self.inos = array("Q")
        self.kinds = array("B")
        self.flags = array("B")
        self.nlinks = array("I")
        """As recorded."""
        self.names = array("I")
        """As counted: entries that name the inode."""
        self.subdirs = array("I")
        """As counted, directories only."""
        self.sizes = array("Q")
        self.layouts = array("I")
        """Index into `layout_list`; 0: none."""
        self.parents = array("Q")
        """As recorded, directories only."""
        self.next_cookies = array("Q")
        self.link_parents = array("Q")
        """Where the first (for directories: the right) name is."""
        self.link_cookies = array("Q")
        self.xattr_counts_recorded = array("I")
        self.xattr_counts = array("I")
        """As counted."""
        self.digests = array("Q")
        """Sum of hashes: name records minus readdir records; 0 when they agree."""
        self.layout_list: list[Layout | None] = [None]
        self._layout_index: dict[Layout | None, int] = {None: 0}
        self._late: dict[int, int] = {}

    def add(
        self,
        ino: int,
        kind: int,
        *,
        flags: int = 0,
        nlink: int = 0,
        size: int = 0,
        layout: Layout | None = None,
        parent: int = 0,
        next_cookie: int = 0,
        xattr_count: int = 0,
    ) -> int:
        """Add a row; numbers out of range are stored as ones that no check can take for right."""
        row = len(self.inos)
        if self._late or (row and ino <= self.inos[row - 1]):
            self._late[ino] = row
        self.inos.append(ino)
        self.kinds.append(kind)
        self.flags.append(flags)
        for column, count in ((self.nlinks, nlink), (self.xattr_counts_recorded, xattr_count)):
            column.append(count if 0 <= count < COUNT_CLAMP else COUNT_CLAMP)
        self.sizes.append(size if size >= 0 else 0)
        if layout not in self._layout_index:
            self._layout_index[layout] = len(self.layout_list)
            self.layout_list.append(layout)
        self.layouts.append(self._layout_index[layout])
        self.parents.append(parent if parent >= 0 else 0)
        self.next_cookies.append(next_cookie if next_cookie >= 0 else 0)
        for column in (self.names, self.subdirs, self.xattr_counts):
            column.append(0)
        for column in (self.link_parents, self.link_cookies, self.digests):
            column.append(0)
        return row

    def find(self, ino: int) -> int:
        """Return the row of an inode, or -1."""
        end = len(self.inos) - len(self._late)
        row = bisect_left(self.inos, ino, 0, end)
        if row < end and self.inos[row] == ino:
            return row
        return self._late.get(ino, -1)

    def layout(self, row: int) -> Layout | None:
        return self.layout_list[self.layouts[row]]

    def __len__(self) -> int:
        return len(self.inos)
