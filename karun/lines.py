"""Bytes of many nodes to whole lines, node by node and stream by stream.  Pure.

Invariants
  * how the bytes were cut on the way makes no difference to the lines;
  * at most LINE_SIZE_MAX bytes are held for a stream: a longer line comes in pieces of that size,
    none of them but the last with a newline.
"""

from __future__ import annotations

__all__ = ["LINE_SIZE_MAX", "STDERR", "STDOUT", "Lines"]

LINE_SIZE_MAX = 64 << 10
STDOUT, STDERR = 1, 2


class Lines:
    """What every stream has begun to write and not yet ended with a newline."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], bytearray] = {}

    def feed(self, node: int, stream: int, data: bytes) -> list[bytes]:
        """Return the lines that are whole now, each with its newline."""
        held = self._held.get((node, stream))
        if held is not None:
            held += data
            if b"\n" not in data and len(held) < LINE_SIZE_MAX:
                return []
            data = bytes(held)
            del self._held[node, stream]
        found = []
        begin = 0
        while begin < len(data):
            limit = begin + LINE_SIZE_MAX
            end = data.find(b"\n", begin, limit) + 1
            if end == 0:
                if len(data) < limit:
                    self._held[node, stream] = bytearray(data[begin:])
                    break
                end = limit
            found.append(data[begin:end])
            begin = end
        return found

    def close(self, node: int, stream: int) -> bytes:
        """Return the last line if no newline ended it; the stream writes no more."""
        return bytes(self._held.pop((node, stream), b""))
