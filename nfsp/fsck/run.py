"""Drives the checker: one mds, all iods, on a cluster in use.

Metadata first: a pinned view is judged and, if asked, mended batch by batch; every batch is
conditional on what it was decided by, so concurrent work wins and the repair is skipped.  Repairs
can bring things to light (a directory that is back has entries), so it goes on in rounds until a
round mends nothing.  Then all iods at once (nfsp/fsck/inventory.py).

Not here: connections, sessions, the command line.
"""

from __future__ import annotations

from collections.abc import Mapping

import trio

from nfsp import keys
from nfsp.fsck import mend, steps
from nfsp.fsck.access import IodAccess, MdsAccess, Pinned, drive
from nfsp.fsck.access import repair as apply
from nfsp.fsck.findings import ChunkMend, Finding, Outcome, Report, not_mended
from nfsp.fsck.inventory import Inventory
from nfsp.fsck.survey import Survey
from nfsp.fsck.tree import survey_metadata

__all__ = ["check"]

ROUNDS_MAX = 10
"""Rounds of mending metadata; three have always been enough for one fault."""


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
    inventory = Inventory(mds, iods, survey, mend=repair, verify=verify)
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


async def _check_metadata(mds: MdsAccess, report: Report, mend_ns: int | None) -> Survey:
    """Judge the metadata, in rounds if they are to be mended; return the last survey."""
    results: dict[object, tuple[Finding, Outcome]] = {}
    for round_index in range(ROUNDS_MAX):
        async with Pinned(mds):
            survey = await drive(survey_metadata(), mds.scan)
            if mend_ns is None:
                outcomes = {finding: not_mended(finding) for finding in survey.findings}
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
        if await drive(mend.plan(record_mend, edit), scan) and await apply(mds, edit):
            written |= edit.records
            outcomes[finding] = Outcome.MENDED
    return outcomes
