"""Directory entries: names against inodes, name records against readdir records.

Pure.  Two streaming passes (readdir records, then name records) count names and compare the two
forms of every directory by a sum of hashes; nothing is kept for an entry that is right.  Only
directories in which something is odd are then read whole (nfsp/fsck/directory.py).

An entry counts as a name of its inode when it stands after the repairs proposed.
"""

from __future__ import annotations

import struct
from functools import partial
from typing import NamedTuple

from common import codec
from common.errors import KaError
from nfsp.fsck import steps, table
from nfsp.fsck.survey import Survey
from nfsp.fsck.table import DIR
from nfsp.model import FIRST_COOKIE, NAME_SIZE_MAX, ROOT, shard_of

__all__ = [
    "Entry",
    "count_name",
    "counted_row",
    "decode_entry",
    "decode_twin",
    "name_is_valid",
    "passes",
]

HASH_MASK = (1 << 64) - 1

_unpack_q = struct.Struct(">Q").unpack_from
_unpack_qq = struct.Struct(">QQ").unpack_from


class Entry(NamedTuple):
    name: bytes
    ino: int
    kind: int
    cookie: int


def decode_entry(key: bytes, value: bytes) -> Entry | None:
    """Return the entry in a name record, or None."""
    try:
        ino, kind, cookie = codec.decode(value)
    except (KaError, TypeError, ValueError):
        return None
    if not type(ino) is type(kind) is type(cookie) is int or cookie < 0:
        return None
    return Entry(key[9:], ino, kind, cookie)


def decode_twin(key: bytes, value: bytes) -> Entry | None:
    """Return the entry in a readdir record, or None."""
    try:
        name, ino, kind = codec.decode(value)
    except (KaError, TypeError, ValueError):
        return None
    if type(name) is not bytes or not type(ino) is type(kind) is int:
        return None
    return Entry(name, ino, kind, _unpack_q(key, 9)[0])


def name_is_valid(name: bytes) -> bool:
    return (
        0 < len(name) <= NAME_SIZE_MAX
        and b"/" not in name
        and b"\0" not in name
        and name not in (b".", b"..")
    )


def passes(survey: Survey) -> steps.Steps[None]:
    """Read all directory entries; note which directories need a closer look."""
    yield from steps.each(b"c", b"d", partial(_twin, survey))
    yield from steps.each(b"d", b"e", partial(_entry, survey))
    rows = survey.table
    survey.flagged.update(rows.inos[row] for row, sum in enumerate(rows.digests) if sum)
    _add_rebuilt(survey)


# ---------------------------------------------------------------- streaming


def _twin(survey: Survey, key: bytes, value: bytes) -> None:
    if len(key) != 17:
        survey.malformed(key, value)
        return
    parent, cookie = _unpack_qq(key, 1)
    rows = survey.table
    row = rows.find(parent)
    entry = decode_twin(key, value)
    if row < 0 or rows.kinds[row] != DIR or entry is None:
        survey.flagged.add(parent)
        return
    if not FIRST_COOKIE <= cookie < rows.next_cookies[row]:
        survey.flagged.add(parent)
    rows.digests[row] = (rows.digests[row] - hash(entry)) & HASH_MASK


def _entry(survey: Survey, key: bytes, value: bytes) -> None:
    if len(key) < 9:
        survey.malformed(key, value)
        return
    survey.count("entries")
    (parent,) = _unpack_q(key, 1)
    rows = survey.table
    parent_row = rows.find(parent)
    if parent_row < 0 or rows.kinds[parent_row] == table.UNREADABLE:
        survey.homeless.add(parent)
    entry = decode_entry(key, value)
    if entry is None:
        survey.flagged.add(parent)
        return
    row = counted_row(survey, parent_row, entry)
    if row < 0:
        survey.flagged.add(parent)
        target = rows.find(entry.ino)
        if entry.kind == DIR and target >= 0 and rows.kinds[target] == table.UNREADABLE:
            survey.homeless.add(entry.ino)
    else:
        count_name(survey, row, parent_row, entry.cookie)
    if parent_row >= 0 and rows.kinds[parent_row] == DIR:
        if not FIRST_COOKIE <= entry.cookie < rows.next_cookies[parent_row]:
            survey.flagged.add(parent)
        rows.digests[parent_row] = (rows.digests[parent_row] + hash(entry)) & HASH_MASK


def counted_row(survey: Survey, parent_row: int, entry: Entry) -> int:
    """Return the row of the inode that an entry rightly names, or -1.

    Such entries are counted while streaming.  Rows that will be rebuilt are added after that, so
    they do not make an entry plain: asked again later, the answer is the same.
    """
    rows = survey.table
    if parent_row < 0 or rows.kinds[parent_row] != DIR or rows.flags[parent_row] & table.REBUILD:
        return -1
    row = rows.find(entry.ino)
    if row < 0 or rows.kinds[row] != entry.kind or rows.flags[row] & table.REBUILD:
        return -1
    return row if entry.kind and name_is_valid(entry.name) else -1


def count_name(survey: Survey, row: int, parent_row: int, cookie: int) -> None:
    """Count a name of an inode; of a directory's names, choose the one that is to stay."""
    rows = survey.table
    parent = rows.inos[parent_row]
    if rows.flags[parent_row] & table.ORPHAN:
        survey.revived.add(parent)
    ino = rows.inos[row]
    if rows.kinds[row] != DIR:
        rows.names[row] += 1
        if rows.names[row] == 1:
            rows.link_parents[row], rows.link_cookies[row] = parent, cookie
        return
    if ino == ROOT:
        survey.extra_names.append((ino, parent, cookie))
        return
    link_parent = rows.link_parents[row]
    if not rows.names[row]:
        rows.names[row] = 1
    elif rows.parents[row] == parent != link_parent:
        survey.extra_names.append((ino, link_parent, rows.link_cookies[row]))
        rows.subdirs[rows.find(link_parent)] -= 1
    else:
        survey.extra_names.append((ino, parent, cookie))
        return
    rows.subdirs[parent_row] += 1
    rows.link_parents[row], rows.link_cookies[row] = parent, cookie


def _add_rebuilt(survey: Survey) -> None:
    """Give directories whose inode is missing or unreadable a row; tree.py reports them."""
    rows = survey.table
    root = rows.find(ROOT)
    if root < 0 or rows.kinds[root] != DIR:
        survey.homeless.add(ROOT)
    for ino in sorted(survey.homeless):
        row = rows.find(ino)
        if row < 0:
            if ino > survey.ino_max and ino != ROOT:
                continue  # such a number was never given out: a stray record, not a directory
            if not ino or shard_of(ino) != survey.shard:
                continue
            row = rows.add(ino, DIR)
        elif rows.kinds[row] == DIR:
            continue
        rows.kinds[row] = DIR
        rows.flags[row] = rows.flags[row] & table.ORPHAN | table.REBUILD
        survey.flagged.add(ino)
