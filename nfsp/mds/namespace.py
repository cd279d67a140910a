"""The name space: finding, listing, making and removing entries.

Pure: each function takes a view and a request, and returns a reply (reading) or an `Outcome`
(changing); see view.py for the rules of the game.  Errors are what Linux answers.

Choices
  * A new entry's readdir cookie is its directory's `next_cookie`: monotonic, never given twice.
  * A directory's st_size is always DIRECTORY_SIZE: nothing to keep true.
  * New inode numbers come from the NEXT_INO counter in the same batch: never reused.
  * A set-group-id directory hands its group to what is made in it, and the bit to directories.
  * A directory's layout rule goes to its new subdirectories; files get the chains it chooses.
  * A directory with a default ACL hands it down, and then the umask does not count.  A kernel
    that has applied the umask to `mode` before it asks makes permissions tighter than POSIX says,
    never wider.

Not here: rename (rename.py), attributes (attributes.py, xattrs.py), opening (sessions.py).
"""

from __future__ import annotations

import stat

from common import codec
from common.errors import Code, KaError
from nfsp import keys, wire
from nfsp.mds import acl
from nfsp.mds.queues import wait_trim
from nfsp.mds.view import (
    DONE,
    NOTHING,
    Context,
    Entry,
    Opened,
    Outcome,
    View,
    Writes,
    changed,
    check_name,
    directory,
    entry,
    forget,
    inode_at,
    integer,
    require,
    target_of,
)
from nfsp.model import (
    FIRST_COOKIE,
    LINK_COUNT_MAX,
    NAME_SIZE_MAX,
    ROOT,
    SHARD_SHIFT,
    SYMLINK_SIZE_MAX,
    ClusterMap,
    Inode,
    Layout,
    Superblock,
)

__all__ = [
    "DIRECTORY_SIZE",
    "READDIR_COUNT_MAX",
    "create",
    "get_attr",
    "link",
    "lookup",
    "mkfs",
    "read_dir",
    "rmdir",
    "unlink",
]

DIRECTORY_SIZE = 4096
READDIR_COUNT_MAX = 1000
"""Entries in one answer; with usual names and layouts some 100 KB."""

ID_MAX = (1 << 32) - 1
RDEV_MAX = (1 << 32) - 1
COOKIE_MAX = (1 << 63) - 1

_KIND_MASK = 0o170000
_KINDS = frozenset(
    (
        stat.S_IFREG,
        stat.S_IFDIR,
        stat.S_IFLNK,
        stat.S_IFCHR,
        stat.S_IFBLK,
        stat.S_IFIFO,
        stat.S_IFSOCK,
    )
)
_DT_DIR = stat.S_IFDIR >> 12


def mkfs(
    superblock: Superblock,
    cluster_map: ClusterMap,
    *,
    now_ns: int,
    mode: int = 0o755,
    uid: int = 0,
    gid: int = 0,
) -> Writes:
    """Return the records of an empty file system."""
    root = Inode(
        ino=ROOT,
        mode=stat.S_IFDIR | (mode & 0o7777),
        uid=uid,
        gid=gid,
        rdev=0,
        nlink=2,
        size=DIRECTORY_SIZE,
        atime_ns=now_ns,
        mtime_ns=now_ns,
        ctime_ns=now_ns,
        btime_ns=now_ns,
        change=1,
        layout=None,
        parent=ROOT,
        next_cookie=FIRST_COOKIE,
        target=b"",
    )
    return {
        keys.SUPERBLOCK: superblock.encode(),
        keys.CLUSTER_MAP: cluster_map.encode(),
        keys.NEXT_INO: codec.encode((superblock.shard << SHARD_SHIFT) + ROOT + 1),
        keys.NEXT_SESSION: codec.encode(1),
        keys.inode(ROOT): root.encode(),
    }


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


# ---------------------------------------------------------------- making


def create(view: View, m: wire.Create, context: Context) -> Outcome:
    """Make an inode with its first name."""
    parent = directory(view, m.parent)
    check_name(m.name, Code.EEXIST)
    exists = entry(view, m.parent, m.name)
    if exists is not None:
        return _open_existing(view, m, exists, context)
    inode, xattrs = _new_inode(view, m, parent, context)
    ino, is_dir = inode.ino, inode.is_dir
    record = inode.encode()
    writes: Writes = {keys.NEXT_INO: codec.encode(ino + 1), keys.inode(ino): record}
    for name, value in xattrs:
        writes[keys.xattr(ino, name)] = value
    _enter(parent, m.name, ino, inode.mode >> 12, writes)
    after = changed(parent, context.now_ns, subdirectories=int(is_dir), cookies=1)
    writes[keys.inode(parent.ino)] = after.encode()
    if m.open and inode.is_file:
        writes[keys.writer(context.session, ino)] = NOTHING
        return Outcome(wire.InodeReply(record), writes, (Opened(ino, True),))
    return Outcome(wire.InodeReply(record), writes)


def _open_existing(view: View, m: wire.Create, exists: Entry, context: Context) -> Outcome:
    wanted = m.open and not m.exclusive and exists.kind == stat.S_IFREG >> 12
    require(wanted and m.mode & _KIND_MASK == stat.S_IFREG, Code.EEXIST, "exists already")
    record = target_of(view, exists).encode()
    writer = keys.writer(context.session, exists.ino)
    writes: Writes = {} if view.get(writer) is not None else {writer: NOTHING}
    opened = Opened(exists.ino, True)
    return Outcome(wire.InodeReply(record), writes, (*wait_trim(view, exists.ino), opened))


def _new_inode(
    view: View, m: wire.Create, parent: Inode, context: Context
) -> tuple[Inode, list[tuple[bytes, bytes]]]:
    """Return the inode of a create, and the ACLs it inherits."""
    kind, mode = m.mode & _KIND_MASK, m.mode & 0o7777
    require(kind in _KINDS and m.mode == kind | mode, Code.EINVAL, "no such file type")
    ids_fit = 0 <= m.uid <= ID_MAX and 0 <= m.gid <= ID_MAX and 0 <= m.rdev <= RDEV_MAX
    require(ids_fit, Code.EINVAL, "a number is out of range")
    is_dir = kind == stat.S_IFDIR
    gid = m.gid
    if parent.mode & stat.S_ISGID:
        gid = parent.gid
        if is_dir:
            mode |= stat.S_ISGID
    size, nlink, target = 0, 1, b""
    xattrs: list[tuple[bytes, bytes]] = []
    if kind == stat.S_IFLNK:
        target = m.target
        require(bool(target), Code.ENOENT, "empty target")
        require(len(target) <= SYMLINK_SIZE_MAX, Code.ENAMETOOLONG, "target too long")
        require(b"\0" not in target, Code.EINVAL, "a target holds no NUL")
        size, mode = len(target), 0o777
    else:
        mode, xattrs = _inherit_acl(view, parent, mode, m.umask, is_dir)
    ino = integer(view, keys.NEXT_INO)
    layout: Layout | None = None
    if is_dir:
        require(parent.nlink < LINK_COUNT_MAX, Code.EMLINK, "too many subdirectories")
        size, nlink, layout = DIRECTORY_SIZE, 2, parent.layout
    elif kind == stat.S_IFREG:
        layout = context.placement.choose(parent.layout or context.placement.default, ino)
    special = kind in (stat.S_IFCHR, stat.S_IFBLK)
    now_ns = context.now_ns
    inode = Inode(
        ino,
        kind | mode,
        m.uid,
        gid,
        m.rdev if special else 0,
        nlink,
        size,
        now_ns,
        now_ns,
        now_ns,
        now_ns,
        1,
        layout,
        parent.ino if is_dir else 0,
        FIRST_COOKIE if is_dir else 0,
        target,
        len(xattrs),
    )
    return inode, xattrs


def _inherit_acl(
    view: View, parent: Inode, mode: int, umask: int, is_dir: bool
) -> tuple[int, list[tuple[bytes, bytes]]]:
    """Return the permission bits of a new inode, and its ACLs as extended attributes."""
    default = view.get(keys.xattr(parent.ino, acl.DEFAULT)) if parent.xattr_count else None
    if default is None:
        return mode & ~(umask & 0o777), []
    access, mode = acl.inherit(acl.decode(default), mode)
    xattrs = [(acl.ACCESS, acl.encode(access))] if access else []
    if is_dir:
        xattrs.append((acl.DEFAULT, default))
    return mode, xattrs


def _enter(parent: Inode, name: bytes, ino: int, kind: int, writes: Writes) -> None:
    """Write an entry and its twin, with the cookie that comes next."""
    cookie = parent.next_cookie
    writes[keys.dentry(parent.ino, name)] = codec.encode((ino, kind, cookie))
    writes[keys.cookie(parent.ino, cookie)] = codec.encode((name, ino, kind))


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
    record = after.encode()
    writes: Writes = {
        keys.inode(m.ino): record,
        keys.inode(parent.ino): changed(parent, now_ns, cookies=1).encode(),
    }
    _enter(parent, m.name, m.ino, inode.mode >> 12, writes)
    return Outcome(wire.InodeReply(record), writes)


# ---------------------------------------------------------------- removing


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
    after = changed(parent, context.now_ns, subdirectories=-int(found.kind == _DT_DIR))
    writes: Writes = {
        keys.dentry(parent.ino, name): None,
        keys.cookie(parent.ino, found.cookie): None,
        keys.inode(parent.ino): after.encode(),
    }
    effects = forget(view, target_of(view, found), context, writes)
    return Outcome(DONE, writes, effects)
