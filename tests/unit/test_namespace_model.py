"""The name space does what a naive in-memory tree does, whatever the order of operations."""

from __future__ import annotations

import stat
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from common.errors import Code, KaError
from nfsp import wire
from nfsp.mds import xattrs
from nfsp.model import ROOT
from tests.support.model_tree import KINDS, ModelTree
from tests.support.space import Space, refused

MODES = {"file": stat.S_IFREG, "dir": stat.S_IFDIR, "link": stat.S_IFLNK}

PICKS = st.integers(0, 1 << 16)
"""Which of the inodes ever made, dead ones too, with a liking for directories."""
NAMES = st.sampled_from([b"a", b"b", b"c"])
SESSIONS = st.sampled_from([1, 2, 3])
SIZES = st.integers(0, 4)
ATTRIBUTES = st.sampled_from([b"user.a", b"trusted.b"])


class NamespaceMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.space = Space()
        self.model = ModelTree()
        self.seen = [ROOT]
        # A tree to start from: most of the steps then find something to work on.
        for parent, name, kind in (
            (0, b"a", "dir"),
            (0, b"b", "dir"),
            (1, b"a", "dir"),
            (1, b"b", "file"),
            (2, b"b", "link"),
            (3, b"c", "file"),
        ):
            self.make(self.seen[parent], name, kind, False)

    def any_ino(self, pick: int) -> int:
        return self.seen[pick % len(self.seen)]

    def some_dir(self, pick: int) -> int:
        """Mostly a living directory."""
        living = [ino for ino, node in self.model.nodes.items() if node.kind == "dir"]
        return self.any_ino(pick >> 4) if pick % 16 == 0 else living[pick % len(living)]

    def some_place(self, pick: int, name: bytes) -> tuple[int, bytes]:
        """Mostly a name that exists."""
        entries = [
            (parent, name) for parent, node in self.model.nodes.items() for name in node.names
        ]
        if entries and pick % 4:
            return entries[(pick >> 2) % len(entries)]
        return self.some_dir(pick >> 2), name

    def agree(self, expected: Code | None, operation: Callable[[], object]) -> None:
        before = dict(self.space.view.records)
        answer = None
        try:
            operation()
        except KaError as error:
            answer = error.code
        assert answer is expected
        assert answer is None or self.space.view.records == before

    @rule(pick=PICKS, name=NAMES, kind=st.sampled_from(KINDS), opened=st.booleans())
    def create(self, pick: int, name: bytes, kind: str, opened: bool) -> None:
        self.make(self.some_dir(pick), name, kind, opened)

    def make(self, parent: int, name: bytes, kind: str, opened: bool) -> None:
        target = b"t" if kind == "link" else b""
        expected = self.model.create(parent, name, kind)

        def operation() -> None:
            mode = MODES[kind] | 0o755
            made = self.space.create(parent, name, mode, target=target, open=opened, exclusive=True)
            self.model.made(parent, name, kind, made.ino)
            self.seen.append(made.ino)
            if opened and kind == "file":
                self.model.opens.add((self.space.session, made.ino))

        self.agree(expected, operation)

    @rule(pick=PICKS, to=PICKS, name=NAMES)
    def link(self, pick: int, to: int, name: bytes) -> None:
        ino, parent = self.any_ino(pick), self.some_dir(to)
        expected = self.model.link(ino, parent, name)
        self.agree(expected, lambda: self.space.link(ino, parent, name))

    @rule(pick=PICKS, name=NAMES, directory=st.booleans())
    def remove(self, pick: int, name: bytes, directory: bool) -> None:
        parent, name = self.some_place(pick, name)
        expected = self.model.remove(parent, name, directory=directory)
        operation = self.space.rmdir if directory else self.space.unlink
        self.agree(expected, lambda: operation(parent, name))

    @rule(
        pick=PICKS, name=NAMES, to=PICKS, new_name=NAMES, flags=st.sampled_from([0, 0, 0, 1, 2, 2])
    )
    def rename(self, pick: int, name: bytes, to: int, new_name: bytes, flags: int) -> None:
        ends = (*self.some_place(pick, name), *self.some_place(to, new_name), flags)
        expected = self.model.rename(*ends)
        self.agree(expected, lambda: self.space.rename(*ends))

    @rule(pick=PICKS, size=SIZES, truncate=st.booleans())
    def resize(self, pick: int, size: int, truncate: bool) -> None:
        ino = self.any_ino(pick)
        expected = self.model.set_size(ino, size, grow_only=not truncate)
        operation = self.space.truncate if truncate else self.space.wrote
        self.agree(expected, lambda: operation(ino, size))
        self.space.finish_trims()

    @rule(pick=PICKS, name=ATTRIBUTES, value=st.none() | st.just(b"v"))
    def set_xattr(self, pick: int, name: bytes, value: bytes | None) -> None:
        ino = self.any_ino(pick)
        expected = self.model.set_xattr(ino, name, value)
        if value is None:
            self.agree(expected, lambda: self.space.remove_xattr(ino, name))
        else:
            self.agree(expected, lambda: self.space.set_xattr(ino, name, value))

    @rule(session=SESSIONS, pick=PICKS, writable=st.booleans())
    def open(self, session: int, pick: int, writable: bool) -> None:
        self.space.session, ino = session, self.any_ino(pick)
        expected = self.model.open(session, ino, writable=writable)
        self.agree(expected, lambda: self.space.open(ino, writable))

    @rule(session=SESSIONS, pick=PICKS)
    def close(self, session: int, pick: int) -> None:
        self.space.session, ino = session, self.any_ino(pick)
        self.model.close(session, ino)
        self.space.close(ino)

    @rule(session=SESSIONS)
    def expire(self, session: int) -> None:
        self.model.end(session)
        self.space.expire(session)
        self.space.finish_trims()

    @invariant()
    def trees_are_equal(self) -> None:
        for ino in self.seen:
            node = self.model.nodes.get(ino)
            if node is None:
                with refused(Code.ESTALE):
                    self.space.inode(ino)
                continue
            inode = self.space.inode(ino)
            assert inode.mode & 0o170000 == MODES[node.kind]
            assert (inode.nlink == 0) == node.removed
            if node.kind == "dir":
                assert {entry.name: entry.ino for entry in self.space.entries(ino)} == node.names
            else:
                assert inode.size == node.size
            listed = xattrs.list_xattr(self.space.view, wire.ListXattr(ino)).names
            assert listed == sorted(node.xattrs)
        self.space.check()

    def teardown(self) -> None:
        """Everything closed and removed, nothing remains but the root and what is to be purged."""
        for session in (1, 2, 3):
            self.model.end(session)
            self.space.expire(session)
        for ino in sorted(self.model.nodes, key=lambda ino: -self.depth(ino)):
            for name, child in dict(self.model.nodes[ino].names).items():
                directory = self.model.nodes[child].kind == "dir"
                assert self.model.remove(ino, name, directory=directory) is None
                (self.space.rmdir if directory else self.space.unlink)(ino, name)
        for name in self.model.nodes[ROOT].xattrs:
            self.space.remove_xattr(ROOT, name)
        self.space.check()
        left = {key[:1] for key in self.space.view.records} - {b"m", b"p", b"s"}
        assert left == {b"i"}
        assert self.space.inode(ROOT).nlink == 2

    def depth(self, ino: int) -> int:
        return 0 if ino == ROOT else 1 + self.depth(self.model.parent_of(ino))


TestNamespace = NamespaceMachine.TestCase
TestNamespace.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
