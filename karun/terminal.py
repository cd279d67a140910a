"""This process's standard output and error, where printers write.

Writes straight to descriptors, so that nothing is left in a buffer of the interpreter when the
reader of a pipe has gone.  Imports builtin and C modules only, for the sake of karun/client.py.
Not here: what is written (karun/output.py), files (karun/sinks.py).

Invariants
  * a reader that went away is noticed once and costs nothing after that;
  * a stream that somebody made non-blocking (an ssh that shares the terminal does) is waited for.
"""

from __future__ import annotations

import os
import select

from karun.lines import STDERR, STDOUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["TERMINAL", "Terminal", "write_all"]


class Terminal:
    """Standard output and error.  `before` each write a status line can be taken away."""

    def __init__(self, out_fd: int = 1, err_fd: int = 2) -> None:
        self._fds = {STDOUT: out_fd, STDERR: err_fd}
        self._gone: set[int] = set()
        self.before: Callable[[], None] | None = None

    @property
    def environment(self) -> Mapping[str, str]:
        """What says whether to use colours."""
        return os.environ

    @property
    def has_reader(self) -> bool:
        return STDOUT not in self._gone

    def is_terminal(self, stream: int) -> bool:
        return os.isatty(self._fds[stream])

    def draw(self, data: bytes) -> None:
        """Write a status line: without taking one away before, and without a fuss."""
        try:
            os.write(self._fds[STDERR], data)
        except OSError:
            pass

    def write(self, stream: int, data: bytes) -> None:
        """Write all of it; raises KaError if the stream is full (a disk) or broken."""
        if stream in self._gone:
            return
        if self.before is not None:
            self.before()
        try:
            write_all(self._fds[stream], data)
        except BrokenPipeError:
            self._gone.add(stream)
        except OSError as error:
            from common.errors import KaError, from_errno

            self._gone.add(stream)
            name = "output" if stream == STDOUT else "error"
            raise KaError(
                from_errno(error.errno or 0), f"cannot write to standard {name}: {error.strerror}"
            ) from None


def write_all(fd: int, data: bytes) -> None:
    """Write all of it, waiting if need be; raises OSError."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll()


TERMINAL = Terminal()
