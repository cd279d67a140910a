"""Checks what the iods hold, with a second look at whatever seems wrong (nfsp/fsck/chunks.py).

Invariants
  * one view is pinned at a time, under `_lock`: the mds has one for each connection;
  * a chunk file is removed only after a view that was pinned after it was listed;
  * a file in use is never trimmed from here: the mds's trim queue does it (`_trim`).

Cancelled: at most one page is half mended; finding the rest again is what the next run does.
"""

from __future__ import annotations

from collections.abc import Mapping

import trio

from common.errors import KaError
from nfsp import keys
from nfsp.fsck import chunks, mend, steps
from nfsp.fsck.access import IodAccess, MdsAccess, Pinned, drive, repair
from nfsp.fsck.chunks import ChunkFile, Look, State, Suspicion
from nfsp.fsck.findings import (
    Finding,
    Outcome,
    QueueTrim,
    RemoveChunks,
    Report,
    SetRecord,
    Severity,
    not_mended,
    show,
)
from nfsp.fsck.survey import Survey, decode_counter, decode_inode, encode_counter
from nfsp.fsck.tree import INO_MARGIN, Paths
from nfsp.model import Remains, shard_of
from nfsp.striping import column_cut

__all__ = ["Inventory"]

FILES_COUNT = 1000
"""Chunk files listed at once."""


class Inventory:
    """Checks what the iods hold."""

    def __init__(
        self,
        mds: MdsAccess,
        iods: Mapping[int, IodAccess],
        survey: Survey,
        *,
        mend: bool,
        verify: bool,
    ) -> None:
        self._mds = mds
        self._iods = iods
        self._survey = survey
        self._paths = Paths(survey)
        self._is_mending = mend
        self._verify = verify
        self._lock = trio.Lock()
        self._trimmed: set[int] = set()
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
        async with Pinned(self._mds):
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
        async with self._lock, Pinned(self._mds):
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
            async with Pinned(self._mds):
                seen = await drive(steps.get(keys.NEXT_INO), self._mds.scan)
            fix = SetRecord(keys.NEXT_INO, seen, encode_counter(least))
            repair = f"raise the next inode number to {least}"
            finding = Finding(
                Severity.DAMAGE, check, what, where=f"iod {iod}", repair=repair, mend=fix
            )
            outcome = Outcome.REPORTED
            if self._is_mending:
                outcome = await self._raise_number(fix, least)
            report.add(finding, outcome)

    async def _raise_number(self, fix: SetRecord, least: int) -> Outcome:
        """Raise the counter; that another iod's finding has raised it further is as good."""
        edit = mend.Edit(0)
        edit.expected[fix.key], edit.records[fix.key] = fix.seen, fix.value
        if decode_counter(fix.seen) >= least:
            return Outcome.MENDED
        return Outcome.MENDED if await repair(self._mds, edit) else Outcome.SKIPPED

    # ------------------------------------------------------------ mending

    async def _mend(self, access: IodAccess, findings: list[Finding]) -> list[Outcome]:
        """Mend what was confirmed just now; the lock is held, nothing is pinned."""
        if not self._is_mending:
            return [not_mended(finding) for finding in findings]
        removals = [
            (finding.mend.ino, finding.mend.column)
            for finding in findings
            if isinstance(finding.mend, RemoveChunks)
        ]
        if removals:
            await access.remove(removals)
        outcomes = []
        for finding in findings:
            if isinstance(finding.mend, QueueTrim):
                outcomes.append(await self._trim(finding.mend))
            else:
                outcomes.append(Outcome.MENDED if finding.mend else Outcome.UNMENDABLE)
        return outcomes

    async def _trim(self, trim: QueueTrim) -> Outcome:
        """Put a file on the trim queue: opening it for writing then waits until that is done.

        Trimming at the iod from here would race with those who write at the file's end.
        """
        if trim.ino in self._trimmed:  # another column of it
            return Outcome.MENDED
        inode = decode_inode(trim.inode)
        assert inode is not None
        assert inode.layout is not None
        key = keys.trim(trim.ino)
        edit = mend.Edit(0)
        edit.expected = {keys.writer(session, trim.ino): None for session in (0, *trim.sessions)}
        edit.expected |= {keys.inode(trim.ino): trim.inode, key: None}
        edit.records = {key: Remains(inode.layout, inode.size).encode()}
        if not await repair(self._mds, edit):
            return Outcome.SKIPPED
        self._trimmed.add(trim.ino)
        return Outcome.MENDED


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
