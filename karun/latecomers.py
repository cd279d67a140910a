"""Nodes that cannot be reached yet, as while they boot: who is called again, and who came.  Pure.

A call that failed is made again every `AGAIN_S`, until the patience of the run is over.  What time
does not mend, such as a host key that is wrong, is no reason to wait (`reasons.may_pass`).
"""

from __future__ import annotations

__all__ = ["AGAIN_S", "Latecomers"]

AGAIN_S = 2.0


class Latecomers:
    """Those of one run."""

    def __init__(self, patience_s: float) -> None:
        """*patience_s*: from the launch; 0: none, whoever is not reached is given up."""
        self.patience_s = patience_s
        self.came_s: dict[int, float] = {}
        """By rank of those that came after all: how long after the launch."""
        self._is_over = not patience_s
        self._missing: dict[int, tuple[str, str]] = {}

    def missed(self, rank: int, stage: str, reason: str) -> bool:
        """A call has failed; return whether it is to be made again."""
        if not self._is_over:
            self._missing[rank] = stage, f"{reason} (for {self.patience_s:g} s)"
        return not self._is_over

    def attached(self, rank: int, seconds: float) -> None:
        """A node is there, so long after the launch."""
        if self._missing.pop(rank, None) is not None:
            self.came_s[rank] = seconds

    def end(self) -> list[tuple[int, str, str]]:
        """The patience is over; return (rank, stage, reason) of those that have not come."""
        self._is_over = True
        return [(rank, *why) for rank, why in self._missing.items()]
