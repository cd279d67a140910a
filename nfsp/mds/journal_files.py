"""The journal's two segment files: what is written where, and when it is durable.

Owns the files journal.0 and journal.1 and which of them is *active* (takes records), *retired*
(holds records until a checkpoint has them) or free.  Position: journal.py (bytes) and
journal_recovery.py (what a restart makes of them) -> this -> lmdb_engine.py (when).

Invariants
  * segments are written to their full size when the store is made, so appending allocates
    nothing and a full disk cannot tear the journal;
  * a segment is begun anew only after `release`: its records are durable elsewhere;
  * `sync` covers the retired segment before the active one, so the durable records are always a
    prefix of the applied ones;
  * after `open_journal` nothing is left that could later be mistaken for a record.

Everything but `sync` runs in the event loop's thread; `sync` may run in another meanwhile.
Not here: what batches mean, threads, when to retire or release.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from common.errors import Code, KaError
from nfsp.mds import journal
from nfsp.mds.engine import Batch
from nfsp.mds.journal import MARK_OFFSET, RECORDS_OFFSET, Record, SegmentHeader
from nfsp.mds.journal_recovery import RecoveryPlan, Replay, plan_recovery

__all__ = ["Journal", "Segment", "create_segments", "open_journal", "sync"]

_NAMES = ("journal.0", "journal.1")
_TAG_SIZE = 8
_ZEROS = bytes(1 << 20)


@dataclass(slots=True)
class Segment:
    """One file and its present use."""

    path: Path
    descriptor: int
    size: int
    generation: int = 0
    tag: bytes = b""
    end: int = RECORDS_OFFSET
    """Where the next record goes."""
    is_dirty: bool = True
    """Something may have been written since the last sync."""


class Journal:
    """An open journal: an active segment, and a retired or a free one."""

    def __init__(self, segments: list[Segment], store: bytes) -> None:
        self._segments = segments
        self._store = store
        self._active = segments[0]
        self._retired: Segment | None = None

    @property
    def record_size_max(self) -> int:
        return self._active.size - RECORDS_OFFSET

    @property
    def active_size(self) -> int:
        """Bytes of records in the active segment."""
        return self._active.end - RECORDS_OFFSET

    @property
    def content_size(self) -> int:
        """Bytes of records that a restart would replay."""
        return sum(segment.end - RECORDS_OFFSET for segment in self._live())

    def encode(self, batch: Batch, *, sequence: int, epoch: int) -> bytes:
        """Return the record of *batch* for the active segment."""
        return journal.encode_record(batch, tag=self._active.tag, sequence=sequence, epoch=epoch)

    def fits(self, record_size: int) -> bool:
        return self._active.end + record_size <= self._active.size

    def append(self, record: bytes) -> None:
        """Write a record that `fits`.  After an OSError the next one takes the same place."""
        active = self._active
        _write(active.descriptor, record, active.end)
        active.end += len(record)
        active.is_dirty = True

    def retire(self, first_sequence: int) -> None:
        """Make the free segment active, for records from *first_sequence* on."""
        assert self._retired is None
        free = next(segment for segment in self._segments if segment is not self._active)
        self._begin(free, self._active.generation + 1, first_sequence)
        self._active, self._retired = free, self._active

    def release(self) -> None:
        """Give the retired segment back: its records are durable elsewhere."""
        self._retired = None

    def unsynced(self) -> list[Segment]:
        """Return the segments that `sync` must cover, in its order."""
        return [segment for segment in self._live() if segment.is_dirty]

    def mark(self, durable_sequence: int) -> None:
        """Note what was synced, so that a restart can tell damage from an unsynced end.

        The mark itself is not synced: where it is lost the check is weaker, nothing else.
        """
        mark = journal.encode_mark(durable_sequence, self._store)
        _write(self._active.descriptor, mark, MARK_OFFSET)

    def close(self) -> None:
        for segment in self._segments:
            os.close(segment.descriptor)

    def carry_out(self, plan: RecoveryPlan) -> None:
        """Take over what a restart found; all that it kept is durable afterwards."""
        for index in plan.dropped:
            _zero(self._segments[index].descriptor, 0, MARK_OFFSET)
        if plan.active is None:
            self._active = self._segments[plan.begin_index]
            self._begin(self._active, plan.generation + 1, plan.checkpoint_sequence + 1)
        else:
            self._active = self._take_over(plan.active)
        if plan.retired is not None:
            self._retired = self._take_over(plan.retired)
        if plan.has_remains:
            _zero(self._active.descriptor, self._active.end, self._active.size)
        sync(self._segments)

    def _take_over(self, replay: Replay) -> Segment:
        segment = self._segments[replay.index]
        segment.generation = replay.header.generation
        segment.tag = replay.header.tag
        segment.end = replay.end
        return segment

    def _begin(self, segment: Segment, generation: int, first_sequence: int) -> None:
        tag = os.urandom(_TAG_SIZE)
        header = SegmentHeader(generation, first_sequence, tag, self._store)
        _write(segment.descriptor, journal.encode_header(header), 0)
        segment.generation = generation
        segment.tag = tag
        segment.end = RECORDS_OFFSET
        segment.is_dirty = True

    def _live(self) -> list[Segment]:
        return [self._active] if self._retired is None else [self._retired, self._active]


def create_segments(directory: Path, store: bytes, segment_size: int) -> None:
    """Write both files in full, durably; the first one is ready for record 1."""
    header = SegmentHeader(1, 1, os.urandom(_TAG_SIZE), store)
    for name in _NAMES:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        descriptor = os.open(directory / name, flags, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, segment_size)
            # Written, not only reserved: turning reserved blocks into written ones would add a
            # commit of the local file system's own journal to our syncs.
            _zero(descriptor, 0, segment_size)
            if name == _NAMES[0]:
                _write(descriptor, journal.encode_header(header), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_journal(
    directory: Path, store: bytes, checkpoint_sequence: int
) -> tuple[Journal, list[list[Record]]]:
    """Open the files and return the records after the checkpoint.

    The lists belong to the retired segment, if there is one, and the active one.  Raises
    ENGINE_DAMAGED, having changed nothing, if records that had been durable are missing.
    """
    segments: list[Segment] = []
    try:
        for name in _NAMES:
            segments.append(_open_segment(directory / name))
        contents = [_read(segment) for segment in segments]
        plan = plan_recovery(contents, store=store, checkpoint_sequence=checkpoint_sequence)
        opened = Journal(segments, store)
        opened.carry_out(plan)
    except BaseException:
        for segment in segments:
            os.close(segment.descriptor)
        raise
    return opened, plan.unsaved_records()


def sync(segments: list[Segment]) -> None:
    """Make the segments' content durable.  After an OSError nothing of it may be trusted."""
    for segment in segments:
        # Cleared first: a record that is appended while we wait makes it dirty again.
        segment.is_dirty = False
        os.fdatasync(segment.descriptor)


def _open_segment(path: Path) -> Segment:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise KaError(
            Code.ENGINE_DAMAGED, f"the metadata store is damaged: {path} is missing"
        ) from None
    return Segment(path, descriptor, os.fstat(descriptor).st_size)


def _read(segment: Segment) -> bytes:
    with open(segment.descriptor, "rb", closefd=False) as file:
        file.seek(0)
        return file.read()


def _write(descriptor: int, data: bytes, offset: int) -> None:
    written = os.pwrite(descriptor, data, offset)
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], offset + written)


def _zero(descriptor: int, start: int, end: int) -> None:
    while start < end:
        start += os.pwrite(descriptor, _ZEROS[: end - start], start)
