"""A mounted file system as an async Python API.  Knows nothing of FUSE.

    async with Volume.open(config, key) as volume:
        inode = await volume.lookup(ROOT, b"data")

Everything is addressed by inode number, as in the kernel.  Coherence: close-to-open.  What has
been flushed or fsynced here is seen by every open elsewhere; attributes come from the mds,
corrected by what is open and written here and not yet reported (`files`).

Follow one write: `write` -> `OpenFile.write` (accepted, gathered) -> `IodClient.write` (summed,
sent, stored) -> `flush`: settled, then reported to the mds with the new size.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from common import log
from common.errors import Code, KaError
from common.session import Identity
from nfsp import wire
from nfsp.client.files import DirtyLimit, Handle, OpenFile, lost_error
from nfsp.client.iod_client import IodClient
from nfsp.client.mds_client import MdsClient
from nfsp.clock import now_ns
from nfsp.config import ClusterConfig, MountConfig
from nfsp.model import Inode

__all__ = ["DirEntry", "Volume"]

VALIDATORS_MAX = 65536
"""Files whose unchanged pages the kernel may keep over an open."""

BARE_MAX = 65536
CAPABILITY_XATTR = b"security.capability"
"""The kernel asks for it before every write; the inode is not looked at meanwhile."""
DIRECTORIES_MAX = 4096
LAYOUT_XATTR = b"user.nfsp.layout"
"""Never stored: the mds makes it up."""

_log = log.get("nfsp.client")
_T = TypeVar("_T")

DirEntry = tuple[bytes, int, Inode]
"""(name, cookie, inode)"""


class Volume:
    """One client session: the name space of the mds and the data of the iods."""

    def __init__(
        self, config: ClusterConfig, key: bytes, *, mount: MountConfig, mountpoint: str,
        durable: bool,
    ) -> None:  # fmt: skip
        identity = Identity(config.cluster.id, "client", mountpoint, secrets.token_bytes(16))
        self.mds = MdsClient(
            config.mds[0],
            identity=identity,
            key=key,
            patience_s=mount.timeout_s,
            mountpoint=mountpoint,
            durable=durable,
            opens=self._opens,
            on_session_lost=self._session_lost,
            on_map=lambda cluster_map: self.iods.use_map(cluster_map),
        )
        self.iods = IodClient(
            identity=identity,
            key=key,
            patience_s=mount.timeout_s,
            fetch_map=self.mds.fetch_map,
        )
        self._dirty = DirtyLimit(mount.dirty_size)
        self._files: dict[int, OpenFile] = {}
        self._validators: OrderedDict[int, int] = OrderedDict()
        """Inode -> `change` of the state that the kernel's pages show."""
        self._bare: OrderedDict[int, float] = OrderedDict()
        """Inode -> until when it may be taken to have no extended attribute."""
        self._incapable: OrderedDict[int, float] = OrderedDict()
        """Inode -> until when it may be taken to have no `security.capability`."""
        self._xattr_changes = 0
        """How often one was set here."""
        self._directories: OrderedDict[int, tuple[Inode, float]] = OrderedDict()
        """Inode -> a directory as our last change in it left it, and until when that may serve."""
        self._attr_timeout_s = mount.attr_timeout_s
        self._nursery: trio.Nursery

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        config: ClusterConfig,
        key: bytes,
        *,
        mount: MountConfig | None = None,
        mountpoint: str = "",
        durable: bool = False,
    ) -> AsyncIterator[Volume]:
        """Start a session; on leaving, write out everything and end it.

        `durable`: every change of the name space is on stable storage before it is answered.
        What is raised inside comes out as it is, not in an exception group.
        """
        volume = cls(
            config, key, mount=mount or config.mount, mountpoint=mountpoint, durable=durable
        )
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            volume._nursery = nursery
            await nursery.start(volume.iods.run)
            await nursery.start(volume.mds.run)
            try:
                await volume.mds.start()
                yield volume
            except Exception as error:
                failure = error
            finally:
                with trio.CancelScope(shield=True):
                    await volume._finish()
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _finish(self) -> None:
        for file in list(self._files.values()):
            try:
                await file.settle()
                await self._report(file, durable=False)
            except KaError as error:
                _log.error("finish.failed", ino=file.ino, reason=str(error))
        await self.mds.stop()

    # ------------------------------------------------------------ reading the name space

    async def lookup(self, parent: int, name: bytes) -> Inode:
        """Find an entry; `.` and `..` are resolved by the mds for any inode number."""
        return self._shown(await self.mds.inode(wire.Lookup(parent, name)))

    async def getattr(self, ino: int) -> Inode:
        known = self._directories.get(ino)
        if known is not None and known[1] > time.monotonic():
            return known[0]
        return self._shown(await self.mds.inode(wire.GetAttr(ino)))

    async def readdir(self, ino: int, cookie: int, count_max: int) -> tuple[list[DirEntry], bool]:
        """Return entries after *cookie*, and whether these were the last."""
        reply = await self.mds.request(
            wire.ReadDir(ino, cookie, count_max), wire.ReadDirReply
        )
        entries = [
            (name, at, self._shown(Inode.decode(inode))) for name, at, inode in reply.entries
        ]
        return entries, reply.eof

    async def getxattr(self, ino: int, name: bytes) -> bytes:
        if name != LAYOUT_XATTR and self._is_bare(ino):
            raise KaError(Code.ENODATA)
        if name != CAPABILITY_XATTR:
            return (await self.mds.request(wire.GetXattr(ino, name), wire.XattrReply)).value
        if self._incapable.get(ino, 0.0) > time.monotonic():
            raise KaError(Code.ENODATA)
        until, changes = time.monotonic() + self._attr_timeout_s, self._xattr_changes
        try:
            return (await self.mds.request(wire.GetXattr(ino, name), wire.XattrReply)).value
        except KaError as error:
            if error.code is Code.ENODATA and changes == self._xattr_changes:
                _keep(self._incapable, ino, until, BARE_MAX)
            raise

    async def listxattr(self, ino: int) -> list[bytes]:
        if self._is_bare(ino):
            return []
        return (await self.mds.request(wire.ListXattr(ino), wire.NamesReply)).names

    async def statfs(self) -> wire.StatFsReply:
        return await self.mds.request(wire.StatFs(), wire.StatFsReply)

    # ------------------------------------------------------------ changing the name space

    async def create(
        self, parent: int, name: bytes, mode: int, *, uid: int, gid: int, umask: int = 0,
        rdev: int = 0, target: bytes = b"",
    ) -> Inode:  # fmt: skip
        """Make a file, directory, symbolic link or special file without opening it."""
        record = await self._entry(
            parent,
            lambda slot, number: wire.Create(
                slot, number, parent, name, mode, uid, gid, umask, rdev, target, False, True
            ),
        )
        return self._shown(Inode.decode(record))

    async def link(self, ino: int, parent: int, name: bytes) -> Inode:
        record = await self._entry(
            parent, lambda slot, number: wire.Link(slot, number, ino, parent, name)
        )
        return self._changed(Inode.decode(record))

    async def unlink(self, parent: int, name: bytes) -> None:
        await self._entry(parent, lambda slot, number: wire.Unlink(slot, number, parent, name))

    async def rmdir(self, parent: int, name: bytes) -> None:
        await self._entry(parent, lambda slot, number: wire.Rmdir(slot, number, parent, name))

    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0
    ) -> None:
        self._directories.pop(parent, None)
        self._directories.pop(new_parent, None)
        await self.mds.mutate(
            lambda slot, number: wire.Rename(
                slot, number, parent, name, new_parent, new_name, flags
            ),
            wire.Done,
        )

    async def setattr(
        self, ino: int, valid: int, *, mode: int = 0, uid: int = 0, gid: int = 0, size: int = 0,
        atime_ns: int = 0, mtime_ns: int = 0,
    ) -> Inode:  # fmt: skip
        """Change the attributes named by *valid* (`wire.SET_*`)."""
        file = self._files.get(ino)
        if file is not None and valid & (
            wire.SET_SIZE | wire.SET_MTIME | wire.SET_MTIME_NOW | wire.SET_ATIME_NOW
        ):
            await file.settle()
            await self._report(file, durable=False)
            if valid & wire.SET_SIZE:
                file.note_trim()
        self._directories.pop(ino, None)
        inode = await self.mds.mutate_inode(
            lambda slot, number: wire.SetAttr(
                slot, number, ino, valid, mode, uid, gid, size, atime_ns, mtime_ns
            )
        )
        return self._changed(inode)

    async def setxattr(self, ino: int, name: bytes, value: bytes, flags: int = 0) -> None:
        self._bare.pop(ino, None)
        self._directories.pop(ino, None)
        try:
            await self.mds.mutate(
                lambda slot, number: wire.SetXattr(slot, number, ino, name, value, flags),
                wire.Done,
            )
        finally:  # what was asked before, or meanwhile, is not to be believed
            self._xattr_changes += 1
            self._bare.pop(ino, None)
            self._incapable.pop(ino, None)

    async def removexattr(self, ino: int, name: bytes) -> None:
        self._directories.pop(ino, None)
        await self.mds.mutate(
            lambda slot, number: wire.RemoveXattr(slot, number, ino, name), wire.Done
        )

    async def sync(self) -> None:
        """Return when every change answered so far is on stable storage."""
        await self.mds.request(wire.Sync(), wire.Done)

    # ------------------------------------------------------------ files

    async def open_file(self, ino: int, *, writable: bool) -> tuple[Handle, Inode, bool]:
        """Open a file; the flag says whether pages cached of it earlier are still true."""
        inode = await self.mds.inode(wire.Open(ino, writable))
        known = self._validators.get(ino)
        handle = self._handle(inode, writable=writable)
        self._remember(inode)
        return handle, self._shown(inode), known == inode.change

    async def create_file(
        self, parent: int, name: bytes, mode: int, *, uid: int, gid: int, umask: int = 0,
        exclusive: bool,
    ) -> tuple[Handle, Inode]:  # fmt: skip
        """Make a regular file, or open the existing one unless *exclusive*; for writing."""
        record = await self._entry(
            parent,
            lambda slot, number: wire.Create(
                slot, number, parent, name, mode, uid, gid, umask, 0, b"", True, exclusive
            ),
        )
        inode = Inode.decode(record)
        handle = self._handle(inode, writable=True)
        self._remember(inode)
        return handle, self._shown(inode)

    async def read(self, handle: Handle, offset: int, length: int) -> memoryview:
        """Return bytes of the file; fewer than asked for only at its end."""
        return await handle.file.read(offset, length)

    async def write(self, handle: Handle, offset: int, data: bytes | memoryview) -> int:
        """Accept bytes; a failure to store them is raised by a later call on the handle."""
        file = handle.file
        file.raise_new_error(handle)
        await file.write(offset, memoryview(data), now_ns())
        return len(data)

    async def flush(self, handle: Handle) -> None:
        """Make everything written here visible to every later open; raises write failures."""
        if handle.writable:
            await handle.file.settle()
            await self._report(handle.file, durable=False)
            handle.file.raise_new_error(handle)

    async def fsync(self, handle: Handle) -> None:
        """Put the file's data and metadata on stable storage; raises write failures."""
        file = handle.file
        await file.settle()
        await file.sync()
        await self._report(file, durable=True)
        file.raise_new_error(handle)

    async def release(self, handle: Handle) -> None:
        """Give a handle back; never raises."""
        file = handle.file
        file.handle_count -= 1
        file.writable_count -= handle.writable
        if file.handle_count:
            return
        if handle.writable and file.unreported:  # a flush failed, or never came
            with trio.CancelScope(shield=True):
                try:
                    await file.settle()
                    await self._report(file, durable=False)
                except KaError as error:
                    _log.error("release.failed", ino=file.ino, reason=str(error))
        if not file.handle_count and self._files.get(file.ino) is file:
            del self._files[file.ino]
            self.mds.closed(file.ino, file.open_count)

    # ------------------------------------------------------------ inside

    def _handle(self, inode: Inode, *, writable: bool) -> Handle:
        if not inode.is_file or inode.layout is None:
            raise KaError(Code.EIO, "not a regular file", ino=inode.ino)
        file = self._files.get(inode.ino)
        if file is None:
            file = OpenFile(inode, self.iods, self._dirty, self._nursery)
            self._files[inode.ino] = file
        file.open_count += 1
        file.handle_count += 1
        file.writable_count += writable
        return Handle(file, writable=writable)

    async def _report(self, file: OpenFile, *, durable: bool) -> None:
        """Tell the mds the size and mtime that the iods already hold."""
        async with file.reporting:
            if file.unreported:
                size, mtime_ns = file.size, file.mtime_ns
                inode = await self.mds.mutate_inode(
                    lambda slot, number: wire.Wrote(
                        slot, number, file.ino, size, mtime_ns, durable
                    )
                )
                if file.mtime_ns == mtime_ns:
                    file.unreported = False
                self._changed(inode)
            elif durable:
                await self.sync()

    async def _entry(self, parent: int, make: Callable[[int, int], object]) -> bytes:
        """Make or remove an entry; keep what that made of the directory, for a moment.

        The kernel asks for a directory's attributes after each change it has made in it.
        """
        self._directories.pop(parent, None)
        record, directory = await self.mds.mutate_entry(make)
        if directory is not None:
            known = self._directories.get(parent)
            if known is None or known[0].change < directory.change:
                until = time.monotonic() + self._attr_timeout_s
                _keep(self._directories, parent, (directory, until), DIRECTORIES_MAX)
        return record

    def _is_bare(self, ino: int) -> bool:
        """Whether the inode had no extended attribute when it was last seen, just now.

        `ls` asks for ACLs, and the kernel for CAPABILITY_XATTR before every write.
        """
        return self._bare.get(ino, 0.0) > time.monotonic()

    def _shown(self, inode: Inode) -> Inode:
        if not inode.xattr_count and not (inode.is_dir and inode.layout):
            _keep(self._bare, inode.ino, time.monotonic() + self._attr_timeout_s, BARE_MAX)
        file = self._files.get(inode.ino)
        return inode if file is None else file.merge(inode)

    def _changed(self, inode: Inode) -> Inode:
        """Note an inode that our own change produced: pages cached here stay true."""
        if self._validators.get(inode.ino) == inode.change - 1:
            self._remember(inode)
        else:
            self._validators.pop(inode.ino, None)
        return self._shown(inode)

    def _remember(self, inode: Inode) -> None:
        _keep(self._validators, inode.ino, inode.change, VALIDATORS_MAX)

    def _opens(self) -> list[list[object]]:
        return [
            [file.ino, file.open_count, file.writable_count > 0] for file in self._files.values()
        ]

    def _session_lost(self, stale: list[int]) -> None:
        for file in self._files.values():
            if file.ino in stale:
                file.abandon()
            elif file.unreported:
                file.unreported = False
                file.fail(lost_error())


def _keep(table: OrderedDict[int, _T], ino: int, value: _T, count_max: int) -> None:
    """Put an entry at the end of a bounded table; the oldest one goes."""
    table[ino] = value
    table.move_to_end(ino)
    if len(table) > count_max:
        table.popitem(last=False)
