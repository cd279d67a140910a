"""Attributes: chmod, chown, utimens, truncate, and what a writer reports.

Pure (see view.py).  Every change raises `change` and sets ctime; a size given to SetAttr sets
mtime, too, even when it is the old one.  A report is dated by its mtime, so that writing alone
leaves mtime and ctime equal, unless that cannot be when it happened.  A smaller size puts the
bytes behind it on the trim queue (queues.py says how that is kept apart from later writes).

Setting the size a file has trims nothing: chunks behind it can only be those that other writers
have not reported yet.  A client reports its own (`Wrote`) before it truncates.

Not here: clearing set-user-id bits after a write or chown (the kernel sends the mode), atime on
reading (never changed but by SetAttr).
"""

from __future__ import annotations

from common.errors import Code
from nfsp import keys, wire
from nfsp.mds import acl
from nfsp.mds.queues import pending_trim, trim, wait_trim
from nfsp.mds.view import Context, Effect, Outcome, View, Writes, inode_at, require
from nfsp.model import FILE_SIZE_MAX, ID_MAX, TIME_NS_MAX, Inode, following

__all__ = ["set_attr", "wrote"]

_VALID = (
    wire.SET_MODE
    | wire.SET_UID
    | wire.SET_GID
    | wire.SET_SIZE
    | wire.SET_ATIME
    | wire.SET_MTIME
    | wire.SET_ATIME_NOW
    | wire.SET_MTIME_NOW
)


def set_attr(view: View, m: wire.SetAttr, context: Context) -> Outcome:
    """Change the attributes named in `valid`."""
    valid = m.valid
    require(valid & ~_VALID == 0, Code.EINVAL, "unknown attributes")
    inode = inode_at(view, m.ino)
    if not valid:
        return Outcome(wire.InodeReply(inode.encode()), {})
    _check_ranges(m)
    writes: Writes = {}
    effects: tuple[Effect, ...] = ()
    now_ns = context.now_ns
    mode, size, atime_ns, mtime_ns = inode.mode, inode.size, inode.atime_ns, inode.mtime_ns
    if valid & wire.SET_MODE:
        mode = mode & ~0o7777 | m.mode & 0o7777
        _chmod_acl(view, inode, mode, writes)
    if valid & wire.SET_SIZE:
        effects = _truncate(view, inode, m.size, writes)
        size, mtime_ns = m.size, following(inode.mtime_ns, now_ns)
    if valid & wire.SET_ATIME_NOW:
        atime_ns = now_ns
    elif valid & wire.SET_ATIME:
        atime_ns = m.atime_ns
    if valid & wire.SET_MTIME_NOW:
        mtime_ns = now_ns
    elif valid & wire.SET_MTIME:
        mtime_ns = m.mtime_ns
    after = inode._replace(
        mode=mode,
        uid=m.uid if valid & wire.SET_UID else inode.uid,
        gid=m.gid if valid & wire.SET_GID else inode.gid,
        size=size,
        atime_ns=atime_ns,
        mtime_ns=mtime_ns,
        ctime_ns=now_ns,
        change=inode.change + 1,
    )
    record = after.encode()
    writes[keys.inode(m.ino)] = record
    return Outcome(wire.InodeReply(record), writes, effects)


def _check_ranges(m: wire.SetAttr) -> None:
    valid = m.valid
    ids_fit = (not valid & wire.SET_UID or 0 <= m.uid <= ID_MAX) and (
        not valid & wire.SET_GID or 0 <= m.gid <= ID_MAX
    )
    require(ids_fit, Code.EINVAL, "an id is out of range")
    # msgpack integers are at least -2^63: only the upper end can be beyond 64 signed bits
    times_fit = (not valid & wire.SET_ATIME or m.atime_ns <= TIME_NS_MAX) and (
        not valid & wire.SET_MTIME or m.mtime_ns <= TIME_NS_MAX
    )
    require(times_fit, Code.EINVAL, "a time is out of range")


def _truncate(view: View, inode: Inode, size: int, writes: Writes) -> tuple[Effect, ...]:
    _check_file(inode)
    require(size >= 0, Code.EINVAL, "negative size")
    require(size <= FILE_SIZE_MAX, Code.EFBIG, "file too large")
    if size < inode.size:
        return (trim(view, inode, size, inode.size, writes),)
    return wait_trim(view, inode.ino)


def _check_file(inode: Inode) -> None:
    require(not inode.is_dir, Code.EISDIR, "is a directory")
    require(inode.is_file, Code.EINVAL, "not a regular file")


def _chmod_acl(view: View, inode: Inode, mode: int, writes: Writes) -> None:
    """Keep an access ACL in step with the mode."""
    key = keys.xattr(inode.ino, acl.ACCESS)
    value = view.get(key) if inode.xattr_count else None
    if value is not None:
        writes[key] = acl.encode(acl.chmod(acl.decode(value), mode))


def wrote(view: View, m: wire.Wrote, context: Context) -> Outcome:
    """Take a writer's report: data up to `size_min` are on the iods."""
    inode = inode_at(view, m.ino)
    _check_file(inode)
    require(0 <= m.size_min <= FILE_SIZE_MAX, Code.EFBIG, "file too large")
    require(m.mtime_ns <= TIME_NS_MAX, Code.EINVAL, "a time is out of range")
    pending = pending_trim(view, m.ino)
    raced = pending is not None and m.size_min > pending.size
    require(not raced, Code.EIO, "these bytes raced with a truncation of the file")
    now_ns = context.now_ns
    record = inode._replace(
        size=max(inode.size, m.size_min),
        mtime_ns=m.mtime_ns,
        ctime_ns=m.mtime_ns if inode.ctime_ns <= m.mtime_ns <= now_ns else now_ns,
        change=inode.change + 1,
    ).encode()
    return Outcome(wire.InodeReply(record), {keys.inode(m.ino): record})
