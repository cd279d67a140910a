"""Drives the checker: one mds, all iods, on a cluster in use.

Metadata first: a pinned view is judged and, if asked, mended batch by batch; every batch is
conditional on what it was decided by, so concurrent work wins and the repair is skipped.  Repairs
can bring things to light (a directory that is back has entries), so it goes on in rounds until a
round mends nothing.  Then all iods at once, page by page, with a second look at whatever seems
wrong (nfsp/fsck/chunks.py).

Invariants
  * one view is pinned at a time (the mds has one for each connection): `_lock` in `_Inventory`;
  * a chunk file is removed under a view that was pinned after it was listed;
  * trimming is announced in the mds's trim queue first: opening for writing waits for that, and
    if this process dies, the mds carries it out.

Not here: connections, sessions, the command line.  Cancelled: at most one batch is half done on
the side of the iods, and finding it again is what the next run does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol, TypeVar

import trio

from common.errors import Code, KaError
from nfsp import keys
from nfsp.fsck import chunks, mend, steps
from nfsp.fsck.chunks import ChunkFile, Look, State, Suspicion
from nfsp.fsck.findings import (
    ChunkMend,
    Finding,
    Outcome,
    RemoveChunks,
    Report,
    SetRecord,
    Severity,
    TrimChunks,
    show,
)
from nfsp.fsck.survey import Survey, decode_counter, decode_inode, encode_counter
from nfsp.fsck.tree import INO_MARGIN, Paths, survey_metadata
from nfsp.model import Remains, shard_of
from nfsp.striping import column_cut

__all__ = ["IodAccess", "MdsAccess", "check"]

ROUNDS_MAX = 10
"""Rounds of mending metadata; three have always been enough for one fault."""
FILES_COUNT = 1000
"""Chunk files listed at once."""
CLOSE_TIMEOUT_S = 5.0
"""A view left pinned costs the mds space, so it is closed even when cancelled."""

T = TypeVar("T")
ScanFunction = Callable[[bytes, bytes, int], Awaitable[list[steps.Record]]]


class MdsAccess(Protocol):
    """A connection to the mds (wire.SnapshotOpen, SnapshotScan, SnapshotClose, Repair)."""

    async def snapshot_open(self) -> None: ...

    async def snapshot_close(self) -> None: ...

    async def scan(self, start: bytes, end: bytes, count_max: int) -> list[steps.Record]:
        """Read raw records of the pinned view."""
        ...

    async def repair(
        self, expected: Mapping[bytes, bytes | None], records: Mapping[bytes, bytes | None]
    ) -> None:
        """Write records if *expected* still holds; KaError EBUSY if it does not."""
        ...


class IodAccess(Protocol):
    """A connection to an iod; it knows the epoch that requests carry."""

    async def list_chunks(
        self, after_ino: int, after_column: int, count_max: int
    ) -> list[ChunkFile]: ...

    async def extents(
        self, ino: int, column: int, chunk_size: int, row: int
    ) -> tuple[list[tuple[int, int, int]], int]:
        """Return (row, offset, length) of present blocks, and the row to go on from, or -1."""
        ...

    async def verify(self, ino: int, column: int) -> list[str]: ...

    async def trim(self, ino: int, column: int, row: int, offset: int, chunk_size: int) -> None: ...

    async def remove(self, files: list[tuple[int, int]]) -> None: ...


async def check(
    mds: MdsAccess,
    iods: Mapping[int, IodAccess],
    *,
    repair: bool = False,
    verify: bool = False,
    now_ns: int,
) -> Report:
    """Check everything and return what was found; with *repair*, mend what can be mended.

    *iods*: by number; those of the cluster map that are missing here are reported as unchecked.
    *verify*: also let every iod read all its blocks and compare the checksums.
    Raises KaError when the mds cannot be asked, or NOT_FORMATTED.
    """
    report = Report()
    survey = await _check_metadata(mds, report, now_ns if repair else None)
    report.counts |= survey.counts
    report.omitted += survey.omitted
    if survey.cluster_map is None:
        report.unchecked.append("all iods: the cluster map cannot be read")
        return report
    inventory = _Inventory(mds, iods, survey, repair=repair, verify=verify)
    here = [iod.iod for iod in survey.cluster_map.iods if iod.state != "gone"]
    async with trio.open_nursery() as nursery:
        for iod in here:
            nursery.start_soon(inventory.check_iod, iod)
    for iod in here:
        for finding, outcome in inventory.results[iod]:
            report.add(finding, outcome)
    await inventory.check_numbers(report)
    report.counts |= inventory.counts
    report.unchecked += sorted(inventory.unchecked)
    return report


async def drive(generator: steps.Steps[T], scan: ScanFunction) -> T:
    """Run a pure generator, answering its questions."""
    try:
        question = next(generator)
        while True:
            question = generator.send(await scan(*question))
    except StopIteration as stop:
        result: T = stop.value
        return result


class _Pinned:
    """A pinned view, as a context manager."""

    def __init__(self, mds: MdsAccess) -> None:
        self._mds = mds

    async def __aenter__(self) -> None:
        await self._mds.snapshot_open()

    async def __aexit__(self, *_: object) -> None:
        with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
            await self._mds.snapshot_close()


# ---------------------------------------------------------------- metadata


async def _check_metadata(mds: MdsAccess, report: Report, mend_ns: int | None) -> Survey:
    """Judge the metadata, in rounds if they are to be mended; return the last survey."""
    results: dict[object, tuple[Finding, Outcome]] = {}
    for round_index in range(ROUNDS_MAX):
        async with _Pinned(mds):
            survey = await drive(survey_metadata(), mds.scan)
            if mend_ns is None:
                outcomes = {finding: _not_mended(finding) for finding in survey.findings}
            else:
                outcomes = await _mend_metadata(mds, survey.findings, mend_ns)
        for finding, outcome in outcomes.items():
            results[finding.identity] = finding, outcome
        mended = Outcome.MENDED in outcomes.values()
        # What was changed meanwhile gets one more try.
        skipped = Outcome.SKIPPED in outcomes.values() and round_index == 0
        if mend_ns is None or not (mended or skipped):
            break
    for finding, outcome in results.values():
        report.add(finding, outcome)
    return survey


def _not_mended(finding: Finding) -> Outcome:
    return Outcome.REPORTED if finding.mend else Outcome.UNMENDABLE


async def _mend_metadata(
    mds: MdsAccess, findings: list[Finding], now_ns: int
) -> dict[Finding, Outcome]:
    """Mend what can be mended under the pinned view and what was written on top of it."""
    written: dict[bytes, bytes | None] = {}

    async def scan(start: bytes, end: bytes, count_max: int) -> list[steps.Record]:
        if start in written and end == keys.after(start):
            value = written[start]
            return [] if value is None else [(start, value)]
        return await mds.scan(start, end, count_max)

    outcomes = {finding: Outcome.UNMENDABLE for finding in findings}
    mends = [
        (finding, finding.mend)
        for finding in findings
        if finding.mend and not isinstance(finding.mend, ChunkMend)
    ]
    for finding, record_mend in sorted(mends, key=lambda item: mend.order(item[1])):
        edit = mend.Edit(now_ns)
        outcomes[finding] = Outcome.SKIPPED
        if await drive(mend.plan(record_mend, edit), scan) and await _repair(mds, edit):
            written |= edit.records
            outcomes[finding] = Outcome.MENDED
    return outcomes


async def _repair(mds: MdsAccess, edit: mend.Edit) -> bool:
    """Write a batch; return False if what it was decided by has changed."""
    try:
        await mds.repair(edit.expected, edit.records)
    except KaError as error:
        if error.code is not Code.EBUSY:
            raise
        return False
    return True


# ---------------------------------------------------------------- iods


class _Inventory:
    """Checks what the iods hold."""

    def __init__(
        self,
        mds: MdsAccess,
        iods: Mapping[int, IodAccess],
        survey: Survey,
        *,
        repair: bool,
        verify: bool,
    ) -> None:
        self._mds = mds
        self._iods = iods
        self._survey = survey
        self._paths = Paths(survey)
        self._repair = repair
        self._verify = verify
        self._lock = trio.Lock()
        self._numbers: dict[int, int] = {}
        """Largest inode number never given out that an iod has chunks of, by iod."""
        self.results: dict[int, list[tuple[Finding, Outcome]]] = {}
        self.counts: dict[str, int] = {}
        self.unchecked: list[str] = []

    async def check_iod(self, iod: int) -> None:
        self.results[iod] = []
        files = self.counts[f"iod{iod}_chunk_files"] = 0
        size = self.counts[f"iod{iod}_bytes"] = 0
        access = self._iods.get(iod)
        if access is None:
            self.unchecked.append(f"iod {iod}: cannot be reached")
            return
        after = 0, 0
        try:
            while page := await access.list_chunks(*after, FILES_COUNT):
                await self._check_page(iod, access, page)
                files += len(page)
                size += sum(file.allocated for file in page)
                self.counts[f"iod{iod}_chunk_files"] = files
                self.counts[f"iod{iod}_bytes"] = size
                after = page[-1].ino, page[-1].column
        except KaError as error:
            self.unchecked.append(f"iod {iod}: {error.message}")

    async def _check_page(self, iod: int, access: IodAccess, page: list[ChunkFile]) -> None:
        suspects: list[tuple[ChunkFile, Suspicion, bool]] = []
        for file in page:
            state = chunks.first_look(self._survey, file.ino)
            suspicion = self._suspect(iod, file, state, self._survey.next_ino)
            is_copy = False
            if suspicion is Suspicion.BEYOND and not await _is_beyond(access, file, state):
                suspicion = None
            elif suspicion is Suspicion.MISPLACED:
                is_copy = await self._is_copy(file, state)
            if suspicion:
                suspects.append((file, suspicion, is_copy))
            if self._verify and state.exists and state.is_sure:
                await self._verify_file(iod, access, file)
        if suspects:
            async with self._lock:
                await self._confirm(iod, access, suspects)

    def _suspect(self, iod: int, file: ChunkFile, state: State, next_ino: int) -> Suspicion | None:
        return chunks.suspect(
            self._survey, iod, file, state, next_ino=next_ino, thorough=self._verify
        )

    async def _confirm(
        self, iod: int, access: IodAccess, suspects: list[tuple[ChunkFile, Suspicion, bool]]
    ) -> None:
        """Look again; report, and mend, what looks the same."""
        confirmed: list[Finding] = []
        async with _Pinned(self._mds):
            look = Look(self._survey)
            inos = sorted({file.ino for file, _, _ in suspects})
            await drive(look.read(inos), self._mds.scan)
            for file, suspicion, is_copy in suspects:
                before = chunks.first_look(self._survey, file.ino)
                state = look.state(file.ino)
                if (state.layout, state.size) != (before.layout, before.size):
                    continue
                if self._suspect(iod, file, state, look.next_ino) is not suspicion:
                    continue
                if suspicion is Suspicion.NUMBER:
                    self._numbers[iod] = max(self._numbers.get(iod, 0), file.ino)
                    continue
                where = await self._where(file.ino)
                confirmed.append(chunks.finding(suspicion, iod, file, look, where, is_copy=is_copy))
        outcomes = await self._mend(access, confirmed)
        self.results[iod] += zip(confirmed, outcomes, strict=True)

    async def _where(self, ino: int) -> str:
        path = await drive(self._paths.find(ino), self._mds.scan)
        return f"inode {ino}" if path is None else f"{show(path)} (inode {ino})"

    async def _is_copy(self, file: ChunkFile, state: State) -> bool:
        """Say whether all iods on which a column belongs have data of it."""
        assert state.layout is not None
        for iod in self._survey.chains[state.layout.chains[file.column]]:
            access = self._iods.get(iod)
            if access is None:
                return False
            try:
                extents, _ = await access.extents(file.ino, file.column, state.layout.chunk_size, 0)
            except KaError:
                return False
            if not extents:
                return False
        return True

    async def _verify_file(self, iod: int, access: IodAccess, file: ChunkFile) -> None:
        """Have a chunk file read; what does not match must not match twice, and still exist."""
        if not await access.verify(file.ino, file.column):
            return
        lines = await access.verify(file.ino, file.column)
        if not lines:
            return
        async with self._lock, _Pinned(self._mds):
            look = Look(self._survey)
            await drive(look.read([file.ino]), self._mds.scan)
            if not look.state(file.ino).exists:
                return
            where = await self._where(file.ino)
        for line in lines:
            what = f"chunk file {file.ino:x}.{file.column} on iod {iod}: {line}"
            finding = Finding(Severity.DAMAGE, "chunks.corrupt", what, file.ino, where=where)
            self.results[iod].append((finding, Outcome.UNMENDABLE))

    async def check_numbers(self, report: Report) -> None:
        """Report chunks of numbers never given out: a new file would find them as its own."""
        for iod, ino in self._numbers.items():
            what = f"iod {iod} has chunks of inode {ino}, a number that was never given out"
            check = Suspicion.NUMBER.value
            if shard_of(ino) != self._survey.shard:
                finding = Finding(Severity.DAMAGE, check, what, where=f"iod {iod}")
                report.add(finding, Outcome.UNMENDABLE)
                continue
            least = ino + 1 + INO_MARGIN
            async with _Pinned(self._mds):
                seen = await drive(steps.get(keys.NEXT_INO), self._mds.scan)
            fix = SetRecord(keys.NEXT_INO, seen, encode_counter(least))
            repair = f"raise the next inode number to {least}"
            finding = Finding(
                Severity.DAMAGE, check, what, where=f"iod {iod}", repair=repair, mend=fix
            )
            outcome = Outcome.REPORTED
            if self._repair:
                outcome = await self._raise_number(fix, least)
            report.add(finding, outcome)

    async def _raise_number(self, fix: SetRecord, least: int) -> Outcome:
        """Raise the counter; that another iod's finding has raised it further is as good."""
        edit = mend.Edit(0)
        edit.expected[fix.key], edit.records[fix.key] = fix.seen, fix.value
        if decode_counter(fix.seen) >= least:
            return Outcome.MENDED
        return Outcome.MENDED if await _repair(self._mds, edit) else Outcome.SKIPPED

    # ------------------------------------------------------------ mending

    async def _mend(self, access: IodAccess, findings: list[Finding]) -> list[Outcome]:
        """Mend what was confirmed just now; the lock is held, nothing is pinned."""
        if not self._repair:
            return [_not_mended(finding) for finding in findings]
        removals = [
            (finding.mend.ino, finding.mend.column)
            for finding in findings
            if isinstance(finding.mend, RemoveChunks)
        ]
        if removals:
            await access.remove(removals)
        outcomes = []
        for finding in findings:
            if isinstance(finding.mend, TrimChunks):
                outcomes.append(await self._trim(access, finding.mend))
            else:
                outcomes.append(Outcome.MENDED if finding.mend else Outcome.UNMENDABLE)
        return outcomes

    async def _trim(self, access: IodAccess, trim: TrimChunks) -> Outcome:
        inode = decode_inode(trim.inode)
        assert inode is not None
        assert inode.layout is not None
        key = keys.trim(trim.ino)
        announced = Remains(inode.layout, inode.size).encode()
        announce = mend.Edit(0)
        announce.expected = {keys.inode(trim.ino): trim.inode, key: None}
        announce.records = {key: announced}
        withdraw = mend.Edit(0)
        withdraw.expected, withdraw.records = {key: announced}, {key: None}
        if not await _repair(self._mds, announce):
            return Outcome.SKIPPED
        async with _Pinned(self._mds):
            look = Look(self._survey)
            await drive(look.read([trim.ino]), self._mds.scan)
        is_quiet = not look.state(trim.ino).is_written
        if is_quiet:
            await access.trim(trim.ino, trim.column, trim.row, trim.offset, trim.chunk_size)
        # The record has gone if the mds was quicker, and changed if a truncation has taken it over.
        await _repair(self._mds, withdraw)
        return Outcome.MENDED if is_quiet else Outcome.SKIPPED


async def _is_beyond(access: IodAccess, file: ChunkFile, state: State) -> bool:
    """Ask an iod for the blocks behind the end of a file."""
    assert state.layout is not None
    row, _ = column_cut(state.layout, state.size, file.column)
    while True:
        extents, next_row = await access.extents(
            file.ino, file.column, state.layout.chunk_size, row
        )
        if chunks.beyond(state, file.column, extents):
            return True
        if next_row <= row:
            return False
        row = next_row
