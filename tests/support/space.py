"""A name space one can use: pure operations, a memory view, and a server's table of open files."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from common.errors import Code, KaError
from nfsp import wire
from nfsp.mds import attributes, create, namespace, queues, rename, sessions, xattrs
from nfsp.mds.placement import Placement
from nfsp.mds.view import Context, Effect, Opened, Outcome, PurgeReady, TrimReady
from nfsp.model import ROOT, Chain, ClusterMap, Dentry, Inode, Iod, Layout, Superblock
from tests.support.checker import check
from tests.support.memory_view import MemoryView

START_NS = 1_000_000_000
CLUSTER_MAP = ClusterMap(
    1,
    tuple(Iod(iod, f"host{iod}:1", "", "up") for iod in (1, 2, 3)),
    tuple(Chain(chain, 1, (chain,)) for chain in (1, 2, 3)),
)
SUPERBLOCK = Superblock(1, b"u" * 16, "lab", 0, START_NS, Layout(1 << 20, 0, 1, ()))


class Space:
    """Runs operations as the server does: decide, apply, note what is open."""

    def __init__(self, cluster_map: ClusterMap = CLUSTER_MAP) -> None:
        self.view = MemoryView()
        self.now_ns = START_NS
        self.session = 1
        self.opens: dict[tuple[int, int], bool] = {}
        """(session, ino): writable."""
        self.table_complete = True
        """After a restart: have all sessions told what they have open?"""
        self.effects: tuple[Effect, ...] = ()
        """Follow-ups of the last operation, without Opened."""
        self.placement = Placement(SUPERBLOCK.layout, cluster_map)
        self.view.apply(create.mkfs(SUPERBLOCK, cluster_map, now_ns=START_NS))

    def context(self) -> Context:
        return Context(
            self.session,
            self.now_ns,
            lambda ino: not self.table_complete or any(at == ino for _, at in self.opens),
            lambda ino: not self.table_complete
            or any(at == ino and writable for (_, at), writable in self.opens.items()),
            self.placement,
        )

    def settle(self, writes: dict[bytes, bytes | None], effects: tuple[Effect, ...]) -> None:
        """Do what the server does with an outcome."""
        self.view.apply(writes)
        for effect in effects:
            if isinstance(effect, Opened):
                key = (self.session, effect.ino)
                self.opens[key] = self.opens.get(key, False) or effect.writable
        self.effects = tuple(effect for effect in effects if not isinstance(effect, Opened))

    def do(self, operation: Callable[..., Outcome], message: Any) -> Any:
        self.now_ns += 1
        outcome = operation(self.view, message, self.context())
        self.settle(outcome.writes, outcome.follow_up)
        return outcome.reply

    def check(self) -> None:
        check(self.view)

    # ------------------------------------------------------------ reading

    def lookup(self, parent: int, name: bytes) -> Inode:
        return Inode.decode(namespace.lookup(self.view, wire.Lookup(parent, name)).inode)

    def inode(self, ino: int) -> Inode:
        return Inode.decode(namespace.get_attr(self.view, wire.GetAttr(ino)).inode)

    def entries(self, ino: int, cookie: int = 0, count_max: int = 1000) -> list[Dentry]:
        reply = namespace.read_dir(self.view, wire.ReadDir(ino, cookie, count_max))
        found = [(name, at, Inode.decode(record)) for name, at, record in reply.entries]
        return [Dentry(name, inode.ino, inode.mode >> 12, at) for name, at, inode in found]

    def names(self, ino: int = ROOT) -> set[bytes]:
        return {dentry.name for dentry in self.entries(ino)}

    def get_xattr(self, ino: int, name: bytes) -> bytes:
        return xattrs.get_xattr(self.view, wire.GetXattr(ino, name), self.context()).value

    def xattr_names(self, ino: int) -> set[bytes]:
        return set(xattrs.list_xattr(self.view, wire.ListXattr(ino)).names)

    # ------------------------------------------------------------ changing

    def create(
        self,
        parent: int,
        name: bytes,
        mode: int = stat.S_IFREG | 0o644,
        *,
        uid: int = 0,
        gid: int = 0,
        umask: int = 0,
        rdev: int = 0,
        target: bytes = b"",
        open: bool = False,
        exclusive: bool = False,
    ) -> Inode:
        message = wire.Create(
            0, 0, parent, name, mode, uid, gid, umask, rdev, target, open, exclusive
        )
        return Inode.decode(self.do(create.create, message).inode)

    def mkdir(self, parent: int, name: bytes, mode: int = 0o755, umask: int = 0) -> Inode:
        return self.create(parent, name, stat.S_IFDIR | mode, umask=umask)

    def symlink(self, parent: int, name: bytes, target: bytes) -> Inode:
        return self.create(parent, name, stat.S_IFLNK | 0o777, target=target)

    def link(self, ino: int, parent: int, name: bytes) -> Inode:
        return Inode.decode(self.do(namespace.link, wire.Link(0, 0, ino, parent, name)).inode)

    def unlink(self, parent: int, name: bytes) -> None:
        self.do(namespace.unlink, wire.Unlink(0, 0, parent, name))

    def rmdir(self, parent: int, name: bytes) -> None:
        self.do(namespace.rmdir, wire.Rmdir(0, 0, parent, name))

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0
    ) -> None:
        self.do(rename.rename, wire.Rename(0, 0, parent, name, new_parent, new_name, flags))

    def set_attr(self, ino: int, valid: int, **values: int) -> Inode:
        fields = {"mode": 0, "uid": 0, "gid": 0, "size": 0, "atime_ns": 0, "mtime_ns": 0}
        message = wire.SetAttr(0, 0, ino, valid, **(fields | values))
        return Inode.decode(self.do(attributes.set_attr, message).inode)

    def truncate(self, ino: int, size: int) -> Inode:
        return self.set_attr(ino, wire.SET_SIZE, size=size)

    def wrote(self, ino: int, size_min: int, mtime_ns: int = 7) -> Inode:
        message = wire.Wrote(0, 0, ino, size_min, mtime_ns, False)
        return Inode.decode(self.do(attributes.wrote, message).inode)

    def set_xattr(self, ino: int, name: bytes, value: bytes, flags: int = 0) -> None:
        self.do(xattrs.set_xattr, wire.SetXattr(0, 0, ino, name, value, flags))

    def remove_xattr(self, ino: int, name: bytes) -> None:
        self.do(xattrs.remove_xattr, wire.RemoveXattr(0, 0, ino, name))

    # ------------------------------------------------------------ open files

    def open(self, ino: int, writable: bool = False) -> None:
        self.do(sessions.open_inode, wire.Open(ino, writable))

    def close(self, ino: int) -> None:
        self.opens.pop((self.session, ino), None)
        self.do(sessions.close_inode, wire.Close(ino, 1))

    def expire(self, session: int, limit: int = 2) -> list[Effect]:
        """End a session as the server does; return all its effects."""
        self.opens = {key: value for key, value in self.opens.items() if key[0] != session}
        effects: list[Effect] = []
        done = False
        while not done:
            step = sessions.expire_session(self.view, session, self.context(), limit)
            self.settle(step.writes, step.follow_up)
            effects += self.effects
            done = step.done
        return effects + (self.sweep(limit) if self.table_complete else [])

    def sweep(self, limit: int = 2) -> list[Effect]:
        """Clear what ended sessions left; return the effects."""
        effects: list[Effect] = []
        for sweep in (sessions.sweep_orphans, sessions.sweep_tails):
            done, after_ino = False, 0
            while not done:
                step = sweep(self.view, after_ino, self.context(), limit)
                self.settle(step.writes, step.follow_up)
                effects += self.effects
                done, after_ino = step.done, step.after_ino
        return effects

    def finish_trims(self) -> None:
        """Carry out the trim queue."""
        for ino, remains in queues.trim_queue(self.view, 0, 1000):
            self.view.apply(queues.trimmed(self.view, ino, remains))

    @property
    def purged(self) -> set[int]:
        return {effect.ino for effect in self.effects if isinstance(effect, PurgeReady)}

    @property
    def trims(self) -> list[TrimReady]:
        return [effect for effect in self.effects if isinstance(effect, TrimReady)]


@contextmanager
def refused(code: Code) -> Iterator[None]:
    """Expect the block to raise that error."""
    with pytest.raises(KaError) as info:
        yield
    assert info.value.code is code


@contextmanager
def may_refuse(*codes: Code) -> Iterator[None]:
    """Let the block succeed, or raise one of these errors and no other."""
    try:
        yield
    except KaError as error:
        if error.code not in codes:
            raise
