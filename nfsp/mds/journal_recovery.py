"""What a restart makes of the journal's bytes.

Pure: contents of the segments in, a plan out; journal_files carries the plan out.

The records that count form one chain: each segment continues the one of the generation before.
A segment that does not was written out of order before a loss of power; nothing in it had been
durable, for `sync` covers segments in order.  What lies behind the first gap is dropped -- unless
a durable mark says that the gap was once whole: that is damage, and nothing is touched.

Cases, with C the main store's checkpoint sequence:
  * the older segment's records are all <= C: it is free, only the newer one counts;
  * the chain ends before C: the main store is ahead; a new generation begins at C + 1;
  * else appending goes on where the chain ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import Code, KaError
from nfsp.mds import journal
from nfsp.mds.journal import MARK_OFFSET, RECORDS_OFFSET, Record, SegmentHeader

__all__ = ["RecoveryPlan", "Replay", "plan_recovery"]


@dataclass(frozen=True, slots=True)
class Replay:
    """A segment of the chain."""

    index: int
    header: SegmentHeader
    records: list[Record]
    end: int
    """Offset behind its last record."""

    @property
    def last_sequence(self) -> int:
        return self.header.first_sequence + len(self.records) - 1


@dataclass(frozen=True, slots=True)
class RecoveryPlan:
    """What to keep, and what to remove before anything is appended."""

    retired: Replay | None
    """Has records that the main store lacks; all its room is used."""
    active: Replay | None
    """Takes the next record; None: begin a generation in segment `begin_index`."""
    begin_index: int
    generation: int
    """The highest one that was ever used."""
    dropped: tuple[int, ...]
    """Segments outside the chain: their headers must go."""
    has_remains: bool
    """Something behind the active segment's end must be zeroed."""

    checkpoint_sequence: int

    def unsaved_records(self) -> list[list[Record]]:
        """Return the records that the main store lacks, per kept segment, older first."""
        kept = [replay for replay in (self.retired, self.active) if replay is not None]
        return [
            [record for record in replay.records if record.sequence > self.checkpoint_sequence]
            for replay in kept
        ]


def plan_recovery(
    contents: Sequence[bytes], *, store: bytes, checkpoint_sequence: int
) -> RecoveryPlan:
    """Return what to do with segments of these *contents*.  Raises ENGINE_DAMAGED."""
    used = _used_segments(contents, store)
    if not used:
        raise _damaged("no segment of the journal has a header")
    generation = used[-1][1].generation
    if len(used) == 2 and used[1][1].first_sequence <= checkpoint_sequence + 1:
        del used[0]
    chain: list[Replay] = []
    dropped: list[int] = []
    for index, header in used:
        if chain and header.first_sequence != chain[-1].last_sequence + 1:
            dropped.append(index)
            continue
        records, end = journal.read_records(
            contents[index], tag=header.tag, first_sequence=header.first_sequence
        )
        chain.append(Replay(index, header, records, end))
    last_sequence = chain[-1].last_sequence
    _require_whole(contents, store, chain[0], last_sequence, checkpoint_sequence)
    active = chain[-1] if last_sequence >= checkpoint_sequence else None
    return RecoveryPlan(
        retired=chain[0] if active is not None and len(chain) == 2 else None,
        active=active,
        begin_index=1 - chain[-1].index,
        generation=generation,
        dropped=tuple(dropped),
        has_remains=active is not None
        and journal.has_record_after(contents[active.index], active.end, tag=active.header.tag),
        checkpoint_sequence=checkpoint_sequence,
    )


def _used_segments(contents: Sequence[bytes], store: bytes) -> list[tuple[int, SegmentHeader]]:
    used: list[tuple[int, SegmentHeader]] = []
    for index, content in enumerate(contents):
        header = journal.decode_header(content)
        if header is not None and header.store == store:
            used.append((index, header))
    return sorted(used, key=lambda pair: pair[1].generation)


def _require_whole(
    contents: Sequence[bytes],
    store: bytes,
    first: Replay,
    last_sequence: int,
    checkpoint_sequence: int,
) -> None:
    if first.header.first_sequence > checkpoint_sequence + 1:
        raise _damaged(
            "batches between the main store and the journal are missing",
            checkpoint_sequence=checkpoint_sequence,
            journal_from=first.header.first_sequence,
        )
    durable_sequence = max(
        journal.decode_mark(content[MARK_OFFSET:RECORDS_OFFSET], store) for content in contents
    )
    if max(last_sequence, checkpoint_sequence) < durable_sequence:
        raise _damaged(
            "the journal ends before batches that had been durable",
            last_sequence=last_sequence,
            durable_sequence=durable_sequence,
        )


def _damaged(message: str, **context: object) -> KaError:
    return KaError(Code.ENGINE_DAMAGED, f"the metadata store is damaged: {message}", **context)
