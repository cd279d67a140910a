"""The purge and trim queues: chunks that are to go, on record before anybody removes them.

Pure.  *Purge*: a deleted file's chunks; nobody can reach them, so it can be done at any time, and
again after a crash.  *Trim*: chunks behind a file's end.

A trim is destructive while the file lives, so it is kept apart from later writes:
  * truncation writes the record with the new size, and is answered when the trim is done;
  * opening for writing and changing the size wait for a pending trim (`TrimReady`);
  * a second truncation keeps the smaller cut: old bytes above either of them never come back;
  * `Wrote` beyond the cut of a pending trim is EIO: those bytes raced with the truncation and may
    be gone; better said than found out;
  * the record goes only if it is still the one that was carried out (`trimmed`).

After a restart the server carries out both queues; clients go on meanwhile under these rules.
A repeated SetAttr whose answer is stored waits for the file's pending trim as the first did.

Not here: talking to iods.
"""

from __future__ import annotations

from nfsp import keys
from nfsp.mds.view import Effect, TrimReady, View, Writes, layout_of
from nfsp.model import FILE_SIZE_MAX, Inode, Remains

__all__ = ["pending_trim", "purge_queue", "purged", "trim", "trim_queue", "trimmed", "wait_trim"]


def pending_trim(view: View, ino: int) -> Remains | None:
    """Return the trim that waits to be carried out on a file."""
    record = view.get(keys.trim(ino))
    return None if record is None else Remains.decode(record)


def wait_trim(view: View, ino: int) -> tuple[Effect, ...]:
    """Return the effect that lets a reply wait for the file's pending trim."""
    pending = pending_trim(view, ino)
    return () if pending is None else (TrimReady(ino, pending, FILE_SIZE_MAX),)


def trim(view: View, inode: Inode, size: int, end: int, writes: Writes) -> TrimReady:
    """Put the bytes from *size* to *end* of a file on the trim queue."""
    pending = pending_trim(view, inode.ino)
    if pending is not None:
        size, end = min(size, pending.size), FILE_SIZE_MAX
    remains = Remains(layout_of(inode), size)
    writes[keys.trim(inode.ino)] = remains.encode()
    return TrimReady(inode.ino, remains, end)


def trimmed(view: View, ino: int, remains: Remains) -> Writes:
    """Return what to write when a trim is done: nothing, if another one took its place."""
    return {keys.trim(ino): None} if pending_trim(view, ino) == remains else {}


def purged(ino: int) -> Writes:
    """Return what to write when a deleted file's chunks are gone."""
    return {keys.purge(ino): None}


def purge_queue(view: View, after_ino: int, limit: int) -> list[tuple[int, Remains]]:
    """Return purge records above an inode number, in order."""
    return _queue(view, b"p", keys.purge(after_ino), limit)


def trim_queue(view: View, after_ino: int, limit: int) -> list[tuple[int, Remains]]:
    """Return trim records above an inode number, in order."""
    return _queue(view, b"t", keys.trim(after_ino), limit)


def _queue(view: View, prefix: bytes, after: bytes, limit: int) -> list[tuple[int, Remains]]:
    records = view.scan(keys.after(after), keys.prefix_end(prefix), limit)
    return [(int.from_bytes(key[1:]), Remains.decode(record)) for key, record in records]
