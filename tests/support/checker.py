"""The invariants of the name space's records, checked one by one over a whole store."""

from __future__ import annotations

import stat
from collections import Counter

from common import codec
from nfsp import keys
from nfsp.model import FIRST_COOKIE, ROOT, Inode, Remains
from tests.support.memory_view import MemoryView


def check(view: MemoryView) -> None:
    """Assert that every record is consistent with the others."""
    by_kind: dict[bytes, dict[bytes, bytes]] = {}
    for key, value in view.records.items():
        by_kind.setdefault(key[:1], {})[key[1:]] = value
    inodes = {_int(key): Inode.decode(value) for key, value in by_kind.get(b"i", {}).items()}
    for ino, inode in inodes.items():
        assert inode.ino == ino
    names, subdirectories = _check_dentries(by_kind, inodes)
    orphans = {_int(key) for key in by_kind.get(b"o", {})}
    assert max(inodes) < codec.decode(view.records[keys.NEXT_INO])
    xattrs = Counter(_int(key[:8]) for key in by_kind.get(b"x", {}))
    assert xattrs == {i.ino: i.xattr_count for i in inodes.values() if i.xattr_count}
    for ino, inode in inodes.items():
        count = names[ino]
        assert (ino in orphans) == (inode.nlink == 0), inode
        if not inode.is_dir:
            assert inode.nlink == count, inode
            assert not subdirectories[ino]
            assert (inode.layout is not None) == inode.is_file
        elif ino in orphans:
            assert not count
            assert not subdirectories[ino]
        else:
            assert inode.nlink == 2 + subdirectories[ino], inode
            assert count == (0 if ino == ROOT else 1)
            _check_reaches_root(inode, inodes)
    assert orphans <= inodes.keys()
    for key, value in by_kind.get(b"p", {}).items():
        assert _int(key) not in inodes
        assert Remains.decode(value).size > 0
    for key, value in by_kind.get(b"t", {}).items():
        assert inodes[_int(key)].is_file
        Remains.decode(value)
    for key in by_kind.get(b"w", {}):
        assert inodes[_int(key[8:])].is_file


def _check_dentries(
    by_kind: dict[bytes, dict[bytes, bytes]], inodes: dict[int, Inode]
) -> tuple[Counter[int], Counter[int]]:
    """Return the number of names of each inode, and of subdirectories of each directory."""
    names: Counter[int] = Counter()
    subdirectories: Counter[int] = Counter()
    twins = dict(by_kind.get(b"c", {}))
    for key, value in by_kind.get(b"d", {}).items():
        parent, name = _int(key[:8]), key[8:]
        ino, kind, cookie = codec.decode(value)
        twin = twins.pop(parent.to_bytes(8) + cookie.to_bytes(8))
        assert codec.decode(twin) == [name, ino, kind]
        assert FIRST_COOKIE <= cookie < inodes[parent].next_cookie
        assert inodes[ino].mode >> 12 == kind
        names[ino] += 1
        if kind == stat.S_IFDIR >> 12:
            subdirectories[parent] += 1
            assert inodes[ino].parent == parent
        else:
            assert inodes[ino].parent == 0
    assert not twins
    return names, subdirectories


def _check_reaches_root(inode: Inode, inodes: dict[int, Inode]) -> None:
    seen = set()
    while inode.ino != ROOT:
        assert inode.ino not in seen, "a loop of directories"
        seen.add(inode.ino)
        inode = inodes[inode.parent]


def _int(data: bytes) -> int:
    return int.from_bytes(data)
