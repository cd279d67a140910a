"""Equal output of many nodes, folded: who wrote the same, in memory that grows with what differs.

Pure.  Every distinct line is kept once, under a number.  A radix tree holds the distinct sequences
of lines; of a node there is only its place in the tree (two integers) and its unfinished line.
Ten thousand nodes that write the same hundred lines cost one edge of a hundred numbers.

Invariants
  * two nodes are in one group if and only if their lines are equal, in equal order;
  * how output was cut into pieces on the way makes no difference;
  * a node's place never needs the other nodes: splitting an edge moves nobody (`_settle`).

A line keeps its newline.  A last line without one is given it, as clush and dshbak do, unless the
fold is `exact`.

Not here: what a line is (karun/lines.py); names, exit codes, headers (karun/output.py).
"""

from __future__ import annotations

import difflib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from karun.lines import STDERR, STDOUT, Lines

__all__ = ["Fold", "Group", "diff"]

DIFF_LINES_MAX = 20_000
"""Lines up to which two outputs are compared line by line: a second or so."""

_INDEX = "I"
_ROOT = 0


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes with equal output, in order of rank, and where that output ends in the tree."""

    nodes: tuple[int, ...]
    place: tuple[int, int]


class _Edge:
    """A run of lines that is followed from its parent, and what may come after it."""

    __slots__ = ("children", "lines", "parent", "rest")

    def __init__(self, parent: int, lines: array[int]) -> None:
        self.parent = parent
        self.lines = lines
        self.children: dict[int, int] = {}
        """First line of each edge that goes on from here."""
        self.rest = -1
        """Where the lines went on that this edge had before it was split."""


class Fold:
    """The output of *node_count* nodes, by rank."""

    def __init__(self, node_count: int, *, exact: bool = False) -> None:
        self._exact = exact
        self._numbers: dict[bytes, int] = {}
        self._lines: list[bytes] = []
        self._edges = [_Edge(-1, array(_INDEX))]
        self._edge_of = array(_INDEX, bytes(array(_INDEX).itemsize * node_count))
        self._offset_of = array(_INDEX, self._edge_of)
        self._unfinished = Lines()
        self._tip_count = [node_count]
        """Of each edge: how many nodes are on it, or in what was split off from it."""

    @property
    def line_count(self) -> int:
        """Distinct lines kept."""
        return len(self._lines)

    @property
    def edge_count(self) -> int:
        """Edges of the tree: what distinct sequences of lines cost."""
        return len(self._edges)

    def feed(self, node: int, data: bytes, stream: int = STDOUT) -> None:
        """Take what a node wrote.  Streams are merged line by line, as their lines become whole."""
        for line in self._unfinished.feed(node, stream, data):
            self._append(node, line)

    def close(self, node: int) -> None:
        """A node writes no more: its unfinished lines are lines."""
        for stream in (STDOUT, STDERR):
            if rest := self._unfinished.close(node, stream):
                self._append(node, rest if self._exact else rest + b"\n")

    def groups(self, nodes: Iterable[int]) -> list[Group]:
        """Return the nodes grouped by equal lines: the largest group first, then by rank."""
        found: dict[tuple[int, int], list[int]] = {}
        for node in sorted(nodes):
            found.setdefault(self._settle(node), []).append(node)
        groups = [Group(tuple(members), place) for place, members in found.items()]
        return sorted(groups, key=lambda group: (-len(group.nodes), group.nodes[0]))

    def lines(self, group: Group) -> list[bytes]:
        """Return the lines of a group, each with its newline."""
        return [self._lines[number] for number in self._sequence(*group.place)]

    def is_empty(self, group: Group) -> bool:
        """Return whether a group's nodes wrote nothing."""
        return group.place == (_ROOT, 0)

    def of_node(self, node: int) -> bytes:
        """Return what one node wrote, as far as its lines are whole."""
        return b"".join(self._lines[number] for number in self._sequence(*self._settle(node)))

    def _sequence(self, edge: int, offset: int) -> Iterator[int]:
        parts = [self._edges[edge].lines[:offset]]
        while (edge := self._edges[edge].parent) >= 0:
            parts.append(self._edges[edge].lines)
        for part in reversed(parts):
            yield from part

    def _append(self, node: int, line: bytes) -> None:
        number = self._numbers.get(line)
        if number is None:
            number = self._numbers[line] = len(self._lines)
            self._lines.append(line)
        index, offset = self._settle(node)
        edge = self._edges[index]
        if offset < len(edge.lines):
            if edge.lines[offset] != number:
                self._split(index, offset)
                index, offset = self._branch(index, number), 0
        elif number in edge.children:
            index, offset = edge.children[number], 0
        elif index != _ROOT and not edge.children and self._tip_count[index] == 1:
            edge.lines.append(number)  # nobody else is here: the edge grows
        else:
            index, offset = self._branch(index, number), 0
        self._move(node, index, offset + 1)

    def _branch(self, parent: int, number: int) -> int:
        index = len(self._edges)
        self._edges.append(_Edge(parent, array(_INDEX, [number])))
        self._tip_count.append(0)
        self._edges[parent].children[number] = index
        return index

    def _split(self, index: int, offset: int) -> None:
        """Cut an edge in two.  Nodes beyond the cut find their way by `rest` (see `_settle`)."""
        edge = self._edges[index]
        lower = len(self._edges)
        rest = _Edge(index, edge.lines[offset:])
        rest.children, rest.rest = edge.children, edge.rest
        for child in rest.children.values():
            self._edges[child].parent = lower
        self._edges.append(rest)
        # Never too low: an edge believed to be shared merely branches where it could have grown.
        self._tip_count.append(self._tip_count[index])
        edge.lines, edge.rest = edge.lines[:offset], lower
        edge.children = {rest.lines[0]: lower}

    def _settle(self, node: int) -> tuple[int, int]:
        """Return a node's edge and how many of its lines it has, after any splits."""
        index, offset = self._edge_of[node], self._offset_of[node]
        while offset > len(self._edges[index].lines):
            offset -= len(self._edges[index].lines)
            index = self._edges[index].rest
        return index, offset

    def _move(self, node: int, index: int, offset: int) -> None:
        old = self._edge_of[node]
        if old != index:
            self._tip_count[old] -= 1
            self._tip_count[index] += 1
            self._edge_of[node] = index
        self._offset_of[node] = offset


def diff(fold: Fold, reference: Group, other: Group, *, names: tuple[str, str]) -> list[bytes]:
    """Return a unified diff from the reference's output to another group's, line by line."""
    left, right = fold.lines(reference), fold.lines(other)
    if max(len(left), len(right)) > DIFF_LINES_MAX:
        pairs = enumerate(zip(left, right, strict=False), start=1)
        first = next((n for n, (a, b) in pairs if a != b), min(len(left), len(right)) + 1)
        text = f"--- {names[0]}\n+++ {names[1]}\nthe outputs differ from line {first} on\n"
        return text.encode().splitlines(keepends=True)
    return list(
        difflib.diff_bytes(difflib.unified_diff, left, right, names[0].encode(), names[1].encode())
    )
