"""`nfsp fsck`: the checker of `nfsp.fsck` over real connections, and its report for a person."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any, TypeVar

import trio

from common.errors import Code, KaError
from common.link import Link
from common.session import Identity
from common.sizes import format_size
from nfsp import keys, wire
from nfsp.config import ClusterConfig
from nfsp.fsck.chunks import ChunkFile
from nfsp.fsck.findings import Report
from nfsp.fsck.run import check
from nfsp.fsck.steps import Record
from nfsp.iod_links import IodLinks
from nfsp.model import ClusterMap

__all__ = ["lay_out", "run_fsck"]

PATIENCE_S = 10.0
VERIFY_PATIENCE_S = 600.0
"""Reading a large chunk file whole takes its time."""
EXTENT_ROWS = 1000

_Reply = TypeVar("_Reply")


class _Mds:
    """`MdsAccess` over a link."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def ask(self, message: Any, reply: type[_Reply]) -> _Reply:
        body, _size = await self._link.call(wire.MDS.encode(message))
        answer = wire.MDS.decode(body)
        if not isinstance(answer, reply):
            raise KaError(Code.PROTOCOL, f"expected {reply.__name__}")
        return answer

    async def snapshot_open(self) -> None:
        await self.ask(wire.SnapshotOpen(), wire.Done)

    async def snapshot_close(self) -> None:
        await self.ask(wire.SnapshotClose(), wire.Done)

    async def scan(self, start: bytes, end: bytes, count_max: int) -> list[Record]:
        reply = await self.ask(wire.SnapshotScan(start, end, count_max), wire.RecordsReply)
        return [(key, value) for key, value in reply.records]

    async def repair(
        self, expected: Mapping[bytes, bytes | None], records: Mapping[bytes, bytes | None]
    ) -> None:
        message = wire.Repair(
            [list(item) for item in expected.items()], [list(item) for item in records.items()]
        )
        await self.ask(message, wire.Done)


class _Iod:
    """`IodAccess` over a link."""

    def __init__(self, links: IodLinks, iod: int) -> None:
        self._links = links
        self._iod = iod

    async def list_chunks(
        self, after_ino: int, after_column: int, count_max: int
    ) -> list[ChunkFile]:
        message = wire.ListChunks(after_ino, after_column, count_max)
        reply = await self._links.request(self._iod, message, wire.ListChunksReply)
        return [ChunkFile(*item) for item in reply.files]

    async def extents(
        self, ino: int, column: int, chunk_size: int, row: int
    ) -> tuple[list[tuple[int, int, int]], int]:
        message = wire.Extents(ino, column, chunk_size, row, EXTENT_ROWS)
        reply = await self._links.request(self._iod, message, wire.ExtentsReply)
        return [(at, offset, length) for at, offset, length in reply.extents], reply.next_row

    async def verify(self, ino: int, column: int) -> list[str]:
        reply = await self._links.request(
            self._iod, wire.Verify(ino, column), wire.VerifyReply, patience_s=VERIFY_PATIENCE_S
        )
        return reply.findings

    async def remove(self, files: list[tuple[int, int]]) -> None:
        message = wire.Remove(self._links.epoch, files)
        await self._links.request(self._iod, message, wire.IodDone)


async def run_fsck(
    config: ClusterConfig, key: bytes, *, repair: bool, verify: bool
) -> Report:
    """Check the whole cluster; raises KaError when the mds cannot be asked."""
    identity = Identity(config.cluster.id, "admin", "fsck", secrets.token_bytes(16))
    mds = config.mds[0]
    link = Link(
        f"mds{mds.id}", mds.address, mds.socket, identity=identity, key=key, patience_s=PATIENCE_S
    )
    links = IodLinks(identity=identity, key=key, patience_s=PATIENCE_S)
    failure: KaError | None = None
    report = Report()
    async with trio.open_nursery() as nursery:
        await nursery.start(link.run)
        await nursery.start(links.run)
        try:
            access = _Mds(link)
            await links.use_map(await _cluster_map(access))
            iods = {iod: _Iod(links, iod) for iod in links.iods}
            report = await check(
                access, iods, repair=repair, verify=verify, now_ns=time.time_ns()
            )
        except KaError as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return report


async def _cluster_map(mds: _Mds) -> ClusterMap:
    await mds.snapshot_open()
    try:
        records = await mds.scan(keys.CLUSTER_MAP, keys.after(keys.CLUSTER_MAP), 1)
    finally:
        await mds.snapshot_close()
    if not records:
        raise KaError(Code.ENGINE_DAMAGED, "the metadata hold no cluster map")
    return ClusterMap.decode(records[0][1])


def lay_out(report: Report) -> str:
    """Return the report as lines for a person."""
    lines = []
    for finding, outcome in report.results:
        repair = f"; repair: {finding.repair}" if finding.repair else ""
        where = f"{finding.where}: " if finding.where else ""
        lines.append(
            f"{finding.severity.value}: {where}{finding.what} [{finding.check}]"
            f"{repair} ({outcome.value})"
        )
    if report.omitted:
        lines.append(f"... and {report.omitted} more")
    lines += [f"not checked: {line}" for line in report.unchecked]
    counts = _in_words(report.counts)
    verdict = "clean" if not report.exit_code else f"{len(report.results)} findings"
    lines.append(f"checked {counts}: {verdict}" if counts else verdict)
    return "\n".join(lines)


def _in_words(counts: Mapping[str, int]) -> str:
    """Return what was counted, that of all iods together."""
    words = [
        f"{count:,} {name}" for name, count in sorted(counts.items()) if not name.startswith("iod")
    ]
    files = [count for name, count in counts.items() if name.endswith("_chunk_files")]
    if files:
        size = sum(count for name, count in counts.items() if name.endswith("_bytes"))
        words.append(f"{sum(files):,} chunk files of {format_size(size)} on {len(files)} iods")
    return ", ".join(words)
