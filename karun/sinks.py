"""A file for each node, beside what is printed (--outdir, --errdir).

Not here: what is written (karun/output.py), the standard streams (karun/terminal.py).

Invariant: at most OPEN_COUNT_MAX files are open, however many nodes there are.
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.errors import Code, KaError, from_errno
from karun.lines import STDERR, STDOUT
from karun.terminal import write_all

__all__ = ["NodeFiles"]

OPEN_COUNT_MAX = 256


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
            write_all(self._descriptor(node, stream, directory), data)

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
