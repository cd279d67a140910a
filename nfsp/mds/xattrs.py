"""Extended attributes: user., trusted., security., POSIX ACLs, and the layout.

Pure (see view.py).  Stored under x records; the inode counts them.  Two are more than bytes:
  * `system.posix_acl_access` and `..._default` are validated, kept in step with the mode, and
    not stored when they say nothing (acl.py);
  * `user.nfsp.layout` is virtual, a view of `Inode.layout` as text (placement.py).  On a directory
    it is the rule for what is made in it: set, replaced, removed, and listed only if it is set;
    reading it always works, and gives the rule in force.  On a file it can be set while the file
    is empty and nobody else writes it; it is not listed, so that copies do not carry it along.

Not here: who may read or set what (the kernel's).
"""

from __future__ import annotations

import stat

from common.errors import Code, KaError
from nfsp import keys, wire
from nfsp.mds import acl
from nfsp.mds.placement import format_layout, parse_layout
from nfsp.mds.queues import pending_trim
from nfsp.mds.view import DONE, Context, Outcome, View, Writes, inode_at, layout_of, require
from nfsp.model import XATTR_NAME_SIZE_MAX, XATTR_VALUE_SIZE_MAX, Inode, Layout

__all__ = ["LAYOUT", "XATTR_CREATE", "XATTR_REPLACE", "get_xattr", "list_xattr"]
__all__ += ["remove_xattr", "set_xattr"]

LAYOUT = b"user.nfsp.layout"
XATTR_CREATE = 1
XATTR_REPLACE = 2

LIST_SIZE_MAX = 65536
"""Linux's XATTR_LIST_MAX: names beyond it could not be listed."""

_PREFIXES = (b"user.", b"trusted.", b"security.")
_ACLS = (acl.ACCESS, acl.DEFAULT)


# ---------------------------------------------------------------- reading


def get_xattr(view: View, m: wire.GetXattr, context: Context) -> wire.XattrReply:
    """Return an attribute's value, or ENODATA."""
    inode = inode_at(view, m.ino)
    if m.name == LAYOUT and (inode.is_dir or inode.is_file):
        return wire.XattrReply(format_layout(inode.layout or context.placement.default))
    value = _stored(view, inode, m.name) if len(m.name) <= XATTR_NAME_SIZE_MAX else None
    if value is None:
        _check_name(m.name)
        raise KaError(Code.ENODATA)
    return wire.XattrReply(value)


def list_xattr(view: View, m: wire.ListXattr) -> wire.NamesReply:
    """Return the names of all attributes that are set."""
    inode = inode_at(view, m.ino)
    names = _names(view, inode)
    if inode.is_dir and inode.layout is not None:
        names.append(LAYOUT)
    return wire.NamesReply(names)


def _stored(view: View, inode: Inode, name: bytes) -> bytes | None:
    return view.get(keys.xattr(inode.ino, name)) if inode.xattr_count else None


def _names(view: View, inode: Inode) -> list[bytes]:
    if not inode.xattr_count:
        return []
    start = keys.xattr(inode.ino, b"")
    records = view.scan(start, keys.prefix_end(start), inode.xattr_count)
    return [key[len(start) :] for key, _ in records]


def _check_name(name: bytes) -> None:
    require(0 < len(name) <= XATTR_NAME_SIZE_MAX, Code.ERANGE, "attribute name too long or empty")
    require(b"\0" not in name, Code.EINVAL, "a name holds no NUL")
    if name not in _ACLS:
        require(name.startswith(_PREFIXES), Code.EOPNOTSUPP, "no such kind of attribute")
        require(name not in _PREFIXES, Code.EINVAL, "a prefix alone is no attribute name")


# ---------------------------------------------------------------- changing


def set_xattr(view: View, m: wire.SetXattr, context: Context) -> Outcome:
    """Create or replace an attribute."""
    _check_name(m.name)
    require(m.flags in (0, XATTR_CREATE, XATTR_REPLACE), Code.EINVAL, "unknown flags")
    require(len(m.value) <= XATTR_VALUE_SIZE_MAX, Code.E2BIG, "attribute value too large")
    inode = inode_at(view, m.ino)
    if m.name.startswith(b"user."):
        plain = inode.is_dir or inode.is_file
        require(plain, Code.EPERM, "only files and directories have user attributes")
    if m.name == LAYOUT:
        return _set_layout(view, m, inode, context)
    exists = _stored(view, inode, m.name) is not None
    _check_flags(m.flags, exists)
    if m.name in _ACLS:
        return _set_acl(m, inode, exists, context)
    if not exists:
        taken = sum(len(name) + 1 for name in _names(view, inode)) + len(m.name) + 1
        require(taken <= LIST_SIZE_MAX, Code.ENOSPC, "too many attributes")
    return _store(inode, m.name, m.value, exists, context)


def remove_xattr(view: View, m: wire.RemoveXattr, context: Context) -> Outcome:
    """Remove an attribute; ENODATA when it is not set (an ACL: nothing to do)."""
    _check_name(m.name)
    inode = inode_at(view, m.ino)
    if m.name == LAYOUT:
        require(inode.layout is not None, Code.ENODATA, "no layout is set here")
        require(inode.is_dir, Code.EPERM, "a file keeps its layout")
        return _put(inode._replace(layout=None), {}, context)
    if _stored(view, inode, m.name) is None:
        require(m.name in _ACLS, Code.ENODATA, "no such attribute")
        return Outcome(DONE, {})
    return _store(inode, m.name, None, True, context)


def _check_flags(flags: int, exists: bool) -> None:
    require(not (exists and flags == XATTR_CREATE), Code.EEXIST, "attribute exists already")
    require(exists or flags != XATTR_REPLACE, Code.ENODATA, "no such attribute")


def _store(
    inode: Inode, name: bytes, value: bytes | None, exists: bool, context: Context
) -> Outcome:
    """Write an attribute (None: remove it) and keep count."""
    count = inode.xattr_count + int(value is not None) - int(exists)
    writes: Writes = {}
    if value is not None or exists:
        writes[keys.xattr(inode.ino, name)] = value
    return _put(inode._replace(xattr_count=count), writes, context)


def _put(inode: Inode, writes: Writes, context: Context) -> Outcome:
    after = inode._replace(ctime_ns=context.now_ns, change=inode.change + 1)
    writes[keys.inode(inode.ino)] = after.encode()
    return Outcome(DONE, writes)


def _set_acl(m: wire.SetXattr, inode: Inode, exists: bool, context: Context) -> Outcome:
    entries = acl.decode(m.value)
    value: bytes | None = acl.encode(entries) if entries else None
    if m.name == acl.DEFAULT:
        require(inode.is_dir or not entries, Code.EACCES, "only directories have a default ACL")
    else:
        require(not stat.S_ISLNK(inode.mode), Code.EOPNOTSUPP, "a symbolic link has no ACL")
        if entries:
            bits, minimal = acl.mode_of(entries)
            inode = inode._replace(mode=inode.mode & ~0o777 | bits)
            if minimal:
                value = None
    return _store(inode, m.name, value, exists, context)


def _set_layout(view: View, m: wire.SetXattr, inode: Inode, context: Context) -> Outcome:
    placement = context.placement
    _check_flags(m.flags, inode.layout is not None)
    rule = parse_layout(m.value, placement.default)
    placement.check(rule)
    if inode.is_file:
        _check_untouched(view, inode, context)
        rule = _file_layout(rule, inode.ino, context)
    return _put(inode._replace(layout=rule), {}, context)


def _file_layout(rule: Layout, ino: int, context: Context) -> Layout:
    """Return the layout a file gets: chains named one for one are taken as they are."""
    if rule.chains and rule.stripe_width in (0, len(rule.chains)):
        return rule._replace(stripe_width=len(rule.chains))
    return context.placement.choose(rule, ino)


def _check_untouched(view: View, inode: Inode, context: Context) -> None:
    """Raise EBUSY when chunks of the file may exist: they would be lost under a new layout."""
    layout_of(inode)
    unclean = (
        inode.size > 0 or context.is_written(inode.ino) or pending_trim(view, inode.ino) is not None
    )
    require(not unclean, Code.EBUSY, "the layout of a file is set before anything is written")
