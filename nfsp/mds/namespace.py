"""The name space: finding, listing, linking and removing entries.

Pure: each function takes a view and a request, and returns a reply (reading) or an `Outcome`
(changing); see view.py for the rules of the game.  Errors are what Linux answers.

Lookup answers with the stored inode record, never decoded on the way: it is what a file system
is asked most.  A listing follows the entries' cookies, which never change and never come again.

Not here: making inodes (create.py), rename (rename.py), attributes (attributes.py, xattrs.py),
opening (sessions.py).
"""

from __future__ import annotations

import stat

from common import codec
from common.errors import Code, KaError
from nfsp import keys, wire
from nfsp.mds.view import (
    Context,
    Entry,
    Outcome,
    View,
    Writes,
    changed,
    check_name,
    directory,
    enter,
    entry,
    forget,
    inode_at,
    require,
    target_of,
)
from nfsp.model import COOKIE_MAX, LINK_COUNT_MAX, NAME_SIZE_MAX, Inode

__all__ = [
    "READDIR_COUNT_MAX",
    "get_attr",
    "is_empty",
    "link",
    "lookup",
    "read_dir",
    "rmdir",
    "unlink",
]

READDIR_COUNT_MAX = 1000
"""Entries in one answer; with usual names and layouts some 100 KB."""

_DT_DIR = stat.S_IFDIR >> 12


# ---------------------------------------------------------------- reading


def lookup(view: View, m: wire.Lookup) -> wire.InodeReply:
    """Find an entry; the stored record is the answer, never decoded here."""
    parent, name = m.parent, m.name
    if parent > 0 and len(name) <= NAME_SIZE_MAX:  # a longer name would be no key
        record = view.get(keys.dentry(parent, name))
        if record is not None:
            found = view.get(keys.inode(codec.decode(record)[0]))
            if found is None:
                raise KaError(Code.ENGINE_DAMAGED, "an entry names no inode", parent=parent)
            return wire.InodeReply(found)
    inode = inode_at(view, parent)
    if name == b".":
        return wire.InodeReply(inode.encode())
    require(inode.is_dir, Code.ENOTDIR, "not a directory")
    if name == b"..":
        return get_attr(view, wire.GetAttr(inode.parent))
    check_name(name, Code.ENOENT)
    raise KaError(Code.ENOENT)


def get_attr(view: View, m: wire.GetAttr) -> wire.InodeReply:
    record = view.get(keys.inode(m.ino)) if m.ino > 0 else None
    if record is None:
        raise KaError(Code.ESTALE, "no such inode", ino=m.ino)
    return wire.InodeReply(record)


def read_dir(view: View, m: wire.ReadDir) -> wire.ReadDirReply:
    """List entries in the order of their cookies."""
    require(0 <= m.cookie <= COOKIE_MAX, Code.EINVAL, "no such cookie")
    require(inode_at(view, m.ino).is_dir, Code.ENOTDIR, "not a directory")
    count = max(1, min(m.count_max, READDIR_COUNT_MAX))
    start = keys.cookie(m.ino, m.cookie + 1)
    found = view.scan(start, keys.cookie(m.ino, COOKIE_MAX + 1), count + 1)
    entries = []
    for key, twin in found[:count]:
        name, ino, _ = codec.decode(twin)
        record = view.get(keys.inode(ino))
        if record is None:
            raise KaError(Code.ENGINE_DAMAGED, "an entry names no inode", parent=m.ino, ino=ino)
        entries.append([name, int.from_bytes(key[9:]), record])
    return wire.ReadDirReply(entries, len(found) <= count)


# ---------------------------------------------------------------- linking and removing


def link(view: View, m: wire.Link, context: Context) -> Outcome:
    """Give an inode one more name."""
    inode = inode_at(view, m.ino)
    parent = directory(view, m.parent)
    check_name(m.name, Code.EEXIST)
    require(entry(view, m.parent, m.name) is None, Code.EEXIST, "exists already")
    require(not inode.is_dir, Code.EPERM, "a directory has one name")
    require(inode.nlink > 0, Code.ENOENT, "the file is removed")
    require(inode.nlink < LINK_COUNT_MAX, Code.EMLINK, "too many links")
    now_ns = context.now_ns
    after = inode._replace(nlink=inode.nlink + 1, ctime_ns=now_ns, change=inode.change + 1)
    reply = wire.EntryReply(after.encode(), changed(parent, now_ns, cookies=1).encode())
    writes: Writes = {keys.inode(m.ino): reply.inode, keys.inode(parent.ino): reply.directory}
    enter(parent, m.name, m.ino, inode.mode >> 12, writes)
    return Outcome(reply, writes)


def unlink(view: View, m: wire.Unlink, context: Context) -> Outcome:
    """Remove the name of anything but a directory."""
    parent, found = _existing(view, m.parent, m.name, dot=Code.EISDIR, dotdot=Code.EISDIR)
    require(found.kind != _DT_DIR, Code.EISDIR, "is a directory")
    return _remove(view, parent, m.name, found, context)


def rmdir(view: View, m: wire.Rmdir, context: Context) -> Outcome:
    """Remove an empty directory."""
    parent, found = _existing(view, m.parent, m.name, dot=Code.EINVAL, dotdot=Code.ENOTEMPTY)
    require(found.kind == _DT_DIR, Code.ENOTDIR, "not a directory")
    require(is_empty(view, found.ino), Code.ENOTEMPTY, "directory not empty")
    return _remove(view, parent, m.name, found, context)


def is_empty(view: View, ino: int) -> bool:
    """Say whether a directory has no entries."""
    return not view.scan(keys.cookie(ino, 0), keys.cookie(ino, COOKIE_MAX + 1), 1)


def _existing(
    view: View, parent_ino: int, name: bytes, *, dot: Code, dotdot: Code
) -> tuple[Inode, Entry]:
    parent = directory(view, parent_ino)
    check_name(name, dot if name == b"." else dotdot)
    found = entry(view, parent_ino, name)
    if found is None:
        raise KaError(Code.ENOENT)
    return parent, found


def _remove(view: View, parent: Inode, name: bytes, found: Entry, context: Context) -> Outcome:
    after = changed(parent, context.now_ns, subdirectories=-int(found.kind == _DT_DIR)).encode()
    writes: Writes = {
        keys.dentry(parent.ino, name): None,
        keys.cookie(parent.ino, found.cookie): None,
        keys.inode(parent.ino): after,
    }
    effects = forget(view, target_of(view, found), context, writes)
    return Outcome(wire.EntryReply(b"", after), writes, effects)
