"""Sessions' records: exactly-once answers, open files, and what a dead session leaves behind.

Pure (see view.py).  The server keeps the table of who has what open; the store keeps only what must
survive it: a writer record while a session has a file open for writing (chunks may reach beyond
the recorded size), an orphan record for an inode without a name that somebody has open.

Exactly once: each slot's record holds the last sequence and its answer, written in the batch of
the mutation itself.  The same (slot, sequence) again gets the answer again.  A mutation that was
refused changed nothing and leaves no record: repeated, it is simply decided again.

When a session ends without closing its files, what it wrote behind the recorded size must go: if
such bytes stayed, a later growth of the file would show them.  While other sessions write the
file, nobody can tell their unreported chunks from the dead one's: then a writer record of session 0
stays, and the last writer that leaves has the tail trimmed.

Order for the server: take the session (or the closed inode) out of the table, then call
`expire_session` until it is done (or `close_inode`); then, if the table is complete, both sweeps.

Not here: session ids, time-outs, the table.
"""

from __future__ import annotations

from typing import NamedTuple

from common import codec
from common.errors import Code, KaError
from nfsp import keys, wire
from nfsp.mds.queues import pending_trim, trim, wait_trim
from nfsp.mds.view import (
    DONE,
    NOTHING,
    SESSION_LOST,
    Context,
    Effect,
    Opened,
    Outcome,
    View,
    Writes,
    erase,
    inode_at,
    require,
)
from nfsp.model import FILE_SIZE_MAX, Inode

__all__ = ["Step", "answered", "close_inode", "expire_session", "open_inode", "replay"]
__all__ += ["reopen", "sweep_orphans", "sweep_tails", "writer_record", "writers"]

SLOT_MAX = (1 << 16) - 1


# ---------------------------------------------------------------- exactly once


def replay(view: View, session: int, slot: int, sequence: int) -> bytes | None:
    """Return the stored answer of a mutation seen before, None for a new one.

    Numbers may skip: what was refused, or never arrived, leaves no record.  Raises PROTOCOL for a
    number older than the last one answered.
    """
    require(0 <= slot <= SLOT_MAX, Code.PROTOCOL, "no such slot")
    record = view.get(keys.slot(session, slot))
    if record is None:
        return None
    last, answer = codec.decode(record)
    if sequence == last:
        assert type(answer) is bytes
        return answer
    require(sequence > last, Code.PROTOCOL, f"slot {slot} is at {last}, not at {sequence}")
    return None


def answered(session: int, slot: int, sequence: int, answer: bytes) -> Writes:
    """Return the record of a mutation's encoded reply, to go into the mutation's own batch."""
    return {keys.slot(session, slot): codec.encode((sequence, answer))}


# ---------------------------------------------------------------- opening and closing


def open_inode(view: View, m: wire.Open, context: Context) -> Outcome:
    """Open an inode; for writing, on record."""
    record = view.get(keys.inode(m.ino)) if m.ino > 0 else None
    if record is None:
        raise KaError(Code.ESTALE, "no such inode", ino=m.ino)
    opened = Opened(m.ino, m.writable)
    if not m.writable:
        return Outcome(wire.InodeReply(record), {}, (opened,))
    inode = Inode.decode(record)
    require(not inode.is_dir, Code.EISDIR, "is a directory")
    require(inode.is_file, Code.EINVAL, "not a regular file")
    writes = writer_record(view, context.session, m.ino)
    return Outcome(wire.InodeReply(record), writes, (*wait_trim(view, m.ino), opened))


def writer_record(view: View, session: int, ino: int) -> Writes:
    """Return what puts it on record that a session has an inode open for writing."""
    writer = keys.writer(session, ino)
    return {} if view.get(writer) is not None else {writer: NOTHING}


def reopen(
    view: View, session: int, opens: list[tuple[int, int, bool]]
) -> tuple[Writes, list[int]]:
    """Return what puts a client's opens on record, and the inodes it must not use any more.

    There is nothing to do for a session that has lived on.  One that follows a session that ran
    out may find a file gone, or its tail about to be trimmed: new bytes could be cut with it.
    """
    writes: Writes = {}
    stale = []
    for ino, _count, writable in opens:
        if ino <= 0 or view.get(keys.inode(ino)) is None:
            stale.append(ino)
        elif writable and (record := writer_record(view, session, ino)):
            if pending_trim(view, ino) is not None:
                stale.append(ino)
            else:
                writes.update(record)
    return writes, stale


def close_inode(view: View, m: wire.Close, context: Context) -> Outcome:
    """Forget that a session had an inode open, which the table has already forgotten.

    Closing what is not open does nothing, so that a repeated Close is harmless.
    """
    ino = m.ino
    require(ino > 0, Code.ESTALE, "no such inode")
    writes: Writes = {}
    writer = keys.writer(context.session, ino)
    wrote_it = view.get(writer) is not None
    if wrote_it:
        writes[writer] = None
    if not context.is_open(ino) and view.get(keys.orphan(ino)) is not None:
        return Outcome(DONE, writes, erase(view, inode_at(view, ino), writes))
    if wrote_it and view.get(keys.writer(SESSION_LOST, ino)) is not None:
        return Outcome(DONE, writes, _trim_tail(view, ino, context, writes))
    return Outcome(DONE, writes)


def writers(view: View, after: tuple[int, int], limit: int) -> list[tuple[int, int]]:
    """Return (session, ino) of writer records behind *after*, in order: the table at start-up."""
    start = keys.after(keys.writer(*after))
    records = view.scan(start, keys.prefix_end(b"w"), limit)
    return [(int.from_bytes(key[1:9]), int.from_bytes(key[9:])) for key, _ in records]


# ---------------------------------------------------------------- the end of a session


class Step(NamedTuple):
    """One bounded batch of a longer job."""

    writes: Writes
    follow_up: tuple[Effect, ...]
    done: bool
    after_ino: int = 0
    """Where a sweep goes on."""


def expire_session(view: View, session: int, context: Context, limit: int) -> Step:
    """End a session that is out of the table; call it again, after its batch, until it is done.

    *limit* bounds the files and the slots of one batch.
    """
    writes: Writes = {}
    effects: tuple[Effect, ...] = ()
    start, end = keys.writer(session, 0), keys.prefix_end(keys.writer(session, 0)[:9])
    opened = view.scan(start, end, limit)
    for key, _ in opened:
        writes[key] = None
        effects += _trim_tail(view, int.from_bytes(key[9:]), context, writes)
    if len(opened) == limit:
        return Step(writes, effects, False)
    start, end = keys.slot(session, 0), keys.after(keys.slot(session, SLOT_MAX))
    slots = view.scan(start, end, limit)
    writes.update((key, None) for key, _ in slots)
    if len(slots) == limit:
        return Step(writes, effects, False)
    writes[keys.session(session)] = None
    return Step(writes, effects, True)


def _trim_tail(view: View, ino: int, context: Context, writes: Writes) -> tuple[Effect, ...]:
    """Trim what lies behind a file's recorded size, now or when its last writer leaves."""
    lost = keys.writer(SESSION_LOST, ino)
    if context.is_written(ino):
        writes[lost] = NOTHING
        return ()
    if view.get(lost) is not None:
        writes[lost] = None
    record = view.get(keys.inode(ino))
    if record is None:
        return ()
    inode = Inode.decode(record)
    return (trim(view, inode, inode.size, FILE_SIZE_MAX, writes),)


def sweep_orphans(view: View, after_ino: int, context: Context, limit: int) -> Step:
    """Erase orphans that nobody has open any more; go on from `after_ino` until it is done."""
    start = keys.after(keys.orphan(after_ino))
    orphans = view.scan(start, keys.prefix_end(b"o"), limit)
    writes: Writes = {}
    effects: tuple[Effect, ...] = ()
    for key, _ in orphans:
        after_ino = int.from_bytes(key[1:])
        if context.is_open(after_ino):
            continue
        record = view.get(keys.inode(after_ino))
        if record is None:
            writes[key] = None
        else:
            effects += erase(view, Inode.decode(record), writes)
    return Step(writes, effects, len(orphans) < limit, after_ino)


def sweep_tails(view: View, after_ino: int, context: Context, limit: int) -> Step:
    """Trim tails of ended sessions that wait for a last writer that has left long ago.

    That happens when a session ends while the table is incomplete.  Used like `sweep_orphans`.
    """
    start = keys.after(keys.writer(SESSION_LOST, after_ino))
    tails = view.scan(start, keys.writer(SESSION_LOST + 1, 0), limit)
    writes: Writes = {}
    effects: tuple[Effect, ...] = ()
    for key, _ in tails:
        after_ino = int.from_bytes(key[9:])
        if not context.is_written(after_ino):
            effects += _trim_tail(view, after_ino, context, writes)
    return Step(writes, effects, len(tails) < limit, after_ino)
