"""One test worker at a time: what several need is made once, and found whole by the others."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["alone"]


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Wait until no other worker makes something in a directory."""
    with open(directory / "lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
