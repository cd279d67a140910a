"""What `karun reboot` does with its options: a plan, hands, a status line, verdicts, an exit code.

Ctrl-C orders no more and prints the verdicts so far; nodes that were ordered go on rebooting.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import trio

from common.signals import on_signal
from karun.lines import STDERR, STDOUT
from karun.nodes import Names
from karun.output import Streams
from karun.power import Policy, Reboot, Verdict
from karun.progress import StatusLine
from karun.reboot import Hands, reboot

__all__ = ["main"]

EXIT_INTERRUPTED = 130


def main(
    names: Sequence[str],
    policy: Policy,
    hands: Hands,
    streams: Streams,
    *,
    status: StatusLine | None = None,
    as_json: bool = False,
) -> int:
    """Reboot the nodes, print what came of it, return the exit code.

    *status* draws how far it is, on a terminal, by `time.monotonic`.
    """
    latest = Reboot(len(names), policy)

    def changed(plan: Reboot) -> None:
        nonlocal latest
        latest = plan
        if status is not None:
            status.update(time.monotonic(), line(plan))

    async def carry_out() -> bool:
        """Return whether it came to its end."""
        async with trio.open_nursery() as nursery:
            await nursery.start(on_signal, lambda _: nursery.cancel_scope.cancel())
            changed(await reboot(len(names), policy, hands, changed=changed))
            nursery.cancel_scope.cancel()
            return True
        return False

    code = latest.exit_code() if trio.run(carry_out) else EXIT_INTERRUPTED
    if status is not None:
        status.clear()
    _print(latest, Names(names), streams, code, as_json=as_json)
    return code


def line(plan: Reboot) -> str:
    """Return the status line."""
    waiting, under_way, up, failed = plan.phase_counts()
    return f"karun: {up} up, {failed} failed, {under_way} rebooting, {waiting} waiting"


def _print(plan: Reboot, names: Names, streams: Streams, code: int, *, as_json: bool) -> None:
    verdicts = list(plan.verdicts())
    if as_json:
        for rank, (verdict, reason) in enumerate(verdicts):
            record = {"type": "node", "node": names[rank], "rank": rank, "state": verdict.value}
            _emit(streams, record | {"reason": reason or None})
        counts = {one.value: sum(verdict is one for verdict, _ in verdicts) for one in Verdict}
        _emit(streams, {"type": "summary", "nodes": len(names), **counts, "exit_code": code})
        return
    up = [rank for rank, (verdict, _) in enumerate(verdicts) if verdict is Verdict.UP]
    if up:
        streams.write(STDOUT, f"{names.fold(up)}: up\n".encode())
    for text in plan.summary(names):
        streams.write(STDERR, f"karun: {text}\n".encode("utf-8", "replace"))


def _emit(streams: Streams, record: dict[str, object]) -> None:
    streams.write(STDOUT, json.dumps(record, separators=(",", ":")).encode() + b"\n")
