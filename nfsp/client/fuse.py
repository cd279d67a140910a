"""The FUSE adapter: kernel requests to `Volume` calls, KaError to errno.  The only importer of
pyfuse3, and the only place where an errno is made for the kernel.

The kernel checks permissions (`default_permissions`) and caches attributes and entries for
`attr_timeout_s`; nothing is cached here but one page of entries per open directory.  Node ids
are inode numbers, so `forget` has nothing to forget and an NFS handle outlives every daemon.
"""

from __future__ import annotations

import errno
import os
import stat
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, StatvfsData

from common import log
from common.errors import Code, KaError
from common.transport import buffers
from nfsp import wire
from nfsp.client.files import Handle
from nfsp.client.volume import DirEntry, Volume
from nfsp.model import NAME_SIZE_MAX, TIME_NS_MAX, TIME_NS_MIN, Inode

__all__ = ["FuseAdapter", "mount"]

DIR_PAGE_COUNT = 256
"""Entries fetched at once while a directory is listed."""
BLOCK_SIZE_SHOWN = 128 * 1024
"""st_blksize: what `cp` and friends use as their buffer."""
WORKERS_MIN = 16
WORKERS_MAX = 128
"""Kernel requests handled at the same time; each worker owns a megabyte, so a few are kept."""
_COOKIE_DOT, _COOKIE_DOTDOT = 1, 2

_log = log.get("nfsp.fuse")
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _answers_errno(
    method: Callable[Concatenate[FuseAdapter, _P], Awaitable[_R]],
) -> Callable[Concatenate[FuseAdapter, _P], Coroutine[Any, Any, _R]]:
    """Translate failures at this edge: a handler may raise nothing but FUSEError."""

    @wraps(method)
    async def handler(self: FuseAdapter, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return await method(self, *args, **kwargs)
        except KaError as error:
            if error.errno == errno.EIO:
                _log.warning("request.failed", operation=method.__name__, reason=str(error))
            raise FUSEError(error.errno) from None
        except FUSEError:
            raise
        except Exception as error:
            _log.error("request.failed", operation=method.__name__, exc_info=error)
            raise FUSEError(errno.EIO) from None

    return handler  # type: ignore[return-value]  # `wraps` hides that this is a plain function


class _Directory:
    """An open directory: the page of entries that is being handed out."""

    __slots__ = ("cookies", "eof", "ino", "page")

    def __init__(self, ino: int) -> None:
        self.ino = ino
        self.page: list[DirEntry] = []
        self.cookies: list[int] = []
        self.eof = False


class FuseAdapter(pyfuse3.Operations):
    """pyfuse3's operations on a Volume."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = True

    def __init__(self, volume: Volume, *, attr_timeout_s: float) -> None:
        super().__init__()
        self._volume = volume
        self._attr_timeout_s = attr_timeout_s
        self._handles: dict[int, Handle] = {}
        self._directories: dict[int, _Directory] = {}
        self._next_handle = 1
        self._lent: list[memoryview] = []
        """Answers of reads that have been sent by the time somebody looks here again."""

    # ------------------------------------------------------------ name space

    @_answers_errno
    async def lookup(self, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        return self._entry(await self._volume.lookup(parent, name))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Nothing is remembered by lookup."""

    @_answers_errno
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._entry(await self._volume.getattr(inode))

    @_answers_errno
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        valid = (
            wire.SET_MODE * fields.update_mode
            | wire.SET_UID * fields.update_uid
            | wire.SET_GID * fields.update_gid
            | wire.SET_SIZE * fields.update_size
            | wire.SET_ATIME * fields.update_atime
            | wire.SET_MTIME * fields.update_mtime
        )
        changed = await self._volume.setattr(
            inode,
            valid,
            mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else 0,
            uid=attr.st_uid if fields.update_uid else 0,
            gid=attr.st_gid if fields.update_gid else 0,
            size=attr.st_size if fields.update_size else 0,
            atime_ns=_storable(attr.st_atime_ns) if fields.update_atime else 0,
            mtime_ns=_storable(attr.st_mtime_ns) if fields.update_mtime else 0,
        )
        return self._entry(changed)

    @_answers_errno
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return (await self._volume.getattr(inode)).target

    @_answers_errno
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        inode = await self._volume.create(
            parent_inode, name, mode, uid=ctx.uid, gid=ctx.gid, umask=ctx.umask, rdev=rdev
        )
        return self._entry(inode)

    @_answers_errno
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        mode = stat.S_IFDIR | stat.S_IMODE(mode)
        inode = await self._volume.create(
            parent_inode, name, mode, uid=ctx.uid, gid=ctx.gid, umask=ctx.umask
        )
        return self._entry(inode)

    @_answers_errno
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        inode = await self._volume.create(
            parent_inode, name, stat.S_IFLNK | 0o777, uid=ctx.uid, gid=ctx.gid, target=target
        )
        return self._entry(inode)

    @_answers_errno
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        await self._volume.unlink(parent_inode, name)

    @_answers_errno
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        await self._volume.rmdir(parent_inode, name)

    @_answers_errno
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        await self._volume.rename(
            parent_inode_old, name_old, parent_inode_new, name_new, flags
        )

    @_answers_errno
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(await self._volume.link(inode, new_parent_inode, new_name))

    # ------------------------------------------------------------ files

    @_answers_errno
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        handle, _inode, unchanged = await self._volume.open_file(inode, writable=writable)
        if flags & os.O_TRUNC:
            await self._volume.setattr(inode, wire.SET_SIZE, size=0)
        return FileInfo(fh=self._new(self._handles, handle), keep_cache=unchanged)

    @_answers_errno
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        handle, inode = await self._volume.create_file(
            parent_inode,
            name,
            stat.S_IFREG | stat.S_IMODE(mode),
            uid=ctx.uid,
            gid=ctx.gid,
            umask=ctx.umask,
            exclusive=bool(flags & os.O_EXCL),
        )
        if flags & os.O_TRUNC and inode.size:
            inode = await self._volume.setattr(inode.ino, wire.SET_SIZE, size=0)
        return FileInfo(fh=self._new(self._handles, handle)), self._entry(inode)

    @_answers_errno
    async def read(self, fh: int, off: int, size: int) -> bytes:
        # pyfuse3 copies what we return to the kernel before any other task can run.
        for lent in self._lent:
            buffers.give(lent)
        self._lent.clear()
        data = await self._volume.read(self._handles[fh], off, size)
        if data:
            self._lent.append(data)
        return data  # type: ignore[return-value]  # any contiguous buffer is accepted

    @_answers_errno
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return await self._volume.write(self._handles[fh], off, buf)

    @_answers_errno
    async def flush(self, fh: int) -> None:
        await self._volume.flush(self._handles[fh])

    @_answers_errno
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._volume.fsync(self._handles[fh])

    @_answers_errno
    async def release(self, fh: int) -> None:
        await self._volume.release(self._handles.pop(fh))

    # ------------------------------------------------------------ directories

    @_answers_errno
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        return self._new(self._directories, _Directory(inode))

    @_answers_errno
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        directory = self._directories[fh]
        if start_id < _COOKIE_DOTDOT and not await self._reply_dots(directory, start_id, token):
            return
        cookie = max(start_id, _COOKIE_DOTDOT)
        fresh = start_id == 0
        while True:
            index = bisect_right(directory.cookies, cookie)
            within = not fresh and directory.page and directory.cookies[0] <= cookie
            if not within or index == len(directory.page):
                if within and directory.eof:
                    return
                directory.page, directory.eof = await self._volume.readdir(
                    directory.ino, cookie, DIR_PAGE_COUNT
                )
                directory.cookies = [entry[1] for entry in directory.page]
                fresh, index = False, 0
                if not directory.page:
                    return
            for name, at, inode in directory.page[index:]:
                if not pyfuse3.readdir_reply(token, name, self._entry(inode), at):
                    return
                cookie = at
            if directory.eof:
                return

    async def _reply_dots(
        self, directory: _Directory, start_id: int, token: pyfuse3.ReaddirToken
    ) -> bool:
        if start_id < _COOKIE_DOT:
            here = self._entry(await self._volume.getattr(directory.ino))
            if not pyfuse3.readdir_reply(token, b".", here, _COOKIE_DOT):
                return False
        above = self._entry(await self._volume.lookup(directory.ino, b".."))
        return pyfuse3.readdir_reply(token, b"..", above, _COOKIE_DOTDOT)

    async def releasedir(self, fh: int) -> None:
        del self._directories[fh]

    @_answers_errno
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._volume.sync()

    # ------------------------------------------------------------ the rest

    @_answers_errno
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        usage = await self._volume.statfs()
        data = StatvfsData()
        data.f_bsize = BLOCK_SIZE_SHOWN
        data.f_frsize = 4096
        data.f_blocks = usage.total // 4096
        data.f_bfree = usage.free // 4096
        data.f_bavail = usage.available // 4096
        data.f_files = usage.inodes + usage.available // 4096
        data.f_ffree = data.f_favail = usage.available // 4096
        data.f_namemax = NAME_SIZE_MAX
        return data

    @_answers_errno
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        await self._volume.setxattr(inode, name, value)

    @_answers_errno
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        return await self._volume.getxattr(inode, name)

    @_answers_errno
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        return await self._volume.listxattr(inode)

    @_answers_errno
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        await self._volume.removexattr(inode, name)

    # ------------------------------------------------------------ inside

    def _new(self, table: dict[int, Any], item: object) -> int:
        number = self._next_handle
        self._next_handle += 1
        table[number] = item
        return number

    def _entry(self, inode: Inode) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = inode.ino
        entry.generation = 0
        entry.entry_timeout = self._attr_timeout_s
        entry.attr_timeout = self._attr_timeout_s
        entry.st_mode = inode.mode
        entry.st_nlink = inode.nlink
        entry.st_uid = inode.uid
        entry.st_gid = inode.gid
        entry.st_rdev = inode.rdev
        entry.st_size = inode.size
        entry.st_blksize = BLOCK_SIZE_SHOWN
        entry.st_blocks = -(-inode.size // 512)
        entry.st_atime_ns = inode.atime_ns
        entry.st_mtime_ns = inode.mtime_ns
        entry.st_ctime_ns = inode.ctime_ns
        entry.st_birthtime_ns = inode.btime_ns
        return entry


def _storable(time_ns: int) -> int:
    """Return the nearest time that can be stored, as Linux's own file systems do."""
    return min(max(time_ns, TIME_NS_MIN), TIME_NS_MAX)


def check_mountpoint(path: str) -> None:
    """Raise KaError USAGE unless *path* is a free directory and FUSE can be used."""
    if not os.path.exists("/dev/fuse"):
        raise KaError(Code.USAGE, "/dev/fuse is missing: load the kernel module (modprobe fuse)")
    try:
        is_directory = stat.S_ISDIR(os.stat(path).st_mode)
        os.statvfs(path)  # never answered from the kernel's cache
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise KaError(
                Code.EBUSY, f"a dead mount is there; remove it with: nfsp umount {path}"
            ) from None
        is_directory = False
    if not is_directory:
        raise KaError(Code.USAGE, f"not a directory: {path}")
    if os.path.ismount(path):
        raise KaError(Code.EBUSY, f"something is mounted there already: {path}")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK) and not any(
        os.access(os.path.join(folder, "fusermount3"), os.X_OK)
        for folder in os.environ.get("PATH", "/usr/bin").split(":")
    ):
        raise KaError(Code.USAGE, "fusermount3 is missing: install the package fuse3")


async def mount(
    volume: Volume,
    path: str,
    *,
    source: str,
    attr_timeout_s: float,
    readahead: int,
    options: Sequence[str],
    ready: Callable[[], None],
) -> None:
    """Mount *volume* at *path* and serve it until it is unmounted or this is cancelled."""
    adapter = FuseAdapter(volume, attr_timeout_s=attr_timeout_s)
    fuse_options = {"default_permissions", f"fsname={source}", "subtype=nfsp", *options}
    if os.geteuid() == 0:
        fuse_options.add("allow_other")
    try:
        pyfuse3.init(adapter, path, fuse_options)
    except RuntimeError as error:
        raise KaError(Code.USAGE, f"cannot mount at {path}: {error}") from None
    unmount = True
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_announce, path, readahead, ready)
            await pyfuse3.main(min_tasks=WORKERS_MIN, max_tasks=WORKERS_MAX)
            unmount = False
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=unmount)


async def _announce(path: str, readahead: int, ready: Callable[[], None]) -> None:
    """When the mount answers: raise its read-ahead if we may, and say that it is ready."""
    status = await trio.to_thread.run_sync(os.stat, path)
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    try:
        with open(f"/sys/class/bdi/{device}/read_ahead_kb", "w") as file:  # noqa: ASYNC230
            file.write(str(readahead // 1024))
    except OSError as error:
        _log.debug("readahead.kept", reason=str(error))
    ready()
