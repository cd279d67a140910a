"""The shape of the tree: who is reachable, link counts, parents, orphans, counters; and paths.

Pure.  Runs when all names are counted (nfsp/fsck/entries.py), so it speaks of what remains wrong
when the entries are mended: a file whose only name can be restored is not lost.
"""

from __future__ import annotations

from array import array
from dataclasses import replace

from nfsp import keys
from nfsp.fsck import directory, entries, records, steps
from nfsp.fsck.findings import (
    DropEntry,
    Finding,
    LinkLost,
    Rebuild,
    Release,
    SetFields,
    SetRecord,
    Severity,
    show,
)
from nfsp.fsck.survey import Survey, encode_counter
from nfsp.fsck.table import DIR, ORPHAN, REBUILD, UNREADABLE
from nfsp.model import ROOT, shard_of

__all__ = ["Paths", "check", "survey_metadata"]

DAMAGE = Severity.DAMAGE
LEFTOVER = Severity.LEFTOVER

INO_MARGIN = 1 << 20
"""Numbers skipped when the counter was lost: those of files deleted meanwhile are not known, and
an NFS client may still hold one."""

DEPTH_MAX = 10_000
"""Longest path that is spelled out."""


def survey_metadata() -> steps.Steps[Survey]:
    """Judge one view of the metadata: all passes, findings with their paths."""
    found = Survey()
    yield from records.passes(found)
    yield from entries.passes(found)
    yield from directory.passes(found)
    yield from check(found)
    paths = Paths(found)
    for index, finding in enumerate(found.findings):
        where = yield from paths.where(finding)
        found.findings[index] = replace(finding, where=where)
    return found


def check(found: Survey) -> steps.Steps[None]:
    """Judge every inode by the names counted."""
    _check_extra_names(found)
    moved = _find_unreachable(found)
    rows = found.table
    for row in range(len(rows)):
        flags = rows.flags[row]
        if not (flags & REBUILD or rows.kinds[row] == UNREADABLE):
            _check_xattr_count(found, row)
        if flags & ORPHAN and (yield from _check_orphan(found, row)):
            continue
        if rows.kinds[row] == UNREADABLE:
            what = "the inode record is unreadable"
            found.add(DAMAGE, "inode.unreadable", what, ino=rows.inos[row])
        elif flags & REBUILD:
            _add_rebuild(found, row)
        elif rows.kinds[row] == DIR:
            _check_directory(found, row, moved)
        else:
            _check_links(found, row)
    _check_counters(found)


def _check_extra_names(found: Survey) -> None:
    for ino, parent, cookie in found.extra_names:
        what = "a second name of a directory" if ino != ROOT else "a name of the root directory"
        mend = DropEntry(parent, None, cookie)
        found.add(DAMAGE, "entry.extra", what, ino=ino, repair="remove that name", mend=mend)


def _find_unreachable(found: Survey) -> set[int]:
    """Report the tops of what hangs in the air; return the inodes that are to move.

    Walks up from every directory, each row at most once.
    """
    rows = found.table
    seen = array("I", bytes(4 * len(rows)))
    """The walk that came by (from 1); 0: none."""
    moved: set[int] = set()
    for start in range(len(rows)):
        if rows.kinds[start] != DIR:
            continue
        row = start
        while row >= 0 and not seen[row]:
            seen[row] = start + 1
            ino = rows.inos[row]
            if ino == ROOT:
                break
            if not rows.names[row]:
                if not rows.flags[row] & ORPHAN:
                    _lose(found, row, "a directory without a name", moved)
                break
            row = rows.find(rows.link_parents[row])
        else:
            if row >= 0 and seen[row] == start + 1:
                _break_loop(found, row, moved)
    return moved


def _break_loop(found: Survey, row: int, moved: set[int]) -> None:
    rows = found.table
    loop = [row]
    while (above := rows.find(rows.link_parents[loop[-1]])) != row:
        loop.append(above)
    _lose(found, min(loop), f"{len(loop)} directories form a loop", moved)


def _lose(found: Survey, row: int, what: str, moved: set[int]) -> None:
    rows = found.table
    ino = rows.inos[row]
    moved.add(ino)
    mend = LinkLost(ino, rows.link_parents[row], rows.link_cookies[row])
    repair = f"link it into /lost+found as #{ino}"
    found.add(DAMAGE, "inode.unreachable", what, ino=ino, repair=repair, mend=mend)


def _check_orphan(found: Survey, row: int) -> steps.Steps[bool]:
    """Judge an inode that has an orphan record; return whether all is said about it."""
    rows = found.table
    ino = rows.inos[row]
    key = keys.orphan(ino)
    if rows.names[row] or ino in found.revived or ino == ROOT:
        value = yield from steps.get(key)
        what = "marked as unlinked, and in use: the last close would delete it"
        mend = SetRecord(key, value, None)
        repair = "remove the mark"
        found.add(DAMAGE, "orphan.named", what, ino=ino, repair=repair, mend=mend)
        return not rows.names[row] and ino != ROOT
    if not found.sessions:
        what = "unlinked, and no session is there that could have it open"
        repair = "finish its deletion"
        found.add(LEFTOVER, "orphan.abandoned", what, ino=ino, repair=repair, mend=Release(ino))
    elif rows.kinds[row] != UNREADABLE and rows.nlinks[row]:
        _set_nlink(found, row, 0)
    return True


def _add_rebuild(found: Survey, row: int) -> None:
    rows = found.table
    ino = rows.inos[row]
    parent = rows.link_parents[row] or ROOT
    nlink = 2 + rows.subdirs[row]
    mend = Rebuild(ino, parent, nlink, rows.next_cookies[row], rows.xattr_counts[row])
    found.add(
        DAMAGE,
        "inode.rebuild",
        "the inode of a directory is missing or unreadable",
        ino=ino,
        repair="write a new one (root's, mode 0700)",
        mend=mend,
    )


def _check_xattr_count(found: Survey, row: int) -> None:
    rows = found.table
    count = rows.xattr_counts[row]
    if rows.xattr_counts_recorded[row] != count:
        what = f"{rows.xattr_counts_recorded[row]} attributes recorded, {count} counted"
        ino = rows.inos[row]
        mend = SetFields(ino, (("xattr_count", count),))
        repair = f"set xattr_count to {count}"
        found.add(DAMAGE, "inode.xattrs", what, ino=ino, repair=repair, mend=mend)


def _check_directory(found: Survey, row: int, moved: set[int]) -> None:
    rows = found.table
    ino = rows.inos[row]
    nlink = 2 + rows.subdirs[row]
    if rows.nlinks[row] != nlink:
        _set_nlink(found, row, nlink)
    parent = ROOT if ino == ROOT else rows.link_parents[row]
    if ino not in moved and rows.parents[row] != parent:
        what = f"`..` leads to inode {rows.parents[row]}, the directory is in {parent}"
        mend = SetFields(ino, (("parent", parent),))
        repair = f"set parent to {parent}"
        found.add(DAMAGE, "inode.parent", what, ino=ino, repair=repair, mend=mend)


def _check_links(found: Survey, row: int) -> None:
    rows = found.table
    if not rows.names[row]:
        _lose(found, row, "an inode without a name", set())
    elif rows.nlinks[row] != rows.names[row]:
        _set_nlink(found, row, rows.names[row])


def _set_nlink(found: Survey, row: int, nlink: int) -> None:
    rows = found.table
    ino = rows.inos[row]
    what = f"link count {rows.nlinks[row]}, {nlink} counted"
    mend = SetFields(ino, (("nlink", nlink),))
    found.add(DAMAGE, "inode.nlink", what, ino=ino, repair=f"set nlink to {nlink}", mend=mend)


def _check_counters(found: Survey) -> None:
    value, next_ino = found.counters[keys.NEXT_INO]
    if next_ino <= found.ino_max or shard_of(next_ino) != found.shard:
        least = found.ino_max + 1 + INO_MARGIN
        _set_counter(found, "inode", keys.NEXT_INO, value, least)
    value, next_session = found.counters[keys.NEXT_SESSION]
    if next_session <= found.session_max and (value is not None or found.sessions):
        _set_counter(found, "session", keys.NEXT_SESSION, value, found.session_max + 1)


def _set_counter(found: Survey, what: str, key: bytes, seen: bytes | None, least: int) -> None:
    found.add(
        DAMAGE,
        "counter.low",
        f"the next {what} number is missing, or one that is in use",
        repair=f"set it to {least}",
        mend=SetRecord(key, seen, encode_counter(least)),
    )


class Paths:
    """Paths by inode number, read from the readdir records on the way up."""

    def __init__(self, found: Survey) -> None:
        self._table = found.table
        self._directories: dict[int, tuple[bytes, ...]] = {ROOT: ()}

    def where(self, finding: Finding) -> steps.Steps[str]:
        """Say where a finding is: a path if there is one."""
        if finding.name is not None:
            parent = yield from self.find(finding.parent)
            if parent is not None:
                return show((*parent, finding.name))
            return f"inode {finding.parent}, entry {show((finding.name,))[1:]}"
        if not finding.ino:
            return "metadata"
        path = yield from self.find(finding.ino)
        inode = f"inode {finding.ino}"
        return inode if path is None else f"{show(path)} ({inode})"

    def find(self, ino: int) -> steps.Steps[tuple[bytes, ...] | None]:
        """Return the names on the way from the root, or None if there is no way."""
        rows = self._table
        below: list[tuple[int, bytes]] = []
        at = ino
        while at not in self._directories:
            row = rows.find(at)
            if row < 0 or not rows.names[row] or len(below) >= DEPTH_MAX:
                return None
            parent, cookie = rows.link_parents[row], rows.link_cookies[row]
            key = keys.cookie(parent, cookie)
            value = yield from steps.get(key)
            twin = None if value is None else entries.decode_twin(key, value)
            below.append((at, twin.name if twin and twin.ino == at else b"#%d" % at))
            at = parent
        path = self._directories[at]
        for number, name in reversed(below):
            path = (*path, name)
            row = rows.find(number)
            if rows.kinds[row] == DIR:
                self._directories[number] = path
        return path
