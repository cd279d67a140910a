"""The walk over all records but directory entries: each one judged by itself and by the tables.

Pure.  `passes` reads in an order in which everything that a record is judged by has been read
before: cluster map, sessions, inodes, then what belongs to inodes.

Unknown records are reported and never touched: they may belong to a newer version.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial

from common.codec import Value
from common.errors import Code, KaError
from nfsp import keys
from nfsp.fsck import steps, table
from nfsp.fsck.findings import SetFields, Severity
from nfsp.fsck.steps import Scan
from nfsp.fsck.survey import Survey, decode_counter, decode_inode
from nfsp.fsck.table import DIR, REG
from nfsp.model import (
    FILE_SIZE_MAX,
    FIRST_COOKIE,
    ROOT,
    SHARD_SHIFT,
    STRIPE_WIDTH_MAX,
    SYMLINK_SIZE_MAX,
    XATTR_NAME_SIZE_MAX,
    XATTR_VALUE_SIZE_MAX,
    ClusterMap,
    Inode,
    Layout,
    Remains,
    Superblock,
    shard_of,
)

__all__ = ["passes"]

LEFTOVER = Severity.LEFTOVER
DAMAGE = Severity.DAMAGE

KEY_SIZE_MAX = 512
"""More than the longest key any engine takes."""

_unpack_q = struct.Struct(">Q").unpack_from
_unpack_qq = struct.Struct(">QQ").unpack_from


def passes(survey: Survey) -> steps.Steps[None]:
    """Read everything but directory entries."""
    yield from _care(survey)
    handlers: tuple[tuple[bytes, Callable[[Survey, bytes, bytes], None]], ...] = (
        (b"s", _session),
        (b"r", _slot),
        (b"i", _inode),
        (b"o", _orphan),
        (b"p", _purge),
        (b"t", _trim),
        (b"w", _writer),
        (b"x", _xattr),
    )
    for prefix, handler in handlers:
        yield from steps.each(prefix, keys.prefix_end(prefix), partial(handler, survey))
    start = b""
    for prefix in sorted([b"c", b"d", b"m", *(prefix for prefix, _ in handlers)]):
        yield from steps.each(start, prefix, partial(_unknown, survey))
        start = keys.prefix_end(prefix)
    yield from steps.each(start, b"\xff" * KEY_SIZE_MAX, partial(_unknown, survey))


def _unknown(survey: Survey, key: bytes, value: bytes) -> None:
    survey.add(DAMAGE, "record.unknown", f"record of an unknown kind, key {key[:40]!r}")


# ---------------------------------------------------------------- superblock, map, counters


def _care(survey: Survey) -> steps.Steps[None]:
    superblock = yield from steps.get(keys.SUPERBLOCK)
    cluster_map = yield from steps.get(keys.CLUSTER_MAP)
    for key in (keys.NEXT_INO, keys.NEXT_SESSION):
        value = yield from steps.get(key)
        survey.counters[key] = (value, decode_counter(value))
    if superblock is cluster_map is survey.counters[keys.NEXT_INO][0] is None:
        raise KaError(Code.NOT_FORMATTED)
    yield from _superblock(survey, superblock or b"")
    try:
        _map(survey, ClusterMap.decode(cluster_map or b""))
    except (KaError, TypeError, ValueError):
        survey.cluster_map = None
        survey.chains = {}
        survey.add(DAMAGE, "map.unreadable", "the cluster map is missing or unreadable")


def _superblock(survey: Survey, record: bytes) -> steps.Steps[None]:
    """Learn the shard, but do not believe in a wrong one: all inodes would look lost."""
    try:
        shard = Superblock.decode(record).shard
        start, end = keys.inode(shard << SHARD_SHIFT), keys.inode((shard + 1) << SHARD_SHIFT)
    except (KaError, TypeError, struct.error):
        survey.add(DAMAGE, "superblock.unreadable", "the superblock is missing or unreadable")
        return
    root = yield from steps.get(keys.inode(ROOT))
    if shard and (root is not None or not (yield Scan(start, end, 1))):
        what = f"the superblock says shard {shard}, the inodes say otherwise"
        survey.add(DAMAGE, "superblock.shard", what)
    else:
        survey.shard = shard


def _map(survey: Survey, cluster_map: ClusterMap) -> None:
    iods = [iod.iod for iod in cluster_map.iods]
    chains = {chain.chain: chain.iods for chain in cluster_map.chains}
    if not all(type(number) is int for number in (cluster_map.epoch, *iods, *chains)):
        raise ValueError("a number is not a number")
    wrong = []
    if len(set(iods)) < len(iods):
        wrong.append("two iods have the same number")
    if len(chains) < len(cluster_map.chains):
        wrong.append("two chains have the same number")
    for number, members in chains.items():
        if not members or not set(members) <= set(iods):
            wrong.append(f"chain {number} has no iods, or iods that do not exist")
    for line in wrong:
        survey.add(DAMAGE, "map.wrong", f"cluster map: {line}")
    survey.cluster_map = cluster_map
    survey.chains = chains


# ---------------------------------------------------------------- sessions


def _session(survey: Survey, key: bytes, value: bytes) -> None:
    if len(key) != 9:
        survey.malformed(key, value)
        return
    (session,) = _unpack_q(key, 1)
    survey.sessions.add(session)
    survey.session_max = max(survey.session_max, session)
    survey.count("sessions")


def _slot(survey: Survey, key: bytes, value: bytes) -> None:
    if len(key) != 11:
        survey.malformed(key, value)
    elif (session := _unpack_q(key, 1)[0]) not in survey.sessions:
        what = f"answer kept for session {session}, which does not exist"
        survey.drop(LEFTOVER, "slot.session", what, key, value)


def _writer(survey: Survey, key: bytes, value: bytes) -> None:
    if len(key) != 17:
        survey.malformed(key, value)
        return
    session, ino = _unpack_qq(key, 1)
    # Session 0 stands for expired ones; what they left is trimmed when the last writer leaves.
    if session not in survey.sessions and (session or not survey.sessions):
        what = f"open for writing by session {session}, which does not exist"
        survey.drop(LEFTOVER, "writer.session", what, key, value, ino)
    elif survey.table.find(ino) < 0:
        what = f"session {session} has inode {ino} open for writing, which does not exist"
        survey.drop(LEFTOVER, "writer.inode", what, key, value, ino)
    else:
        survey.writing.add(ino)


# ---------------------------------------------------------------- inodes


def _inode(survey: Survey, key: bytes, value: bytes) -> None:
    if len(key) != 9:
        survey.malformed(key, value)
        return
    (ino,) = _unpack_q(key, 1)
    if not ino or shard_of(ino) != survey.shard:
        survey.add(DAMAGE, "inode.number", f"inode {ino} is not of shard {survey.shard}", ino=ino)
        return
    survey.count("inodes")
    survey.ino_max = max(survey.ino_max, ino)
    inode = decode_inode(value)
    if inode is None:
        # Reported by tree.py: a directory can be rebuilt, and entries tell if it was one.
        survey.table.add(ino, table.UNREADABLE)
        return
    kind = inode.mode >> 12
    if inode.ino != ino:
        what = f"the record of inode {ino} says that it is {inode.ino}"
        _field(survey, ino, "inode.number", what, "ino", ino)
    flags = _check_file(survey, ino, inode) if kind == REG else 0
    if kind == DIR:
        if not FIRST_COOKIE <= inode.next_cookie <= table.COOKIE_MAX + 1:
            survey.flagged.add(ino)
        layout = inode.layout
        if layout is not None and not _rule_is_sound(survey, layout):
            what = "the layout that new files would inherit is impossible"
            _field(survey, ino, "inode.layout", what, "layout", None)
    elif inode.parent != 0:
        what = "not a directory, and has a parent"
        _field(survey, ino, "inode.parent", what, "parent", 0)
    _check_target(survey, ino, inode, kind)
    survey.table.add(
        ino,
        kind,
        flags=flags,
        nlink=inode.nlink,
        size=inode.size if kind == REG else 0,
        layout=inode.layout if kind == REG and not flags else None,
        parent=inode.parent,
        next_cookie=inode.next_cookie,
        xattr_count=inode.xattr_count,
    )


def _field(survey: Survey, ino: int, check: str, what: str, name: str, value: Value) -> None:
    repair = f"clear the {name}" if not value else f"set {name} to {value}"
    mend = SetFields(ino, ((name, value),))
    survey.add(DAMAGE, check, what, ino=ino, repair=repair, mend=mend)


def _rule_is_sound(survey: Survey, rule: Layout) -> bool:
    """A directory's layout is a rule: width 0 and no chains leave the choice open."""
    width = rule.stripe_width
    if type(width) is not int or not 0 <= width <= (len(rule.chains) or STRIPE_WIDTH_MAX):
        return False
    chains = rule.chains or tuple(survey.chains)[:1] or (0,)
    return survey.layout_is_sound(rule._replace(stripe_width=len(chains), chains=chains))


def _check_file(survey: Survey, ino: int, inode: Inode) -> int:
    """Judge size and layout.  A wrong one is not guessed: with it the data would be lost."""
    if not 0 <= inode.size <= FILE_SIZE_MAX:
        survey.add(DAMAGE, "inode.size", f"impossible size {inode.size}", ino=ino)
        return table.UNSURE
    if inode.layout is None or not survey.layout_is_sound(inode.layout):
        survey.add(DAMAGE, "inode.layout", "the layout is impossible or missing", ino=ino)
        return table.UNSURE
    return 0


def _check_target(survey: Survey, ino: int, inode: Inode, kind: int) -> None:
    target = inode.target
    if kind != table.LNK:
        if target:
            what = "not a symbolic link, and has a target"
            _field(survey, ino, "inode.target", what, "target", b"")
    elif not 0 < len(target) <= SYMLINK_SIZE_MAX or b"\0" in target:
        survey.add(DAMAGE, "inode.target", "symbolic link to an impossible target", ino=ino)
    elif inode.size != len(target):
        what = f"symbolic link of size {inode.size}, its target has {len(target)} bytes"
        _field(survey, ino, "inode.size", what, "size", len(target))


# ---------------------------------------------------------------- what belongs to inodes


def _number(survey: Survey, key: bytes, value: bytes) -> int:
    """Return the inode number that is the whole key behind its prefix, or 0 (reported)."""
    if len(key) != 9 or key[1:] == bytes(8):
        survey.malformed(key, value)
        return 0
    ino: int = _unpack_q(key, 1)[0]
    if shard_of(ino) == survey.shard:
        survey.ino_max = max(survey.ino_max, ino)
    return ino


def _orphan(survey: Survey, key: bytes, value: bytes) -> None:
    if ino := _number(survey, key, value):
        row = survey.table.find(ino)
        if row < 0:
            what = f"unlinked inode {ino} does not exist"
            survey.drop(LEFTOVER, "orphan.inode", what, key, value, ino)
        else:
            survey.table.flags[row] |= table.ORPHAN
            survey.count("orphans")


def _remains(value: bytes) -> Layout | None:
    """Return the layout in a purge or trim record, or None if the record is unreadable."""
    try:
        layout, size = Remains.decode(value)
    except (KaError, TypeError, ValueError):
        return None
    return layout if type(size) is int and 0 <= size <= FILE_SIZE_MAX else None


def _purge(survey: Survey, key: bytes, value: bytes) -> None:
    ino = _number(survey, key, value)
    if not ino:
        return
    layout = _remains(value)
    if survey.table.find(ino) >= 0:
        what = "the chunks of an existing inode wait for removal"
        survey.drop(DAMAGE, "purge.inode", what, key, value, ino)
    elif layout is None or not survey.layout_is_sound(layout):
        survey.drop(LEFTOVER, "purge.unreadable", "unreadable purge record", key, value, ino)
    else:
        survey.purging.add_largest(ino)
        survey.count("purging")


def _trim(survey: Survey, key: bytes, value: bytes) -> None:
    ino = _number(survey, key, value)
    if not ino:
        return
    layout = _remains(value)
    row = survey.table.find(ino)
    kind = REG if row < 0 else survey.table.kinds[row]
    if row < 0 or kind not in (REG, table.UNREADABLE):
        what = f"trim record of inode {ino}, which is no file"
        survey.drop(LEFTOVER, "trim.inode", what, key, value, ino)
    elif layout is None or not survey.layout_is_sound(layout):
        survey.drop(LEFTOVER, "trim.unreadable", "unreadable trim record", key, value, ino)
    elif survey.table.layout(row) not in (None, layout):
        what = "trim record with another layout than the file's: it would drop wrong data"
        survey.drop(DAMAGE, "trim.layout", what, key, value, ino)
    else:
        survey.trimming.add(ino)
        survey.count("trimming")


def _xattr(survey: Survey, key: bytes, value: bytes) -> None:
    if len(key) < 10:
        survey.malformed(key, value)
        return
    (ino,) = _unpack_q(key, 1)
    survey.count("xattrs")
    row = survey.table.find(ino)
    if row < 0:
        what = f"attribute {key[9:]!r} of inode {ino}, which does not exist"
        survey.drop(LEFTOVER, "xattr.inode", what, key, value, ino)
        return
    survey.table.xattr_counts[row] += 1
    if len(key) - 9 > XATTR_NAME_SIZE_MAX or len(value) > XATTR_VALUE_SIZE_MAX:
        what = f"attribute {key[9:]!r} is too large"
        survey.drop(DAMAGE, "xattr.size", what, key, value, ino)
