"""The scratch directory: one place for every store, so that all systems use the same disk.

It owns BASE/ka-bench and nothing else.  A lock held for the life of a run says that it is in use;
whatever lies there while the lock is free was left by a run that was killed, and is removed by the
next one.  Only files can be left: processes and mounts live in namespaces that end with the run
(cell.py).
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import Code, KaError

__all__ = ["scratch"]

_NAME = "ka-bench"
_LOCK = "lock"


@contextmanager
def scratch(base: Path) -> Iterator[Path]:
    """Hold an empty scratch directory under *base*; remove it at the end.

    Raises KaError(EBUSY) while another run holds it.
    """
    directory = base / _NAME
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Not inheritable: a daemon that survived by accident must not keep the lock.
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise KaError(Code.USAGE, f"cannot use {directory}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise KaError(
                Code.EBUSY, f"another benchmark is using {directory}; wait, or give --scratch"
            ) from None
        _remove_leftovers(directory)
        try:
            yield directory
        finally:
            _remove_leftovers(directory)
            shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(lock)


def _remove_leftovers(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.name == _LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
