"""What the iods hold against what the metadata say: one chunk file at a time, looked at twice.

Pure.  The cluster is in use, and an inventory is never of the same moment as the metadata.  So a
chunk file that looks wrong by the survey is only suspected; it counts when a view pinned after
the inventory leads to the same suspicion.  That is enough, because
  * inode numbers are never reused, and an inode exists before its first chunk: what is below the
    NEXT_INO of the first view and has no inode in the second will never have one again;
  * a file whose recorded size is the same in both views, and that nobody had open for writing in
    either, has no business with chunks behind that size.

A file whose size is recorded and which has no chunks at all is legal: it is sparse.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import NamedTuple

from nfsp import keys
from nfsp.fsck import steps, table
from nfsp.fsck.findings import Finding, QueueTrim, RemoveChunks, Severity
from nfsp.fsck.survey import Survey, decode_counter, decode_inode
from nfsp.model import BLOCK_SIZE, Layout
from nfsp.striping import column_cut

__all__ = ["ChunkFile", "Look", "State", "Suspicion", "beyond", "finding", "first_look", "suspect"]

HEADER_SIZE = 4096
"""Bytes in front of each chunk in a chunk file (docs/on-disk-format.md#chunk-files)."""


class ChunkFile(NamedTuple):
    """An entry of an iod's inventory (wire.ListChunksReply)."""

    ino: int
    column: int
    size: int
    """Of the file, in bytes: the last row may be shorter than a whole chunk."""
    allocated: int


class State(NamedTuple):
    """What the metadata say of an inode number."""

    exists: bool = False
    is_sure: bool = True
    """The record is readable, its size and layout are possible."""
    layout: Layout | None = None
    """None: not a regular file."""
    size: int = 0
    is_purging: bool = False
    is_trimming: bool = False
    is_written: bool = False
    """Some session has it open for writing."""


class Suspicion(enum.Enum):
    LEFTOVER = "chunks.leftover"
    NUMBER = "chunks.number"
    COLUMN = "chunks.column"
    MISPLACED = "chunks.misplaced"
    BEYOND = "chunks.beyond"


def first_look(survey: Survey, ino: int) -> State:
    """Return what the survey remembers of an inode number."""
    rows = survey.table
    row = rows.find(ino)
    if row < 0:
        return State(is_purging=ino in survey.purging)
    flags, kind = rows.flags[row], rows.kinds[row]
    is_sure = kind != table.UNREADABLE and not flags & (table.UNSURE | table.REBUILD)
    return State(
        exists=True,
        is_sure=is_sure,
        layout=rows.layout(row),
        size=rows.sizes[row],
        is_trimming=ino in survey.trimming,
        is_written=ino in survey.writing,
    )


class Look:
    """A second look: a later view of some inodes."""

    def __init__(self, survey: Survey) -> None:
        self._survey = survey
        self._sessions: set[int] = set()
        self._writing: set[int] = set()
        self._states: dict[int, State] = {}
        self.records: dict[int, bytes] = {}
        """Inode records, where there are any."""
        self.next_ino = 0

    def read(self, inos: Iterable[int]) -> steps.Steps[None]:
        def writer(key: bytes, _: bytes) -> None:
            # As in the survey: what a session that is gone has left keeps nobody from looking.
            session = int.from_bytes(key[1:9])
            if session in self._sessions or (not session and self._sessions):
                self._writing.add(int.from_bytes(key[9:17]))

        def session(key: bytes, _: bytes) -> None:
            self._sessions.add(int.from_bytes(key[1:9]))

        self.next_ino = decode_counter((yield from steps.get(keys.NEXT_INO)))
        yield from steps.each(b"s", keys.prefix_end(b"s"), session)
        yield from steps.each(b"w", keys.prefix_end(b"w"), writer)
        for ino in inos:
            value = yield from steps.get(keys.inode(ino))
            purge = yield from steps.get(keys.purge(ino))
            trim = yield from steps.get(keys.trim(ino))
            state = self._judge(ino, value)
            self._states[ino] = state._replace(
                is_purging=purge is not None, is_trimming=trim is not None
            )

    def state(self, ino: int) -> State:
        return self._states[ino]

    @property
    def sessions(self) -> tuple[int, ...]:
        return tuple(sorted(self._sessions))

    def _judge(self, ino: int, value: bytes | None) -> State:
        if value is None:
            return State()
        self.records[ino] = value
        inode = decode_inode(value)
        if inode is None:
            return State(exists=True, is_sure=False)
        if not inode.is_file:
            return State(exists=True)
        layout = inode.layout
        is_sure = layout is not None and self._survey.layout_is_sound(layout)
        is_written = ino in self._writing
        return State(True, is_sure, layout, inode.size, is_written=is_written)


def suspect(
    survey: Survey, iod: int, file: ChunkFile, state: State, *, next_ino: int, thorough: bool
) -> Suspicion | None:
    """Return what seems to be wrong with a chunk file.

    BEYOND means: worth asking the iod which blocks there are (`beyond`).
    """
    if not state.exists:
        if state.is_purging:
            return None
        return Suspicion.LEFTOVER if file.ino < next_ino else Suspicion.NUMBER
    if not state.is_sure:
        return None
    if state.layout is None:
        return Suspicion.LEFTOVER
    if file.column >= state.layout.stripe_width:
        return Suspicion.COLUMN
    if survey.cluster_map and iod not in survey.chains[state.layout.chains[file.column]]:
        return Suspicion.MISPLACED
    if state.is_written or state.is_trimming:
        return None
    return Suspicion.BEYOND if _may_reach_beyond(file, state, thorough) else None


def _may_reach_beyond(file: ChunkFile, state: State, thorough: bool) -> bool:
    """Say whether there may be blocks behind the end of the file.

    A chunk file can be longer than its data, so a length tells little for the last row.  Without
    *thorough*, the iod is asked if the chunk file reaches behind the end, or if more of it is
    allocated than a file without holes needs.
    """
    assert state.layout is not None
    row, offset = column_cut(state.layout, state.size, file.column)
    row_size = HEADER_SIZE + state.layout.chunk_size
    end = row * row_size + (HEADER_SIZE + _block_up(offset) if offset else 0)
    return file.size > row * row_size and (thorough or file.size > end or file.allocated > end)


def _block_up(offset: int) -> int:
    return -(-offset // BLOCK_SIZE) * BLOCK_SIZE


def beyond(state: State, column: int, extents: Iterable[tuple[int, int, int]]) -> bool:
    """Say whether a present block (row, offset, length) lies wholly behind the end of the file.

    The block in which the file ends is no concern: readers cut it, and growing cleans it.
    """
    assert state.layout is not None
    row, offset = column_cut(state.layout, state.size, column)
    cut = row, _block_up(offset)
    return any((at, start + length) > cut for at, start, length in extents if at >= row)


def finding(
    suspicion: Suspicion, iod: int, file: ChunkFile, look: Look, where: str, *, is_copy: bool
) -> Finding:
    """Return the finding of a confirmed suspicion.

    *is_copy*: the iods on which a misplaced column belongs have one, too.
    """
    ino, column = file.ino, file.column
    name = f"chunk file {ino:x}.{column} on iod {iod}"
    remove = RemoveChunks(iod, ino, column)
    severity, check = Severity.LEFTOVER, suspicion.value
    match suspicion:
        case Suspicion.MISPLACED if not is_copy:
            what = f"{name}: belongs on another iod, which has none; it may be the only copy"
            return Finding(Severity.DAMAGE, check, what, ino, where=where)
        case Suspicion.MISPLACED:
            what = f"{name}: belongs on another iod, which has it"
        case Suspicion.COLUMN:
            what = f"{name}: the file has no such column"
        case Suspicion.BEYOND:
            size = look.state(ino).size
            what = f"{name}: data behind the end of the file ({size} bytes)"
            repair = "have the mds trim the file"
            trim = QueueTrim(ino, look.records[ino], look.sessions)
            return Finding(severity, check, what, ino, where=where, repair=repair, mend=trim)
        case _:
            what = f"{name}: no file has this number"
    repair = "remove the chunk file"
    return Finding(severity, check, what, ino, where=where, repair=repair, mend=remove)
