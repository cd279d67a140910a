"""Making inodes: the first one of a file system, and every other.

Pure (see view.py).

Choices
  * New inode numbers come from the NEXT_INO counter in the same batch: never reused.
  * A new entry's readdir cookie is its directory's `next_cookie`: monotonic, never given twice.
  * A directory's st_size is always DIRECTORY_SIZE: nothing to keep true.
  * A set-group-id directory hands its group to what is made in it, and the bit to directories.
  * A directory's layout rule goes to its new subdirectories; files get the chains it chooses.
  * A directory with a default ACL hands it down, and then the umask does not count.  A kernel
    that has applied the umask to `mode` before it asks makes permissions tighter than POSIX says,
    never wider.
  * The writer record of a file that is made open is part of the batch.
"""

from __future__ import annotations

import stat

from common import codec
from common.errors import Code
from nfsp import keys, wire
from nfsp.mds import acl
from nfsp.mds.queues import wait_trim
from nfsp.mds.sessions import writer_record
from nfsp.mds.view import (
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
    enter,
    entry,
    integer,
    require,
    target_of,
)
from nfsp.model import (
    DIRECTORY_SIZE,
    FIRST_COOKIE,
    ID_MAX,
    LINK_COUNT_MAX,
    ROOT,
    SHARD_SHIFT,
    SYMLINK_SIZE_MAX,
    ClusterMap,
    Inode,
    Layout,
    Superblock,
)

__all__ = ["create", "mkfs"]

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
    root = Inode.directory(ROOT, ROOT, mode, now_ns, uid=uid, gid=gid)
    return {
        keys.SUPERBLOCK: superblock.encode(),
        keys.CLUSTER_MAP: cluster_map.encode(),
        keys.NEXT_INO: codec.encode((superblock.shard << SHARD_SHIFT) + ROOT + 1),
        keys.NEXT_SESSION: codec.encode(1),
        keys.inode(ROOT): root.encode(),
    }


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
    enter(parent, m.name, ino, inode.mode >> 12, writes)
    after = changed(parent, context.now_ns, subdirectories=int(is_dir), cookies=1)
    writes[keys.inode(parent.ino)] = above = after.encode()
    reply = wire.EntryReply(record, above)
    if m.open and inode.is_file:
        writes[keys.writer(context.session, ino)] = NOTHING
        return Outcome(reply, writes, (Opened(ino, True),))
    return Outcome(reply, writes)


def _open_existing(view: View, m: wire.Create, exists: Entry, context: Context) -> Outcome:
    wanted = m.open and not m.exclusive and exists.kind == stat.S_IFREG >> 12
    require(wanted and m.mode & _KIND_MASK == stat.S_IFREG, Code.EEXIST, "exists already")
    record = target_of(view, exists).encode()
    writes = writer_record(view, context.session, exists.ino)
    opened = Opened(exists.ino, True)
    return Outcome(wire.EntryReply(record, b""), writes, (*wait_trim(view, exists.ino), opened))


def _new_inode(
    view: View, m: wire.Create, parent: Inode, context: Context
) -> tuple[Inode, list[tuple[bytes, bytes]]]:
    """Return the inode of a create, and the ACLs it inherits."""
    kind, mode = m.mode & _KIND_MASK, m.mode & 0o7777
    require(kind in _KINDS and m.mode == kind | mode, Code.EINVAL, "no such file type")
    ids_fit = 0 <= m.uid <= ID_MAX and 0 <= m.gid <= ID_MAX and 0 <= m.rdev <= ID_MAX
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
    now_ns = context.now_ns
    inode = Inode(
        ino=ino,
        mode=kind | mode,
        uid=m.uid,
        gid=gid,
        rdev=m.rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0,
        nlink=nlink,
        size=size,
        atime_ns=now_ns,
        mtime_ns=now_ns,
        ctime_ns=now_ns,
        btime_ns=now_ns,
        change=1,
        layout=layout,
        parent=parent.ino if is_dir else 0,
        next_cookie=FIRST_COOKIE if is_dir else 0,
        target=target,
        xattr_count=len(xattrs),
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
