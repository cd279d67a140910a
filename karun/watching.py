"""What `karun top` does with its options: a watch on every node, and a table of what it tells.

Every node samples itself on the tree of agents (karun/agent/watch.py); nothing but a line of
counters a period comes up from each.  On a terminal the table is drawn over, and `q` or Ctrl-C ends
it; in a pipe each period is a table of its own, or a JSON object for each node.

Not here: rates, alarms and rows (karun/top.py), colours (karun/top_table.py).
"""

from __future__ import annotations

import json
import math
import os
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields

import trio

from common.errors import first_error
from common.signals import on_signal
from karun import nodes
from karun.crew import Crew
from karun.lines import STDOUT, Lines
from karun.output import CODE_NO_READER
from karun.results import CODE_UNREACHABLE
from karun.running import EXIT_INTERRUPTED, InSession, Where
from karun.sampler import decode
from karun.terminal import TERMINAL
from karun.top import Monitor, Rates, Row, to_text
from karun.top_table import Screen

__all__ = ["Watch", "main"]

REDRAW_S = 0.5
WIDTH = 200
"""Of a table in a pipe."""
QUIT_KEYS = b"qQ"
STDIN = 0


@dataclass(frozen=True, slots=True)
class Watch:
    """The options of `karun top`."""

    interval_s: float = 2.0
    once: bool = False
    as_json: bool = False
    sort: str = "load"
    only_alarms: bool = False


def main(where: Where | InSession, watch: Watch) -> int:
    """Watch until stopped; return the exit code.  Raises KaError for an unknown column."""
    names = where.names()
    view = _View(nodes.Names(names), watch)
    view.rows(0.0)  # what is wrong with the options is said before anybody is called
    try:
        return trio.run(_watch, where.run(names), view)
    except BaseExceptionGroup as group:
        raise first_error(group) from None


class _View:
    """The latest of every node: the sink of a watch, and its table."""

    def __init__(self, names: nodes.Names, watch: Watch) -> None:
        self.names = names
        self.watch = watch
        self._monitor = Monitor(len(names), math.inf if watch.once else watch.interval_s)
        self._lines = Lines()

    def output(self, rank: int, stream: int, data: bytes) -> None:
        for line in self._lines.feed(rank, stream, data):
            try:
                counters = decode(line.rstrip(b"\n"))
            except ValueError:  # it says why there are none
                self._monitor.failed(rank, line.decode("utf-8", "replace"))
            else:
                self._monitor.take(rank, counters, trio.current_time())

    def exited(self, rank: int, code: int, signal: int) -> None:
        if code or signal:
            how = f"signal {signal}" if signal else f"exit code {code}"
            self._monitor.failed(rank, f"its watch ended with {how}")

    def failed(self, rank: int, _stage: str, reason: str) -> None:
        self._monitor.failed(rank, reason)

    def known_count(self, now: float) -> int:
        """Return how many nodes have data."""
        ranks = range(len(self.names))
        return sum(isinstance(self._monitor.of(rank, now), Rates) for rank in ranks)

    def rows(self, now: float) -> list[Row]:
        return self._monitor.rows(now, sort=self.watch.sort, only_alarms=self.watch.only_alarms)

    def table(self, now: float) -> Iterator[str]:
        """Yield it as lines of text or of JSON."""
        if not self.watch.as_json:
            total = self._monitor.total(now)
            yield from to_text(self.rows(now), total, self.names, width=WIDTH)
            return
        for rank in range(len(self.names)):
            found = self._monitor.of(rank, now)
            values = asdict(found) if isinstance(found, Rates) else _NOTHING
            reason = found if isinstance(found, str) else None
            record = {"type": "node", "node": self.names[rank], "rank": rank, "reason": reason}
            yield json.dumps(record | values, separators=(",", ":"))
        known = self.known_count(now)
        summary = {"type": "summary", "nodes": len(self.names), "known": known}
        yield json.dumps(summary, separators=(",", ":"))

    def draw(self, screen: Screen, now: float) -> None:
        known, count = self.known_count(now), len(self.names)
        title = f"{known} of {count} nodes, every {self.watch.interval_s:g} s; q ends"
        screen.show(self.rows(now), self._monitor.total(now), self.names, title=title)


_NOTHING = {field.name: None for field in fields(Rates)}


async def _watch(run: Crew, view: _View) -> int:
    watch = view.watch
    is_over = False
    async with trio.open_nursery() as nursery:
        await nursery.start(on_signal, lambda _: nursery.cancel_scope.cancel())
        if watch.once:
            pass
        elif TERMINAL.is_terminal(STDOUT) and not watch.as_json:
            nursery.start_soon(_draw, view)
            nursery.start_soon(_read_keys, nursery.cancel_scope)
        else:
            nursery.start_soon(_print_often, view, nursery.cancel_scope)
        async with run:
            words = ["watch", str(round(watch.interval_s * 1000)), "2" if watch.once else "0"]
            await run.command(words, task=True, sink=view)
            is_over = True
        nursery.cancel_scope.cancel()
    if is_over:  # they have all told what was asked, or all are lost
        _print(view)
        complete = view.known_count(trio.current_time()) == len(view.names)
        return 0 if complete else CODE_UNREACHABLE
    if not TERMINAL.has_reader:
        return CODE_NO_READER
    return EXIT_INTERRUPTED if watch.once else 0


async def _print_often(view: _View, scope: trio.CancelScope) -> None:
    while TERMINAL.has_reader:
        await trio.sleep(view.watch.interval_s)
        if view.known_count(trio.current_time()):
            _print(view)
    scope.cancel()


def _print(view: _View) -> None:
    text = "".join(f"{line}\n" for line in view.table(trio.current_time()))
    TERMINAL.write(STDOUT, text.encode("utf-8", "replace"))


async def _draw(view: _View) -> None:
    with Screen() as screen:
        while True:
            view.draw(screen, trio.current_time())
            await trio.sleep(REDRAW_S)


async def _read_keys(scope: trio.CancelScope) -> None:
    if not os.isatty(STDIN):
        return
    with _unbuffered():
        while True:
            await trio.lowlevel.wait_readable(STDIN)
            keys = os.read(STDIN, 64)
            if not keys or set(keys) & set(QUIT_KEYS):
                scope.cancel()
                return


@contextmanager
def _unbuffered() -> Iterator[None]:
    """Have keys come one by one, without an echo; Ctrl-C stays a signal."""
    before = termios.tcgetattr(STDIN)
    tty.setcbreak(STDIN)
    try:
        yield
    finally:
        termios.tcsetattr(STDIN, termios.TCSADRAIN, before)
