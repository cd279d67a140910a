"""What the tests of karun share."""

from __future__ import annotations

from collections import Counter

__all__ = ["Collect"]


class Collect:
    """Keeps all that it is told."""

    def __init__(self) -> None:
        self.outputs: dict[tuple[int, int], bytes] = {}
        self.told: Counter[int] = Counter()
        self.failures: dict[int, tuple[str, str]] = {}

    def output(self, rank: int, stream: int, data: bytes) -> None:
        assert not self.told[rank], "output after the end"
        self.outputs[rank, stream] = self.outputs.get((rank, stream), b"") + data

    def exited(self, rank: int, code: int, signal: int) -> None:
        self.told[rank] += 1

    def failed(self, rank: int, stage: str, reason: str) -> None:
        self.told[rank] += 1
        self.failures[rank] = (stage, reason)
