"""Rename: moving an entry, replacing another, exchanging two.

Pure (see view.py).  The rules are rename(2)'s, in Linux's order:
  * two names of one inode: nothing happens, even with `RENAME_EXCHANGE`;
  * a directory never becomes its own descendant: the parents are walked up to the root;
  * a file replaces a file, a directory an empty directory; what is replaced loses that name;
  * a moved directory's `..` leads to its new parent, and both parents' nlink follow;
  * a moved entry gets a new cookie, also within one directory.  Exchanged entries keep theirs: a
    listing under way sees each of the two names exactly once;
  * ctime of the moved inodes changes, mtime and ctime of the directories.

Not here: sticky bits and other permissions (the kernel's).
"""

from __future__ import annotations

import stat

from common.errors import Code, KaError
from nfsp import keys, wire
from nfsp.mds.namespace import is_empty
from nfsp.mds.view import (
    DONE,
    Context,
    Effect,
    Entry,
    Outcome,
    View,
    Writes,
    changed,
    check_name,
    directory,
    entry,
    forget,
    require,
    settle,
    target_of,
)
from nfsp.model import LINK_COUNT_MAX, ROOT, Inode

__all__ = ["RENAME_EXCHANGE", "RENAME_NOREPLACE", "rename"]

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2

DEPTH_MAX = 1 << 20
"""A walk to the root that takes longer goes round in a damaged tree."""

_DT_DIR = stat.S_IFDIR >> 12


def rename(view: View, m: wire.Rename, context: Context) -> Outcome:
    """Carry out a rename or an exchange."""
    require(m.flags in (0, RENAME_NOREPLACE, RENAME_EXCHANGE), Code.EINVAL, "rename flags")
    old_parent = directory(view, m.parent)
    new_parent = old_parent if m.new_parent == m.parent else directory(view, m.new_parent)
    check_name(m.name, Code.EBUSY)
    check_name(m.new_name, Code.EBUSY)
    source = entry(view, m.parent, m.name)
    if source is None:
        raise KaError(Code.ENOENT)
    target = entry(view, m.new_parent, m.new_name)
    require(m.flags != RENAME_NOREPLACE or target is None, Code.EEXIST, "exists already")
    if source.kind == _DT_DIR and m.parent != m.new_parent:
        _refuse_ancestor(view, source.ino, new_parent)
    if m.flags == RENAME_EXCHANGE:
        if target is None:
            raise KaError(Code.ENOENT)
        if target.kind == _DT_DIR and m.parent != m.new_parent:
            _refuse_ancestor(view, target.ino, old_parent)
        if source.ino == target.ino:
            return Outcome(DONE, {})
        return _exchange(view, m, (old_parent, source), (new_parent, target), context)
    if target is not None:
        if source.ino == target.ino:
            return Outcome(DONE, {})
        _check_replaceable(view, source, target)
    return _move(view, m, (old_parent, source), (new_parent, target), context)


def _refuse_ancestor(view: View, moved: int, into: Inode) -> None:
    """Raise EINVAL when directory *into* is, or lies below, directory *moved*."""
    node = into
    for _ in range(DEPTH_MAX):
        require(node.ino != moved, Code.EINVAL, "a directory cannot move into itself")
        if node.ino == ROOT:
            return
        record = view.get(keys.inode(node.parent))
        if record is None:
            break
        node = Inode.decode(record)
    raise KaError(
        Code.ENGINE_DAMAGED, "a directory's parents do not lead to the root", ino=into.ino
    )


def _check_replaceable(view: View, source: Entry, target: Entry) -> None:
    if source.kind != _DT_DIR:
        require(target.kind != _DT_DIR, Code.EISDIR, "is a directory")
        return
    require(target.kind == _DT_DIR, Code.ENOTDIR, "not a directory")
    require(is_empty(view, target.ino), Code.ENOTEMPTY, "directory not empty")


def _move(
    view: View,
    m: wire.Rename,
    origin: tuple[Inode, Entry],
    goal: tuple[Inode, Entry | None],
    context: Context,
) -> Outcome:
    (old_parent, source), (new_parent, target) = origin, goal
    now_ns = context.now_ns
    writes: Writes = {
        keys.dentry(old_parent.ino, m.name): None,
        keys.cookie(old_parent.ino, source.cookie): None,
    }
    gained = lost = int(source.kind == _DT_DIR)
    effects: tuple[Effect, ...] = ()
    if target is not None:
        writes[keys.cookie(new_parent.ino, target.cookie)] = None
        gained -= int(target.kind == _DT_DIR)
        effects = forget(view, target_of(view, target), context, writes)
    cookie = new_parent.next_cookie
    if old_parent.ino == new_parent.ino:
        parents = [changed(old_parent, now_ns, subdirectories=gained - lost, cookies=1)]
    else:
        require(new_parent.nlink + gained <= LINK_COUNT_MAX, Code.EMLINK, "too many links")
        parents = [
            changed(old_parent, now_ns, subdirectories=-lost),
            changed(new_parent, now_ns, subdirectories=gained, cookies=1),
        ]
    for parent in parents:
        writes[keys.inode(parent.ino)] = parent.encode()
    _place(view, source, new_parent, m.new_name, cookie, now_ns, writes)
    return Outcome(DONE, writes, effects)


def _exchange(
    view: View,
    m: wire.Rename,
    one: tuple[Inode, Entry],
    other: tuple[Inode, Entry],
    context: Context,
) -> Outcome:
    (one_parent, source), (other_parent, target) = one, other
    now_ns = context.now_ns
    writes: Writes = {}
    if one_parent.ino == other_parent.ino:
        parents = [changed(one_parent, now_ns)]
    else:
        gained = int(target.kind == _DT_DIR) - int(source.kind == _DT_DIR)
        for parent, more in ((one_parent, gained), (other_parent, -gained)):
            require(parent.nlink + more <= LINK_COUNT_MAX, Code.EMLINK, "too many links")
        parents = [
            changed(one_parent, now_ns, subdirectories=gained),
            changed(other_parent, now_ns, subdirectories=-gained),
        ]
    for parent in parents:
        writes[keys.inode(parent.ino)] = parent.encode()
    _place(view, source, other_parent, m.new_name, target.cookie, now_ns, writes)
    _place(view, target, one_parent, m.name, source.cookie, now_ns, writes)
    return Outcome(DONE, writes)


def _place(
    view: View,
    moved: Entry,
    parent: Inode,
    name: bytes,
    cookie: int,
    now_ns: int,
    writes: Writes,
) -> None:
    """Write a moved entry in its new place, and the inode it names."""
    inode = target_of(view, moved)
    after = inode._replace(
        ctime_ns=now_ns,
        change=inode.change + 1,
        parent=parent.ino if inode.is_dir else 0,
    )
    writes[keys.inode(moved.ino)] = after.encode()
    settle(parent.ino, name, moved._replace(cookie=cookie), writes)
