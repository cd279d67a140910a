"""A barrier of an MPI program, as one node of the tree sees it.  Sans-I/O.

What is brought says which nodes it is from, so bringing it twice, or over two ways because a relay
was lost, changes nothing.  A relay waits a little for the rest of its subtree and then passes on
what it has: waiting saves messages, nothing depends on it.

A gathering is for one barrier at a time.  A later one's number makes it forget the one before, for
the head lets nobody go on before all had arrived.
"""

from __future__ import annotations

from . import frames


def world_of(payload: bytes) -> int:
    """Return the number of the program whose barrier a gathering is for; raises FrameError."""
    return frames.number(_fields(payload)[0])


class Gathering:
    """What some nodes have brought to a barrier."""

    __slots__ = ("_sent", "left", "nodes", "number", "puts", "waits")

    def __init__(self) -> None:
        self._begin(1)

    def _begin(self, number: int) -> None:
        self.number = number
        self.nodes = 0
        """A bit for each node, by its rank."""
        self.puts = b""
        self.left = -1
        """An MPI rank that is over and will be in no barrier any more; -1: none."""
        self.waits = False
        """Whether some node waits in it."""
        self._sent = 0

    def bring(self, nodes: int, puts: bytes, left: int) -> None:
        """This node has arrived, or its ranks are over."""
        self._merge(nodes, puts, left, left < 0)

    def take(self, payload: bytes, node_count: int) -> None:
        """Add what a child of a run of *node_count* has gathered; raises FrameError."""
        fields = _fields(payload)
        number = frames.number(fields[1])
        nodes = int.from_bytes(fields[2], "little")
        if nodes >> node_count:
            raise frames.FrameError(f"a gathering of more than {node_count} nodes")
        if number > self.number:
            self._begin(number)
        if number == self.number:
            self._merge(nodes, fields[3], frames.number(fields[4]), fields[5] == b"1")

    def passed(self, number: int) -> None:
        """The head lets all go on from this barrier."""
        if number >= self.number:
            self._begin(number + 1)

    def has(self, nodes: int) -> bool:
        return self.nodes & nodes == nodes

    def news(self, world: int) -> bytes | None:
        """Return what is to be passed on, unless all of it has been."""
        if self._sent == self.nodes:
            return None
        self._sent = self.nodes
        size = self.nodes.bit_length() // 8 + 1
        return frames.pack(
            world, self.number, self.nodes.to_bytes(size, "little"), self.puts, self.left,
            int(self.waits),
        )  # fmt: skip

    def forget(self) -> None:
        """What was passed on may not have arrived."""
        self._sent = 0

    def _merge(self, nodes: int, puts: bytes, left: int, waits: bool) -> None:
        if self.has(nodes):
            return
        self.nodes |= nodes
        self.puts += puts
        self.left = max(self.left, left)
        self.waits = self.waits or waits


def _fields(payload: bytes) -> list[bytes]:
    fields = frames.unpack(payload)
    if len(fields) != 6:
        raise frames.FrameError("not a gathering")
    return fields
