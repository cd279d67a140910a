"""Repairs of metadata: from a `RecordMend` to a conditional batch of records.

Pure.  A plan reads what it needs through an `Edit`, which notes everything read as expectation
and everything written as record: the batch is refused by the mds if anything that led to it has
changed meanwhile.  A plan that no longer applies returns False, and nothing is written.
"""

from __future__ import annotations

from common import codec
from nfsp import keys
from nfsp.fsck import entries, steps
from nfsp.fsck.findings import (
    DropEntry,
    LinkLost,
    MoveEntry,
    NewCookie,
    Rebuild,
    RecordMend,
    Release,
    SetEntry,
    SetFields,
    SetRecord,
)
from nfsp.fsck.survey import decode_counter, decode_inode, encode_counter
from nfsp.fsck.table import COOKIE_MAX, DIR, REG
from nfsp.model import FILE_SIZE_MAX, FIRST_COOKIE, ROOT, Inode, Remains

__all__ = ["LOST_AND_FOUND", "Edit", "order", "plan"]

LOST_AND_FOUND = b"lost+found"
INTEGER_MAX = (1 << 64) - 1
"""The largest number a record can hold."""


class Edit:
    """A batch in the making."""

    def __init__(self, now_ns: int) -> None:
        self.now_ns = now_ns
        self.expected: dict[bytes, bytes | None] = {}
        self.records: dict[bytes, bytes | None] = {}

    def get(self, key: bytes) -> steps.Steps[bytes | None]:
        """Return the value of a record, as this batch will leave it."""
        if key in self.records:
            return self.records[key]
        if key not in self.expected:
            self.expected[key] = yield from steps.get(key)
        return self.expected[key]

    def put(self, key: bytes, value: bytes | None) -> steps.Steps[None]:
        yield from self.get(key)  # whatever is overwritten has been looked at
        self.records[key] = value

    def inode(self, ino: int) -> steps.Steps[Inode | None]:
        """Return an inode; None also when it cannot be read."""
        value = yield from self.get(keys.inode(ino))
        return None if value is None else decode_inode(value)

    def put_inode(self, inode: Inode) -> steps.Steps[None]:
        change = min(inode.change + 1, INTEGER_MAX)  # it may be what is damaged
        changed = inode._replace(change=change, ctime_ns=self.now_ns)
        yield from self.put(keys.inode(inode.ino), changed.encode())

    def entry(self, parent: int, name: bytes) -> steps.Steps[entries.Entry | None]:
        key = keys.dentry(parent, name)
        value = yield from self.get(key)
        return None if value is None else entries.decode_entry(key, value)

    def put_entry(self, parent: int, entry: entries.Entry) -> steps.Steps[None]:
        """Write both records of an entry."""
        name, ino, kind, cookie = entry
        yield from self.put(keys.dentry(parent, name), codec.encode((ino, kind, cookie)))
        yield from self.put(keys.cookie(parent, cookie), codec.encode((name, ino, kind)))

    def drop_twin(self, parent: int, name: bytes, cookie: int) -> steps.Steps[None]:
        """Delete the readdir record of an entry, unless it is another entry's."""
        if not 0 <= cookie <= COOKIE_MAX:
            return
        key = keys.cookie(parent, cookie)
        value = yield from self.get(key)
        twin = None if value is None else entries.decode_twin(key, value)
        if twin and twin.name == name:
            yield from self.put(key, None)

    def add_entry(self, directory: Inode, name: bytes, inode: Inode) -> steps.Steps[Inode]:
        """Append an entry to a directory and return the directory as it is to be written."""
        cookie = max(directory.next_cookie, FIRST_COOKIE)
        while (yield from self.get(keys.cookie(directory.ino, cookie))) is not None:
            cookie += 1
        kind = inode.mode >> 12
        yield from self.put_entry(directory.ino, entries.Entry(name, inode.ino, kind, cookie))
        nlink = directory.nlink + (kind == DIR)
        return directory._replace(next_cookie=cookie + 1, nlink=nlink, mtime_ns=self.now_ns)


def order(mend: RecordMend) -> int:
    """Return the place of a repair: inodes first, and /lost+found when all counts are right."""
    return {Rebuild: 0, LinkLost: 2}.get(type(mend), 1)


def plan(mend: RecordMend, edit: Edit) -> steps.Steps[bool]:
    """Fill *edit*; return whether the repair still applies."""
    match mend:
        case SetRecord(key, seen, value):
            if (yield from edit.get(key)) != seen:
                return False
            yield from edit.put(key, value)
            return True
        case SetFields():
            return (yield from _set_fields(mend, edit))
        case SetEntry(parent, name, ino, kind, cookie):
            yield from edit.put_entry(parent, entries.Entry(name, ino, kind, cookie))
            return True
        case DropEntry(parent, name, cookie):
            return (yield from _drop_entry(edit, parent, name, cookie))
        case MoveEntry(parent, name, new_name):
            return (yield from _move_entry(edit, parent, name, new_name))
        case NewCookie(parent, name):
            return (yield from _new_cookie(edit, parent, name))
        case LinkLost():
            return (yield from _link_lost(mend, edit))
        case Release(ino):
            return (yield from _release(edit, ino))
        case Rebuild():
            yield from _rebuild(mend, edit)
            return True


def _set_fields(mend: SetFields, edit: Edit) -> steps.Steps[bool]:
    inode = yield from edit.inode(mend.ino)
    if inode is None:
        return False
    fields = dict(mend.fields)
    if "next_cookie" in fields and FIRST_COOKIE <= inode.next_cookie <= COOKIE_MAX + 1:
        fields["next_cookie"] = max(fields["next_cookie"], inode.next_cookie)
    changed = inode._replace(**fields)
    # The record's own number may be what is wrong: it goes where it was found.
    changed = changed._replace(ino=mend.ino)
    yield from edit.put_inode(changed)
    return True


def _drop_entry(edit: Edit, parent: int, name: bytes | None, cookie: int) -> steps.Steps[bool]:
    if name is None:
        key = keys.cookie(parent, cookie)
        value = yield from edit.get(key)
        twin = None if value is None else entries.decode_twin(key, value)
        if twin is None:
            return False
        name = twin.name
    entry = yield from edit.entry(parent, name)
    if entry is None or entry.cookie != cookie:
        return False
    yield from edit.drop_twin(parent, name, cookie)
    yield from edit.put(keys.dentry(parent, name), None)
    return True


def _move_entry(edit: Edit, parent: int, name: bytes, new_name: bytes) -> steps.Steps[bool]:
    entry = yield from edit.entry(parent, name)
    if entry is None or (yield from edit.get(keys.dentry(parent, new_name))) is not None:
        return False
    yield from edit.put(keys.dentry(parent, name), None)
    yield from edit.put_entry(parent, entry._replace(name=new_name))
    return True


def _new_cookie(edit: Edit, parent: int, name: bytes) -> steps.Steps[bool]:
    entry = yield from edit.entry(parent, name)
    directory = yield from edit.inode(parent)
    if entry is None or directory is None:
        return False
    yield from edit.drop_twin(parent, name, entry.cookie)
    cookie = max(directory.next_cookie, FIRST_COOKIE)
    while (yield from edit.get(keys.cookie(parent, cookie))) is not None:
        cookie += 1
    yield from edit.put_entry(parent, entry._replace(cookie=cookie))
    yield from edit.put_inode(directory._replace(next_cookie=cookie + 1))
    return True


def _link_lost(mend: LinkLost, edit: Edit) -> steps.Steps[bool]:
    inode = yield from edit.inode(mend.ino)
    lost = yield from _lost_and_found(edit)
    if inode is None or lost is None or mend.ino in (lost.ino, ROOT):
        return False
    if mend.parent:
        yield from _drop_entry(edit, mend.parent, None, mend.cookie)
        above = yield from edit.inode(mend.parent)
        if above is not None and inode.is_dir:
            yield from edit.put_inode(above._replace(nlink=above.nlink - 1))
            inode = (yield from edit.inode(mend.ino)) or inode  # a directory in itself
    name = b"#%d" % mend.ino
    if (yield from edit.get(keys.dentry(lost.ino, name))) is not None:
        name += b"-%d" % lost.next_cookie
    lost = yield from edit.add_entry(lost, name, inode)
    yield from edit.put_inode(lost)
    if inode.is_dir:
        yield from edit.put_inode(inode._replace(parent=lost.ino))
    else:
        yield from edit.put_inode(inode._replace(nlink=1))
    return True


def _lost_and_found(edit: Edit) -> steps.Steps[Inode | None]:
    """Return /lost+found, made if need be; None if it cannot be used."""
    root = yield from edit.inode(ROOT)
    counter = yield from edit.get(keys.NEXT_INO)
    if root is None or not root.is_dir:
        return None
    entry = yield from edit.entry(ROOT, LOST_AND_FOUND)
    if entry is not None:
        found = yield from edit.inode(entry.ino)
        return found if found is not None and found.is_dir else None
    ino = decode_counter(counter)
    if not ino or (yield from edit.get(keys.inode(ino))) is not None:
        return None
    directory = Inode.directory(ino, ROOT, 0o700, edit.now_ns)
    yield from edit.put(keys.NEXT_INO, encode_counter(ino + 1))
    yield from edit.put_inode(directory)
    root = yield from edit.add_entry(root, LOST_AND_FOUND, directory)
    yield from edit.put_inode(root)
    return directory


def _release(edit: Edit, ino: int) -> steps.Steps[bool]:
    """Delete an orphan as the mds does after the last close; its chunks go to the purge queue."""
    value = yield from edit.get(keys.inode(ino))
    if value is None:
        return False
    inode = decode_inode(value)
    if inode is None:
        return False
    if inode.mode >> 12 == REG and inode.layout is not None:
        # Chunks may lie behind the recorded size: nothing is known of who wrote last.
        remains = Remains(inode.layout, FILE_SIZE_MAX)
        yield from edit.put(keys.purge(ino), remains.encode())
    yield from edit.put(keys.trim(ino), None)
    yield from edit.put(keys.inode(ino), None)
    yield from edit.put(keys.orphan(ino), None)
    return True


def _rebuild(mend: Rebuild, edit: Edit) -> steps.Steps[None]:
    directory = Inode.directory(mend.ino, mend.parent, 0o700, edit.now_ns)
    yield from edit.put_inode(
        directory._replace(
            nlink=mend.nlink,
            next_cookie=max(mend.next_cookie, FIRST_COOKIE),
            xattr_count=mend.xattr_count,
        )
    )
