"""How far a run is: a status line while it goes on, and whom it waits for when asked.  Pure.

`Progress` makes the words; `StatusLine` draws them at the foot of a terminal and takes them away
before anything else is written.  A run shorter than APPEAR_S shows nothing; in a pipe nothing is
drawn at all, and the words are lines when somebody asks (ENTER, Ctrl-C).

Not here: the clock (`now` is given) and the terminal's descriptor (a callable is).
"""

from __future__ import annotations

from collections.abc import Callable

from karun.naming import Folding
from karun.results import Results

__all__ = ["Progress", "StatusLine"]

APPEAR_S = 1.0
REDRAW_S = 0.3
WAITING_COUNT_MAX = 1000
"""Nodes named when asked whom a run waits for: folding more unlike names takes too long."""


class Progress:
    """What is known of a run, in words."""

    def __init__(self, names: Folding, results: Results) -> None:
        self._names = names
        self._results = results
        self.sent_size = 0
        """Bytes of standard input sent to the nodes."""

    def line(self, elapsed_s: float) -> str:
        """Return the status line: `karun: 7/12 done, 1 bad, 5 s`."""
        parts = [f"{self._results.done_count}/{len(self._names)} done"]
        if self._results.bad_count:
            parts.append(f"{self._results.bad_count} bad")
        if self.sent_size:
            rate = self.sent_size / elapsed_s if elapsed_s > 0 else 0.0
            parts.append(f"{_size(self.sent_size)} sent ({_size(rate)}/s)")
        return f"karun: {', '.join(parts)}, {elapsed_s:.0f} s"

    def status(self, elapsed_s: float) -> list[str]:
        """Return the lines that answer: which nodes are we waiting for?"""
        waiting = self._results.waiting()
        if not waiting:
            return [self.line(elapsed_s)]
        text = self._names.fold(waiting[:WAITING_COUNT_MAX])
        more = len(waiting) - WAITING_COUNT_MAX
        rest = f" and {more} more" if more > 0 else ""
        return [self.line(elapsed_s), f"karun: waiting for {len(waiting)}: {text}{rest}"]


class StatusLine:
    """The last line of a terminal, which is there only while nothing else is written."""

    def __init__(self, write: Callable[[bytes], None], *, started: float, columns: int) -> None:
        self._write = write
        self._columns = columns
        self._due = started + APPEAR_S
        self._shown = ""

    def update(self, now: float, text: str) -> None:
        """Show a text if it is news and the last one was long enough ago."""
        text = text[: self._columns - 1]
        if now >= self._due and text != self._shown:
            self._write(b"\r\x1b[K" + text.encode("utf-8", "replace"))
            self._shown = text
            self._due = now + REDRAW_S

    def clear(self) -> None:
        """Make way for a line of output."""
        if self._shown:
            self._write(b"\r\x1b[K")
            self._shown = ""


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
