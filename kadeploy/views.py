"""Deployments for people: verdicts, tries of steps, lists; and as plain values."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from common import nodeset
from kadeploy.store import DeploymentRow, HistoryRow
from kadeploy.workflow import NodeState, Status, StepRecord

__all__ = [
    "deployment_line",
    "node_dicts",
    "place",
    "record_line",
    "try_line",
    "verdict_lines",
]


def node_dicts(states: Sequence[NodeState]) -> list[dict[str, Any]]:
    return [{**asdict(node), "status": node.status.value} for node in states]


def place(outline: Sequence[dict[str, Any]], node: NodeState) -> dict[str, Any]:
    """Return a node with the names of where it is, and which part of the way lies behind it."""
    macro, way, step, done = "", "", "", 0.0
    if outline:
        found = outline[node.macro]
        steps = found["ways"][node.implementation]["steps"]
        macro, way = found["macro"], found["ways"][node.implementation]["way"]
        step = steps[node.step]
        done = (node.macro + node.step / len(steps)) / len(outline)
    if node.status is Status.DEPLOYED:
        done = 1.0
    return {
        "name": node.name,
        "status": node.status.value,
        "macro": macro,
        "way": way,
        "step": step,
        "reason": node.reason,
        "progress": round(done, 3),
    }


def verdict_lines(number: int, states: Sequence[NodeState]) -> Iterator[str]:
    """Yield the deployment's outcome: a line for each status, and for each reason of a failure."""
    yield f"deployment {number}: {len(states)} nodes"
    for status in Status:
        names = [node.name for node in states if node.status is status]
        if not names or status is Status.FAILED:
            continue
        yield f"  {status.value}: {nodeset.fold(names)}"
    reasons: dict[str, list[str]] = {}
    for node in states:
        if node.status is Status.FAILED:
            reasons.setdefault(node.reason, []).append(node.name)
    for reason, names in reasons.items():
        yield f"  failed: {nodeset.fold(names)}: {reason}"


def record_line(one: StepRecord) -> str:
    took_s = (one.ended_ms - one.started_ms) / 1000
    end = f": {one.reason}" if one.reason else ""
    word = "done" if one.ok else "FAILED"
    return f"{one.node}: {one.implementation}/{one.step} {word} in {took_s:.1f} s{end}"


def try_line(one: HistoryRow) -> str:
    end = f": {one.reason}" if one.reason else ""
    word = "done" if one.ok else "FAILED"
    return (
        f"{_time(one.ended_ms)} {one.node} {one.macro} {one.implementation}/{one.step}"
        f" try {one.attempt + 1} {word} in {one.took_ms / 1000:.1f} s{end}"
    )


def deployment_line(row: DeploymentRow) -> str:
    end = _time(row.ended_ms) if row.ended_ms is not None else "not ended"
    return f"{row.id} {row.environment} {row.version} {_time(row.started_ms)} {end}"


def _time(now_ms: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now_ms / 1000))
