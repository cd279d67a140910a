"""What turns ranks into names: the one thing that printers need to know of node sets.  Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

__all__ = ["Folding"]


class Folding(Protocol):
    """Names by rank; karun.nodes.Names is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, rank: int) -> str: ...

    def fold(self, ranks: Iterable[int]) -> str:
        """Return the shortest node set for some ranks."""
