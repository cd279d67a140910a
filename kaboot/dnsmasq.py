"""dnsmasq under supervision: started, listened to, started again.

Owns the process.  When it ends by itself it is started again, after a pause that doubles up to
`PAUSE_S_MAX`; if it never ran at all, its last line is an error for the administrator.  It dies
with this process, whatever kills it: two of them on one network would be a mess.

Its lines go through a bounded queue: dnsmasq stands still when nobody reads them, and so would DHCP
if the store were slow.  When the queue is full, lines are lost, and counted.

Tasks: `run`, with one that listens and one that hands on; `restart` and `reread` may be called from
others.
Not here: its configuration (dhcp.py) and what its lines mean (dnsmasq_log.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from common import log
from common.errors import Code, KaError
from kaboot.check import find_dnsmasq

__all__ = ["Dnsmasq"]

PAUSE_S_MIN, PAUSE_S_MAX = 0.5, 30.0
LIVED_S = 30.0
"""Who lived so long had no trouble at its start: the pause is short again."""
STOP_TIMEOUT_S = 3.0
LINE_SIZE_MAX = 4096
LINES_MAX = 20_000

_log = log.get("kaboot.dnsmasq")


class Dnsmasq:
    """A supervised dnsmasq with a configuration file."""

    def __init__(self, config: Path, on_line: Callable[[str], Awaitable[None]]) -> None:
        program = find_dnsmasq()
        if program is None:
            raise KaError(Code.USAGE, "dnsmasq is not installed (Debian: dnsmasq-base)")
        self._command = [
            # A death signal of its own, for it must not outlive us even if we are killed.
            "setpriv",
            "--pdeathsig=TERM",
            "--",
            program,
            "--keep-in-foreground",
            "--log-facility=-",
            f"--conf-file={config}",
            f"--pid-file={config.with_suffix('.pid')}",
        ]
        self._on_line = on_line
        self._lines, self._waiting = trio.open_memory_channel[str](LINES_MAX)
        self._lost = 0
        self._last = "it said nothing"
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted_restart = False
        self.started = trio.Event()
        """Set when it has said that it runs."""

    async def run(self) -> None:
        """Keep it running until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hand_on)
            await self._supervise()

    async def _hand_on(self) -> None:
        async for line in self._waiting:
            await self._on_line(line)

    async def _supervise(self) -> None:
        pause_s = PAUSE_S_MIN
        while True:
            begin = trio.current_time()
            await self._once()
            if not self.started.is_set():
                raise KaError(Code.USAGE, f"dnsmasq does not start: {self._last}")
            if self._wanted_restart:
                self._wanted_restart = False
                continue
            if trio.current_time() - begin > LIVED_S:
                pause_s = PAUSE_S_MIN
            _log.error("dnsmasq.ended", again_in_s=pause_s)
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_S_MAX)

    def restart(self) -> None:
        """Start it anew with the configuration as it is now."""
        if self._process is not None:
            self._wanted_restart = True
            self._process.terminate()

    def reread(self) -> None:
        """Let it read the hosts file again."""
        if self._process is not None:
            self._process.send_signal(signal.SIGHUP)

    async def _once(self) -> None:
        # Started in this thread, which lives as long as the process: the kernel ties the death
        # signal to the thread that started it.
        process = subprocess.Popen(  # noqa: ASYNC220
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert process.stderr is not None
        self._process = process
        try:
            # The stream owns a descriptor of its own.
            fd = process.stderr.fileno()
            async with trio.lowlevel.FdStream(os.dup(fd)) as stream:
                process.stderr.close()
                await self._listen(stream)
            await trio.to_thread.run_sync(process.wait)
        finally:
            self._process = None
            with trio.CancelScope(shield=True):
                await _end(process)

    async def _listen(self, stream: trio.lowlevel.FdStream) -> None:
        rest = b""
        async for data in stream:
            *lines, rest = (rest + data).split(b"\n")
            rest = rest[:LINE_SIZE_MAX]
            for line in lines:
                text = self._last = line[:LINE_SIZE_MAX].decode("utf-8", "replace").strip()
                _log.debug("dnsmasq.says", line=text)
                if "started, version" in text:
                    self.started.set()
                elif "FAILED" in text or text.startswith("dnsmasq: failed"):
                    _log.error("dnsmasq.failed", line=text)
                try:
                    self._lines.send_nowait(text)
                except trio.WouldBlock:
                    self._lost += 1
                    if self._lost.bit_count() == 1:  # 1, 2, 4, 8 ...
                        _log.warning("dnsmasq.lines_lost", count=self._lost)


async def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        with trio.move_on_after(STOP_TIMEOUT_S):
            await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
