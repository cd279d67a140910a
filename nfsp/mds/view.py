"""What all name space operations share: the view they read, the outcome they return.

Pure.  An operation reads records through a `View` and returns an `Outcome`: the reply, the batch
of records to write, and what else the server has to do.  It writes nothing itself, so it can
neither be half done nor done twice.

Invariants of the records (fsck checks them, tests/support/checker.py too)
  * every dentry has its cookie twin, with a cookie below its directory's `next_cookie`;
  * an inode exists while it has names, or an orphan record while somebody has it open;
  * nlink counts names; a directory's is 2 + its subdirectories; `parent` is where `..` leads;
  * `xattr_count` counts the inode's x records;
  * NEXT_INO is above every inode number ever given out.

Obligations of the server
  1. calls an operation and applies its batch without doing anything between the two;
  2. applies the batch, then does the follow-ups, then replies;
  3. keeps the table of who has what open, which answers `is_open` and `is_written`.  After a
     restart, until all sessions have come back or run out, both answer True (unknown is yes).

Not here: permissions (the kernel checks them: default_permissions), sockets, clocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from common import codec
from common.errors import Code, KaError
from common.messages import Message
from nfsp import keys
from nfsp.mds.placement import Placement
from nfsp.model import FILE_SIZE_MAX, NAME_SIZE_MAX, Inode, Layout, Remains
from nfsp.wire import Done

__all__ = [
    "DONE",
    "NOTHING",
    "SESSION_LOST",
    "Context",
    "Effect",
    "Entry",
    "Opened",
    "Outcome",
    "PurgeReady",
    "TrimReady",
    "View",
    "Writes",
    "changed",
    "check_name",
    "directory",
    "enter",
    "entry",
    "erase",
    "forget",
    "inode_at",
    "integer",
    "layout_of",
    "require",
    "settle",
    "target_of",
]

Writes = dict[bytes, bytes | None]
"""An atomic batch; None deletes."""

DONE = Done()
NOTHING = codec.encode([])
"""The value of records whose key says it all."""

SESSION_LOST = 0
"""The session of a writer record that stands for sessions that have expired."""


class View(Protocol):
    """Reads that see every applied batch."""

    def get(self, key: bytes, /) -> bytes | None: ...

    def scan(self, start: bytes, end: bytes, limit: int, /) -> list[tuple[bytes, bytes]]:
        """Return at most *limit* records with start <= key < end, in key order."""
        ...


class Context(NamedTuple):
    """Who asks, when, and what the server knows beyond the records."""

    session: int
    now_ns: int
    is_open: Callable[[int], bool]
    """Does any session have the inode open?"""
    is_written: Callable[[int], bool]
    """Does any session have it open for writing?"""
    placement: Placement


class PurgeReady(NamedTuple):
    """A purge record was written: the chunks can be removed, any time later."""

    ino: int


class TrimReady(NamedTuple):
    """A trim record is pending: carry it out *before* the reply, then `queues.trimmed`."""

    ino: int
    remains: Remains
    end: int
    """No chunk holds bytes at or behind it: saves asking columns that have nothing."""


class Opened(NamedTuple):
    """The session now has the inode open: note it in the table."""

    ino: int
    writable: bool


Effect = PurgeReady | TrimReady | Opened


class Outcome(NamedTuple):
    """What an operation decided."""

    reply: Message
    writes: Writes
    follow_up: tuple[Effect, ...] = ()


class Entry(NamedTuple):
    """A dentry record."""

    ino: int
    kind: int
    cookie: int

    def encode(self) -> bytes:
        return codec.encode(self)


# ---------------------------------------------------------------- checking requests


def require(condition: bool, code: Code, message: str) -> None:
    """Raise KaError unless *condition* holds."""
    if not condition:
        raise KaError(code, message)


def check_name(name: bytes, dots: Code) -> None:
    """Raise what Linux answers for a name no entry can have; *dots* for `.` and `..`."""
    if not name:
        raise KaError(Code.ENOENT, "empty name")
    if len(name) > NAME_SIZE_MAX:
        raise KaError(Code.ENAMETOOLONG)
    if b"/" in name or b"\0" in name:
        raise KaError(Code.EINVAL, "a name holds neither `/` nor NUL")
    if name in (b".", b".."):
        raise KaError(dots, "`.` and `..` are not entries")


# ---------------------------------------------------------------- reading records


def integer(view: View, key: bytes) -> int:
    """Return a counter."""
    record = view.get(key)
    if record is None:
        raise KaError(Code.NOT_FORMATTED)
    value = codec.decode(record)
    assert type(value) is int
    return value


def inode_at(view: View, ino: int) -> Inode:
    """Return an inode; ESTALE when there is none."""
    record = view.get(keys.inode(ino)) if ino > 0 else None
    if record is None:
        raise KaError(Code.ESTALE, "no such inode", ino=ino)
    return Inode.decode(record)


def directory(view: View, ino: int) -> Inode:
    """Return a directory that may get or lose entries; ESTALE, ENOTDIR, or ENOENT once removed."""
    inode = inode_at(view, ino)
    if not inode.is_dir:
        raise KaError(Code.ENOTDIR, ino=ino)
    if not inode.nlink:
        raise KaError(Code.ENOENT, "the directory is removed", ino=ino)
    return inode


def entry(view: View, parent: int, name: bytes) -> Entry | None:
    """Return the entry of that name."""
    record = view.get(keys.dentry(parent, name))
    return None if record is None else Entry(*codec.decode(record))


def target_of(view: View, found: Entry) -> Inode:
    """Return the inode an entry names; that there is none is damage."""
    record = view.get(keys.inode(found.ino))
    if record is None:
        raise KaError(Code.ENGINE_DAMAGED, "an entry names no inode", ino=found.ino)
    return Inode.decode(record)


# ---------------------------------------------------------------- writing records


def changed(parent: Inode, now_ns: int, subdirectories: int = 0, cookies: int = 0) -> Inode:
    """Return a directory after its entries changed: *subdirectories* more, *cookies* given out."""
    return parent._replace(
        nlink=parent.nlink + subdirectories,
        mtime_ns=now_ns,
        ctime_ns=now_ns,
        change=parent.change + 1,
        next_cookie=parent.next_cookie + cookies,
    )


def enter(parent: Inode, name: bytes, ino: int, kind: int, writes: Writes) -> None:
    """Write an entry and its twin, with the cookie that comes next."""
    settle(parent.ino, name, Entry(ino, kind, parent.next_cookie), writes)


def settle(parent: int, name: bytes, found: Entry, writes: Writes) -> None:
    """Write an entry and its twin."""
    writes[keys.dentry(parent, name)] = found.encode()
    writes[keys.cookie(parent, found.cookie)] = codec.encode((name, found.ino, found.kind))


def forget(view: View, inode: Inode, context: Context, writes: Writes) -> tuple[Effect, ...]:
    """Take one name (an empty directory: its only one) from an inode.

    The last name gone, the inode goes too, or waits as an orphan for its last close.
    """
    left = 0 if inode.is_dir else inode.nlink - 1
    gone = left == 0
    if gone and not context.is_open(inode.ino):
        return erase(view, inode, writes)
    after = inode._replace(nlink=left, ctime_ns=context.now_ns, change=inode.change + 1)
    writes[keys.inode(inode.ino)] = after.encode()
    if gone:
        writes[keys.orphan(inode.ino)] = NOTHING
    return ()


def erase(view: View, inode: Inode, writes: Writes) -> tuple[Effect, ...]:
    """Delete all records of an inode; a file that may have chunks enters the purge queue."""
    ino = inode.ino
    writes[keys.inode(ino)] = None
    if not inode.nlink:
        writes[keys.orphan(ino)] = None
    if inode.xattr_count:
        start = keys.xattr(ino, b"")
        for key, _ in view.scan(start, keys.prefix_end(start), inode.xattr_count):
            writes[key] = None
    if not inode.is_file:
        return ()
    size = inode.size
    for key in (keys.trim(ino), keys.writer(SESSION_LOST, ino)):
        if view.get(key) is not None or writes.get(key) is not None:
            writes[key] = None
            size = FILE_SIZE_MAX  # chunks may lie behind the recorded size
    if not size:
        return ()
    writes[keys.purge(ino)] = Remains(layout_of(inode), size).encode()
    return (PurgeReady(ino),)


def layout_of(inode: Inode) -> Layout:
    """Return a regular file's layout."""
    if inode.layout is None:
        raise KaError(Code.ENGINE_DAMAGED, "a file without a layout", ino=inode.ino)
    return inode.layout
