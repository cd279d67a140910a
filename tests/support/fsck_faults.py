"""Faults for the checker: each breaks one thing in a consistent cluster (`FAULTS`)."""

from __future__ import annotations

from collections.abc import Callable

from common import codec
from nfsp import keys
from nfsp.fsck.table import DIR, REG
from nfsp.model import ROOT, Layout, Remains
from tests.support.fsck_cluster import SESSION, Cluster
from tests.support.space import SUPERBLOCK

Break = Callable[[Cluster], None]
NOBODY = 99
"""A session that does not exist."""
LOST = 1000
"""An inode number that was given out (see `used_up`), whose file is gone."""


def put(cluster: Cluster, key: bytes, value: bytes | None) -> None:
    cluster.view.apply({key: value})


def used_up(cluster: Cluster) -> None:
    """Let inode numbers up to 2000 have been given out."""
    put(cluster, keys.NEXT_INO, codec.encode(2000))


def _dangling(c: Cluster) -> None:
    inode = c.space.create(c.sub, b"gone")
    put(c, keys.inode(inode.ino), None)


def _wrong_kind(c: Cluster) -> None:
    cookie = c.cookie(c.top, b"small")
    put(c, keys.dentry(c.top, b"small"), codec.encode((c.small, DIR, cookie)))
    put(c, keys.cookie(c.top, cookie), codec.encode((b"small", c.small, DIR)))


def _wrong_kind_in_name_only(c: Cluster) -> None:
    cookie = c.cookie(c.top, b"small")
    put(c, keys.dentry(c.top, b"small"), codec.encode((c.small, DIR, cookie)))


def _wrong_kind_in_listing_only(c: Cluster) -> None:
    cookie = c.cookie(c.top, b"small")
    put(c, keys.cookie(c.top, cookie), codec.encode((b"small", c.small, DIR)))


def no_twin(c: Cluster) -> None:
    put(c, keys.cookie(c.top, c.cookie(c.top, b"small")), None)


def _garbled_twin(c: Cluster) -> None:
    put(c, keys.cookie(c.top, c.cookie(c.top, b"small")), b"\xc1")


def _twin_of_other_name(c: Cluster) -> None:
    cookie = c.cookie(c.top, b"small")
    put(c, keys.cookie(c.top, cookie), codec.encode((b"large", c.small, REG)))


def lost_name(c: Cluster) -> None:
    put(c, keys.dentry(c.sub, b"data"), None)


def _lost_directory_name(c: Cluster) -> None:
    put(c, keys.dentry(c.top, b"sub"), None)


def _stale_twin(c: Cluster) -> None:
    c.set_inode(c.top, next_cookie=100)
    put(c, keys.cookie(c.top, 50), codec.encode((b"old", c.file, REG)))


def _garbled_stale_twin(c: Cluster) -> None:
    c.set_inode(c.top, next_cookie=100)
    put(c, keys.cookie(c.top, 50), b"\xc1")


def _garbled_name(c: Cluster) -> None:
    put(c, keys.dentry(c.sub, b"data"), b"\xc1")


def _garbled_both(c: Cluster) -> None:
    inode = c.space.create(c.sub, b"torn")
    cookie = c.cookie(c.sub, b"torn")
    put(c, keys.inode(inode.ino), None)
    put(c, keys.dentry(c.sub, b"torn"), b"torn")
    put(c, keys.cookie(c.sub, cookie), None)


def _same_cookie(c: Cluster) -> None:
    small, sparse = c.cookie(c.top, b"small"), c.cookie(c.top, b"sparse")
    put(c, keys.dentry(c.top, b"sparse"), codec.encode((c.sparse, REG, small)))
    put(c, keys.cookie(c.top, sparse), None)


def _cookie_too_low(c: Cluster) -> None:
    cookie = c.cookie(c.top, b"small")
    put(c, keys.dentry(c.top, b"small"), codec.encode((c.small, REG, 1)))
    put(c, keys.cookie(c.top, cookie), None)
    put(c, keys.cookie(c.top, 1), codec.encode((b"small", c.small, REG)))


def _next_cookie_too_low(c: Cluster) -> None:
    c.set_inode(c.top, next_cookie=4)


def _next_cookie_impossible(c: Cluster) -> None:
    c.set_inode(c.top, next_cookie=1 << 63)


def _bad_name(name: bytes) -> Break:
    def rename(c: Cluster) -> None:
        cookie = c.cookie(c.top, b"small")
        put(c, keys.dentry(c.top, b"small"), None)
        put(c, keys.dentry(c.top, name), codec.encode((c.small, REG, cookie)))
        put(c, keys.cookie(c.top, cookie), codec.encode((name, c.small, REG)))

    return rename


def _entry_nowhere(c: Cluster) -> None:
    put(c, keys.dentry(5_000_000, b"stray"), codec.encode((c.small, REG, 3)))
    put(c, keys.cookie(5_000_000, 3), codec.encode((b"stray", c.small, REG)))


def _entry_in_a_file(c: Cluster) -> None:
    put(c, keys.dentry(c.file, b"stray"), codec.encode((c.small, REG, 3)))
    put(c, keys.cookie(c.file, 3), codec.encode((b"stray", c.small, REG)))


def _second_name_of_directory(c: Cluster) -> None:
    cookie = c.inode(ROOT).next_cookie
    put(c, keys.dentry(ROOT, b"also"), codec.encode((c.deep, DIR, cookie)))
    put(c, keys.cookie(ROOT, cookie), codec.encode((b"also", c.deep, DIR)))
    c.set_inode(ROOT, next_cookie=cookie + 1)


def _name_of_the_root(c: Cluster) -> None:
    cookie = c.inode(c.deep).next_cookie
    put(c, keys.dentry(c.deep, b"root"), codec.encode((ROOT, DIR, cookie)))
    put(c, keys.cookie(c.deep, cookie), codec.encode((b"root", ROOT, DIR)))
    c.set_inode(c.deep, next_cookie=cookie + 1)


def unreachable_file(c: Cluster) -> None:
    cookie = c.cookie(c.sub, b"data")
    put(c, keys.dentry(c.sub, b"data"), None)
    put(c, keys.cookie(c.sub, cookie), None)


def unreachable_directory(c: Cluster) -> None:
    cookie = c.cookie(c.top, b"sub")
    put(c, keys.dentry(c.top, b"sub"), None)
    put(c, keys.cookie(c.top, cookie), None)
    c.set_inode(c.top, nlink=2)


def _loop(c: Cluster) -> None:
    """sub leaves top for its own subdirectory deep."""
    unreachable_directory(c)
    cookie = c.inode(c.deep).next_cookie
    put(c, keys.dentry(c.deep, b"sub"), codec.encode((c.sub, DIR, cookie)))
    put(c, keys.cookie(c.deep, cookie), codec.encode((b"sub", c.sub, DIR)))
    c.set_inode(c.deep, next_cookie=cookie + 1, nlink=3)
    c.set_inode(c.sub, parent=c.deep)


def _fields(which: str, **fields: object) -> Break:
    return lambda c: c.set_inode(getattr(c, which), **fields)


def _symlink_size(c: Cluster) -> None:
    c.set_inode(c.space.lookup(c.deep, b"link").ino, size=3)


def missing_directory_inode(c: Cluster) -> None:
    put(c, keys.inode(c.sub), None)


def _garbled_directory_inode(c: Cluster) -> None:
    put(c, keys.inode(c.top), b"\xc1")


def _garbled_empty_directory_inode(c: Cluster) -> None:
    empty = c.space.mkdir(c.top, b"empty")
    put(c, keys.inode(empty.ino), b"")


def _missing_root(c: Cluster) -> None:
    put(c, keys.inode(ROOT), None)


def _counter(key: bytes, value: bytes | None) -> Break:
    return lambda c: put(c, key, value)


def _orphan_without_inode(c: Cluster) -> None:
    used_up(c)
    put(c, keys.orphan(LOST), codec.encode([]))


def _orphan_with_name(c: Cluster) -> None:
    put(c, keys.orphan(c.small), codec.encode([]))


def _orphan_of_nobody(c: Cluster) -> None:
    c.space.open(c.file)
    c.space.unlink(c.sub, b"data")
    put(c, keys.session(SESSION), None)
    c.set_inode(c.file, xattr_count=0)
    put(c, keys.xattr(c.file, b"user.colour"), None)


def _orphan_with_nlink(c: Cluster) -> None:
    c.space.open(c.file)
    c.space.unlink(c.sub, b"data")
    c.set_inode(c.file, nlink=1)


def _purge_of_existing(c: Cluster) -> None:
    put(c, keys.purge(c.small), Remains(Layout(1 << 20, 1, 1, (2,)), 10).encode())


def _purge_unreadable(c: Cluster) -> None:
    used_up(c)
    put(c, keys.purge(LOST), b"?")


def _trim(ino: int | None, record: bytes) -> Break:
    def queue(c: Cluster) -> None:
        used_up(c)
        put(c, keys.trim(ino or c.file), record)

    return queue


_OTHER_LAYOUT = Remains(Layout(1 << 16, 1, 1, (1,)), 0).encode()


def _xattr_of_nothing(c: Cluster) -> None:
    used_up(c)
    put(c, keys.xattr(LOST, b"user.a"), b"")


def _large_xattr(c: Cluster) -> None:
    c.space.set_xattr(c.top, b"user.a", b"")
    put(c, keys.xattr(c.top, b"user.a"), bytes(65537))


def leftover_chunks(c: Cluster) -> None:
    used_up(c)
    c.iods[1].put(LOST, 0)


def _chunks_of_directory(c: Cluster) -> None:
    c.iods[1].put(c.top, 0)


def _chunks_of_no_column(c: Cluster) -> None:
    c.iods[1].put(c.file, 7)


def _misplaced_copy(c: Cluster) -> None:
    layout = c.inode(c.file).layout
    assert layout is not None
    other = next(number for number in c.iods if number != layout.chains[0])
    c.iods[other].put(c.file, 0)


def beyond(offset: int) -> Break:
    return lambda c: c.write(c.file, offset, 1)


FAULTS: list[tuple[str, Break]] = [
    ("entry.dangling", _dangling),
    ("entry.kind", _wrong_kind),
    ("entry.kind", _wrong_kind_in_name_only),
    ("entry.twin", _wrong_kind_in_listing_only),
    ("entry.twin", no_twin),
    ("entry.twin", _garbled_twin),
    ("entry.twin", _twin_of_other_name),
    ("entry.lost", lost_name),
    ("entry.lost", _lost_directory_name),
    ("entry.stale", _stale_twin),
    ("entry.stale", _garbled_stale_twin),
    ("entry.unreadable", _garbled_name),
    ("entry.unreadable", _garbled_both),
    ("entry.cookie", _same_cookie),
    ("entry.cookie", _cookie_too_low),
    ("entry.name", _bad_name(b"")),
    ("entry.name", _bad_name(b".")),
    ("entry.name", _bad_name(b"..")),
    ("entry.name", _bad_name(b"a/b")),
    ("entry.name", _bad_name(b"a\0b")),
    ("entry.name", _bad_name(b"n" * 256)),
    ("entry.parent", _entry_nowhere),
    ("entry.parent", _entry_in_a_file),
    ("entry.extra", _second_name_of_directory),
    ("entry.extra", _name_of_the_root),
    ("inode.cookies", _next_cookie_too_low),
    ("inode.cookies", _next_cookie_impossible),
    ("inode.unreachable", unreachable_file),
    ("inode.unreachable", unreachable_directory),
    ("inode.unreachable", _loop),
    ("inode.nlink", _fields("small", nlink=1)),
    ("inode.nlink", _fields("small", nlink=0)),
    ("inode.nlink", _fields("file", nlink=-5)),
    ("inode.nlink", _fields("top", nlink=7)),
    ("inode.parent", _fields("deep", parent=ROOT)),
    ("inode.parent", _fields("small", parent=ROOT)),
    ("inode.number", _fields("small", ino=ROOT)),
    ("inode.target", _fields("small", target=b"x")),
    ("inode.layout", _fields("top", layout=Layout(1 << 20, 9, 1, (1, 2)))),
    ("inode.xattrs", _fields("file", xattr_count=0)),
    ("inode.size", _symlink_size),
    ("inode.rebuild", missing_directory_inode),
    ("inode.rebuild", _garbled_directory_inode),
    ("inode.rebuild", _garbled_empty_directory_inode),
    ("inode.rebuild", _missing_root),
    ("counter.low", _counter(keys.NEXT_INO, None)),
    ("counter.low", _counter(keys.NEXT_INO, codec.encode(3))),
    ("counter.low", _counter(keys.NEXT_INO, codec.encode(1 << 62))),
    ("counter.low", _counter(keys.NEXT_SESSION, codec.encode(1))),
    ("slot.session", _counter(keys.slot(NOBODY, 1), b"")),
    ("writer.session", lambda c: put(c, keys.writer(NOBODY, c.file), b"\x90")),
    ("writer.inode", lambda c: put(c, keys.writer(SESSION, 1 << 40), b"\x90")),
    ("orphan.inode", _orphan_without_inode),
    ("orphan.named", _orphan_with_name),
    ("orphan.abandoned", _orphan_of_nobody),
    ("inode.nlink", _orphan_with_nlink),
    ("purge.inode", _purge_of_existing),
    ("purge.unreadable", _purge_unreadable),
    ("trim.inode", _trim(LOST, _OTHER_LAYOUT)),
    ("trim.unreadable", _trim(None, b"")),
    ("trim.layout", _trim(None, _OTHER_LAYOUT)),
    ("xattr.inode", _xattr_of_nothing),
    ("xattr.size", _large_xattr),
    ("record.malformed", _counter(b"i123", b"")),
    ("record.malformed", _counter(keys.orphan(0), b"")),
    ("chunks.leftover", leftover_chunks),
    ("chunks.leftover", _chunks_of_directory),
    ("chunks.column", _chunks_of_no_column),
    ("chunks.misplaced", _misplaced_copy),
    ("chunks.beyond", beyond(5_000_000 + (1 << 15))),
    ("chunks.beyond", beyond(6 << 20)),
    ("chunks.beyond", beyond(7 << 30)),
]
"""The check that must find it, and only it; and what to break.  All of these can be mended."""


UNMENDABLE: list[tuple[str, Break]] = [
    ("inode.unreadable", lambda c: put(c, keys.inode(c.file), b"\xc1")),
    ("inode.size", _fields("file", size=-1)),
    ("inode.layout", _fields("file", layout=None)),
    ("inode.layout", _fields("file", layout=Layout(1 << 20, 1, 1, (77,)))),
    ("inode.layout", _fields("file", layout=Layout(1000, 1, 1, (1,)))),
    ("superblock.unreadable", _counter(keys.SUPERBLOCK, b"")),
    ("superblock.shard", _counter(keys.SUPERBLOCK, SUPERBLOCK._replace(shard=3).encode())),
    ("map.unreadable", _counter(keys.CLUSTER_MAP, b"")),
    ("record.unknown", _counter(b"z", b"")),
    ("record.unknown", _counter(b"\xff", b"")),
]
