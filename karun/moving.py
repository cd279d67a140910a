"""What `karun copy` and `karun gather` do with their options: a run, progress, a report.

Progress is one line that is written over on a terminal, and a single line at the end in a pipe.
Then a line for each reason why nodes failed, with those nodes.  Ctrl-C stops everything: what is
incomplete on nodes stays, and the next copy goes on with it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio

from common.config import format_size
from common.errors import first_error
from common.signals import on_signal
from karun import nodes
from karun.api import Copied, CopyOptions, Step
from karun.connectors import WINDOWS
from karun.copied import exit_code, report
from karun.crew import Crew
from karun.lines import STDERR, STDOUT
from karun.running import EXIT_INTERRUPTED, InSession, Where
from karun.terminal import TERMINAL
from karun.windows_nodes import WindowsNodes

__all__ = ["Form", "copy", "gather"]

INTERVAL_S = 0.2

OnStep = Callable[[Step], None]


@dataclass(frozen=True, slots=True)
class Form:
    """How it is told."""

    as_json: bool = False
    quiet: bool = False


def copy(
    where: Where | InSession,
    sources: Sequence[str],
    destination: str,
    options: CopyOptions,
    form: Form,
) -> int:
    """Copy; return the exit code.  Raises KaError for what is wrong with the sources."""
    if isinstance(where, Where) and where.via == WINDOWS:
        run: Crew | WindowsNodes = where.windows(where.names())
    else:
        run = where.crew()

    def print_output(rank: int, data: bytes) -> None:
        label = f"{run.nodes[rank]}: ".encode()
        lines = data.splitlines(keepends=True)
        TERMINAL.write(STDERR, b"".join(label + line for line in lines))

    async def act(on_progress: OnStep) -> list[Copied]:
        return await run.copy(
            sources, destination, options=options, on_progress=on_progress, on_output=print_output
        )

    return trio.run(_act, run, act, form)


def gather(where: Where | InSession, source: str, directory: str, form: Form, *, sudo: bool) -> int:
    """Gather; return the exit code.  Raises KaError for what is wrong with the directory."""
    run = where.crew()

    async def act(on_progress: OnStep) -> list[Copied]:
        return await run.gather(source, directory, sudo=sudo, on_progress=on_progress)

    return trio.run(_act, run, act, form)


async def _act(
    run: Crew | WindowsNodes, act: Callable[[OnStep], Awaitable[list[Copied]]], form: Form
) -> int:
    meter = _Meter(is_shown=not form.quiet and TERMINAL.is_terminal(STDERR))
    results: list[Copied] | None = None
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(on_signal, lambda _: nursery.cancel_scope.cancel())
            async with run:
                results = await act(meter.told)
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise first_error(group) from None
    finally:
        meter.clear()
    if results is None:
        return EXIT_INTERRUPTED
    if form.as_json:
        for result in results:
            TERMINAL.write(STDOUT, json.dumps(_facts(result)).encode() + b"\n")
    lines = report(results, nodes.Names(run.nodes))
    if not form.quiet:
        lines.append(meter.summary(results))
    TERMINAL.write(STDERR, "".join(f"karun: {line}\n" for line in lines).encode())
    return exit_code(results)


def _facts(result: Copied) -> dict[str, str | bool]:
    facts: dict[str, str | bool] = {"node": result.node, "ok": result.reason is None}
    if result.reason is not None:
        facts["reason"] = result.reason
    if result.note:
        facts["note"] = result.note
    return facts


class _Meter:
    """The line of progress, and the one at the end."""

    def __init__(self, *, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._begun_s = time.monotonic()
        self._first_s = 0.0
        """When the first bytes were told of."""
        self._next_s = 0.0
        self._width = 0
        self._step: Step | None = None

    def told(self, step: Step) -> None:
        now = time.monotonic()
        if not self._first_s and step.total_size:
            self._first_s = now
        self._step = step
        if self._is_shown and now >= self._next_s:
            self._next_s = now + INTERVAL_S
            self._show(self._line(step, now))

    def clear(self) -> None:
        if self._width:
            self._show("")
            TERMINAL.write(STDERR, b"\r")

    def summary(self, results: Sequence[Copied]) -> str:
        good = sum(result.reason is None for result in results)
        seconds = time.monotonic() - self._begun_s
        size = f", {format_size(self._step.size)} each" if self._step and self._step.size else ""
        return f"{good} of {len(results)} nodes{size}, in {seconds:.1f} s"

    def _line(self, step: Step, now: float) -> str:
        line = f"{step.name}: {step.done_count} of {step.node_count} nodes done"
        rate = step.total_size / max(now - self._first_s, INTERVAL_S) if self._first_s else 0.0
        if step.size:
            mean = step.total_size / step.node_count
            line += f", {100 * mean / step.size:.0f} % of {format_size(step.size)}"
            rate /= step.node_count
        else:
            line += f", {format_size(step.total_size)}"
        return f"{line}, {rate / 1e6:.1f} MB/s"

    def _show(self, line: str) -> None:
        TERMINAL.write(STDERR, f"\r{line:{self._width}}".encode())
        self._width = len(line)
