"""Where printers write: this process's standard streams, and a file for each node.

Writes straight to descriptors, so that nothing is left in a buffer of the interpreter when the
reader of a pipe has gone.  Not here: what is written (karun/output.py).

Invariants
  * a reader that went away is noticed once and costs nothing after that;
  * a stream that somebody made non-blocking (an ssh that shares the terminal does) is waited for;
  * at most OPEN_COUNT_MAX files are open, however many nodes there are.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from common.errors import Code, KaError, from_errno
from karun.lines import STDERR, STDOUT

__all__ = ["NodeFiles", "Terminal"]

OPEN_COUNT_MAX = 256


class Terminal:
    """Standard output and error.  `before` each write a status line can be taken away."""

    def __init__(self, out_fd: int = 1, err_fd: int = 2) -> None:
        self._fds = {STDOUT: out_fd, STDERR: err_fd}
        self._gone: set[int] = set()
        self.before: Callable[[], None] | None = None

    @property
    def has_reader(self) -> bool:
        return STDOUT not in self._gone

    def is_terminal(self, stream: int) -> bool:
        return os.isatty(self._fds[stream])

    def draw(self, data: bytes) -> None:
        """Write a status line: without taking one away before, and without a fuss."""
        with contextlib.suppress(OSError):
            os.write(self._fds[STDERR], data)

    def write(self, stream: int, data: bytes) -> None:
        """Write all of it; raises KaError if the stream is full (a disk) or broken."""
        if stream in self._gone:
            return
        if self.before is not None:
            self.before()
        try:
            _write_all(self._fds[stream], data)
        except BrokenPipeError:
            self._gone.add(stream)
        except OSError as error:
            self._gone.add(stream)
            name = "output" if stream == STDOUT else "error"
            raise KaError(
                from_errno(error.errno or 0), f"cannot write to standard {name}: {error.strerror}"
            ) from None


class NodeFiles:
    """A file for each node's standard output, error or both: DIR/NAME, emptied at the start."""

    def __init__(
        self, names: Sequence[str], outdir: Path | None, errdir: Path | None = None
    ) -> None:
        """Raise KaError if a file cannot be made."""
        self._names = tuple(names)
        self._directories = {STDOUT: outdir, STDERR: errdir}
        self._open: OrderedDict[tuple[int, int], int] = OrderedDict()
        for name in names:
            if name in (".", "..") or "/" in name:
                raise KaError(Code.USAGE, f"not a name for a file: {name!r}")
        for directory in {outdir, errdir} - {None}:
            assert directory is not None
            with _told(directory):
                directory.mkdir(parents=True, exist_ok=True)
            for name in names:
                with _told(directory / name):
                    os.close(_opened(directory / name, os.O_TRUNC))

    def append(self, node: int, stream: int, data: bytes) -> None:
        """Append what a node wrote to its file, if that stream has files."""
        directory = self._directories[stream]
        if directory is None:
            return
        with _told(directory / self._names[node]):
            _write_all(self._descriptor(node, stream, directory), data)

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, node: int, stream: int, directory: Path) -> int:
        fd = self._open.pop((node, stream), None)
        if fd is None:
            if len(self._open) >= OPEN_COUNT_MAX:
                os.close(self._open.popitem(last=False)[1])
            fd = _opened(directory / self._names[node], os.O_APPEND)
        self._open[node, stream] = fd
        return fd


def _opened(path: Path, flags: int) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flags, 0o666)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KaError(
            from_errno(error.errno or 0), f"cannot write {path}: {error.strerror}"
        ) from None


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll()
