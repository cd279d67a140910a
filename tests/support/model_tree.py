"""A deliberately dumb second name space: nodes and dictionaries, every rule spelled out."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.errors import Code
from nfsp.model import ROOT

KINDS = ("file", "dir", "link")


@dataclass
class Node:
    kind: str
    size: int = 0
    names: dict[bytes, int] = field(default_factory=dict)
    """A directory's entries."""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    removed: bool = False
    """Without a name, alive because somebody has it open."""


class ModelTree:
    """Each operation returns None, or the error it is refused with and then changes nothing."""

    def __init__(self) -> None:
        self.nodes = {ROOT: Node("dir")}
        self.opens: set[tuple[int, int]] = set()
        """(session, ino)."""

    def places(self, ino: int) -> list[tuple[int, bytes]]:
        """Return every (directory, name) of an inode."""
        return [
            (parent, name)
            for parent, node in self.nodes.items()
            for name, child in node.names.items()
            if child == ino
        ]

    def parent_of(self, ino: int) -> int:
        return ROOT if ino == ROOT else self.places(ino)[0][0]

    def is_below(self, ino: int, top: int) -> bool:
        """Say whether a directory is *top* or lies somewhere under it."""
        while ino not in (top, ROOT):
            ino = self.parent_of(ino)
        return ino == top

    def check_dir(self, ino: int) -> Code | None:
        if ino not in self.nodes:
            return Code.ESTALE
        if self.nodes[ino].kind != "dir":
            return Code.ENOTDIR
        return Code.ENOENT if self.nodes[ino].removed else None

    def create(self, parent: int, name: bytes, kind: str) -> Code | None:
        """Say whether it may be made; `made` makes it, with the number it got."""
        error = self.check_dir(parent)
        if error is None and name in self.nodes[parent].names:
            error = Code.EEXIST
        return error

    def made(self, parent: int, name: bytes, kind: str, ino: int) -> None:
        assert ino > max(self.nodes)
        self.nodes[ino] = Node(kind, 1 if kind == "link" else 0)
        self.nodes[parent].names[name] = ino

    def link(self, ino: int, parent: int, name: bytes) -> Code | None:
        if ino not in self.nodes:
            return Code.ESTALE
        error = self.check_dir(parent)
        if error is not None:
            return error
        if name in self.nodes[parent].names:
            return Code.EEXIST
        if self.nodes[ino].kind == "dir":
            return Code.EPERM
        if self.nodes[ino].removed:
            return Code.ENOENT
        self.nodes[parent].names[name] = ino
        return None

    def remove(self, parent: int, name: bytes, *, directory: bool) -> Code | None:
        error = self.check_dir(parent)
        if error is not None:
            return error
        ino = self.nodes[parent].names.get(name)
        if ino is None:
            return Code.ENOENT
        node = self.nodes[ino]
        if directory != (node.kind == "dir"):
            return Code.ENOTDIR if directory else Code.EISDIR
        if node.names:
            return Code.ENOTEMPTY
        del self.nodes[parent].names[name]
        self.collect()
        return None

    def rename(self, parent: int, name: bytes, to: int, new_name: bytes, flags: int) -> Code | None:
        error = self.check_dir(parent) or self.check_dir(to)
        if error is not None:
            return error
        here, there = self.nodes[parent].names, self.nodes[to].names
        source, target = here.get(name), there.get(new_name)
        if source is None:
            return Code.ENOENT
        if flags == 1 and target is not None:
            return Code.EEXIST
        if self.nodes[source].kind == "dir" and self.is_below(to, source):
            return Code.EINVAL
        if flags == 2:
            if target is None:
                return Code.ENOENT
            if self.nodes[target].kind == "dir" and self.is_below(parent, target):
                return Code.EINVAL
            here[name], there[new_name] = target, source
            return None
        if source == target:
            return None
        if target is not None:
            from_dir, to_dir = (self.nodes[ino].kind == "dir" for ino in (source, target))
            if from_dir != to_dir:
                return Code.ENOTDIR if from_dir else Code.EISDIR
            if self.nodes[target].names:
                return Code.ENOTEMPTY
        there[new_name] = source
        del here[name]
        self.collect()
        return None

    def set_size(self, ino: int, size: int, *, grow_only: bool) -> Code | None:
        if ino not in self.nodes:
            return Code.ESTALE
        node = self.nodes[ino]
        if node.kind != "file":
            return Code.EISDIR if node.kind == "dir" else Code.EINVAL
        node.size = max(node.size, size) if grow_only else size
        return None

    def set_xattr(self, ino: int, name: bytes, value: bytes | None) -> Code | None:
        if ino not in self.nodes:
            return Code.ESTALE
        node = self.nodes[ino]
        if value is None:
            return None if node.xattrs.pop(name, None) is not None else Code.ENODATA
        if node.kind == "link" and name.startswith(b"user."):
            return Code.EPERM
        node.xattrs[name] = value
        return None

    def open(self, session: int, ino: int, *, writable: bool) -> Code | None:
        if ino not in self.nodes:
            return Code.ESTALE
        if writable and self.nodes[ino].kind != "file":
            return Code.EISDIR if self.nodes[ino].kind == "dir" else Code.EINVAL
        self.opens.add((session, ino))
        return None

    def close(self, session: int, ino: int) -> None:
        self.opens.discard((session, ino))
        self.collect()

    def end(self, session: int) -> None:
        self.opens = {(who, ino) for who, ino in self.opens if who != session}
        self.collect()

    def collect(self) -> None:
        """Drop what has no name and is open nowhere."""
        opened = {ino for _, ino in self.opens}
        for ino, node in list(self.nodes.items()):
            if ino != ROOT and not self.places(ino):
                node.removed = True
                if ino not in opened:
                    del self.nodes[ino]
