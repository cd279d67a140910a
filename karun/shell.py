"""What `karun shell` does: a prompt, and the nodes that stay connected behind it.

Two threads.  The main one has the terminal: it reads lines (karun/prompt_loop.py) and hears Ctrl-C
and ENTER while a command runs.  The other runs trio, and holds the nodes.  They meet in `_Job`s,
which the first hands over through trio's token, and in a pipe on which the second says that one is
done.  Output is printed by the second, while the first waits.

Nodes are called when they are first needed and kept; one that was lost or could not be reached is
called again by the next command for it, as after a reboot.  With a session they are its nodes,
which it keeps; only when it has ended are they looked for again, in a new one of its name.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Sequence
from time import monotonic
from typing import NoReturn

import trio

from common.errors import KaError, first_error
from common.signals import ending
from karun.crew import Crew
from karun.lines import STDERR
from karun.nodes import Names
from karun.options import Options, printing
from karun.output import Form, Printer
from karun.progress import Progress
from karun.prompt import FORMS, Settings
from karun.prompt_loop import ask, history_file, loop, with_history
from karun.running import AGAIN_S, EXIT_INTERRUPTED, InSession, Where
from karun.terminal import TERMINAL

__all__ = ["main"]

STDIN = 0


def main(where: Where | InSession) -> int:
    """Obey the prompt until its end; return the exit code of the last command."""
    settings = Settings(tuple(where.names()))
    for number in ending():
        if number != signal.SIGINT:
            signal.signal(number, _end)
    with _Nodes(where) as held:
        held.begin(_Job(settings.nodes))  # they are called while the first line is typed
        if not os.isatty(STDIN):
            return loop(settings, held.run, read=lambda _prompt: input())
        with with_history(history_file()):
            return loop(settings, held.run, read=ask)


def _end(_number: int, _frame: object) -> NoReturn:
    """Leave the prompt, and with it the nodes, whatever it is at."""
    sys.exit(EXIT_INTERRUPTED)


class _Job:
    """A command for some nodes, from one thread to the other; without a text, only call them."""

    def __init__(
        self, names: Sequence[str], text: str = "", printer: Printer | None = None
    ) -> None:
        self.names, self.text, self.printer = names, text, printer
        self.scope = trio.CancelScope()
        self.error: KaError | None = None


class _Nodes:
    """The thread that holds the nodes, seen from the other one; a context manager."""

    def __init__(self, where: Where | InSession) -> None:
        self._held = _Held(where)
        self._thread = threading.Thread(target=trio.run, args=(self._held.serve,))

    def __enter__(self) -> _Nodes:
        self._thread.start()
        self._held.there.wait()
        return self

    def __exit__(self, *_error: object) -> None:
        self._held.token.run_sync_soon(self._held.over.set)
        self._thread.join()
        self._held.close()

    def begin(self, job: _Job) -> None:
        self._held.token.run_sync_soon(self._held.begin, job)

    def run(self, settings: Settings, text: str) -> int:
        """Run a command, print, and return its exit code; raises KaError."""
        names = Names(settings.nodes)
        with printing(_options(settings), names, TERMINAL) as printer:
            job = _Job(settings.nodes, text, printer)
            self.begin(job)
            self._wait(job, Progress(names, printer.results))
            if job.error is not None:
                raise job.error
            code = printer.finish()
        return EXIT_INTERRUPTED if job.scope.cancel_called else code

    def _wait(self, job: _Job, progress: Progress) -> None:
        """Wait for the end of a job; ENTER and Ctrl-C ask how far it is, Ctrl-C twice ends it."""
        started, last = monotonic(), -AGAIN_S
        sources = [self._held.done_fd, *([STDIN] if os.isatty(STDIN) else [])]
        while True:
            try:
                ready = select.select(sources, [], [])[0]
                if self._held.done_fd in ready:
                    os.read(self._held.done_fd, 1)
                    return
                os.read(STDIN, 4096)
            except KeyboardInterrupt:
                if monotonic() - last < AGAIN_S:
                    self._held.token.run_sync_soon(job.scope.cancel)
                    continue
                last = monotonic()
            for line in progress.status(monotonic() - started):
                TERMINAL.write(STDERR, line.encode("utf-8", "replace") + b"\n")


def _options(settings: Settings) -> Options:
    form, by_line = FORMS[settings.form]
    return Options(
        command=(),
        gather=form is Form.GATHERED,
        gather_all=form is Form.GATHERED_ALL,
        by_line=by_line,
    )


class _Held:
    """The crews, on trio."""

    def __init__(self, where: Where | InSession) -> None:
        self._where = where
        self._at: dict[str, tuple[_Kept, int]] = {}
        """For each node: the crew that it is in, and its rank there."""
        self._calling = trio.Lock()
        """Held while nodes are called, so that the next job does not call them once more."""
        self.done_fd, self._tell_fd = os.pipe()
        self.there = threading.Event()
        self.token: trio.lowlevel.TrioToken
        self.over: trio.Event

    async def serve(self) -> None:
        """Hold nodes and run jobs until `over` is set."""
        self.token, self.over = trio.lowlevel.current_trio_token(), trio.Event()
        async with trio.open_nursery() as self._nursery:
            self.there.set()
            await self.over.wait()
            self._nursery.cancel_scope.cancel()

    def close(self) -> None:
        os.close(self.done_fd)
        os.close(self._tell_fd)

    def begin(self, job: _Job) -> None:
        self._nursery.start_soon(self._carry_out, job)

    async def _carry_out(self, job: _Job) -> None:
        try:
            with job.scope:
                async with self._calling:
                    await self._call([name for name in job.names if self._is_out(name)])
                if job.printer is not None:
                    await self._command(job.names, job.text, job.printer)
        except KaError as error:
            job.error = error
        finally:
            if job.printer is not None:
                os.write(self._tell_fd, b".")

    def _is_out(self, name: str) -> bool:
        if name not in self._at:
            return True
        kept, rank = self._at[name]
        return kept.crew.is_out(rank)

    async def _call(self, names: list[str]) -> None:
        if names:
            kept = _Kept(self._where.run(names))
            await self._nursery.start(kept.keep)
            self._at.update({name: (kept, rank) for rank, name in enumerate(names)})

    async def _command(self, names: Sequence[str], text: str, printer: Printer) -> None:
        places: dict[_Kept, dict[int, int]] = {}
        for place, name in enumerate(names):
            kept, rank = self._at[name]
            places.setdefault(kept, {})[rank] = place
        try:
            async with trio.open_nursery() as nursery:
                for kept, ranks in places.items():
                    nursery.start_soon(kept.command, text, _Part(printer, ranks))
        except BaseExceptionGroup as group:
            raise first_error(group) from None


class _Kept:
    """A crew that stays for many commands; a session's can end in the middle of one."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self._error: KaError | None = None
        self._ended = trio.Event()

    async def keep(self, task_status: trio.TaskStatus[None]) -> None:
        """Keep it until cancelled; raises KaError only before it is there."""
        is_there = False
        try:
            async with self.crew:
                is_there = True
                task_status.started()
                await trio.sleep_forever()
        except KaError as error:
            if not is_there:
                raise
            self._error = error
            self._ended.set()

    async def command(self, text: str, part: _Part) -> None:
        """Run a line; raises KaError when the crew ends meanwhile."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._raise_when_ended)
            await self.crew.command([text], line=True, sink=part, ranks=list(part.places))
            nursery.cancel_scope.cancel()

    async def _raise_when_ended(self) -> None:
        await self._ended.wait()
        assert self._error is not None
        raise self._error


class _Part:
    """The nodes of one crew among those that a printer knows."""

    def __init__(self, printer: Printer, places: dict[int, int]) -> None:
        self._printer = printer
        self.places = places

    def output(self, rank: int, stream: int, data: bytes) -> None:
        self._printer.output(self.places[rank], stream, data)

    def exited(self, rank: int, code: int, signal: int) -> None:
        self._printer.exited(self.places[rank], code, signal)

    def failed(self, rank: int, stage: str, reason: str) -> None:
        self._printer.failed(self.places[rank], reason, stage)
