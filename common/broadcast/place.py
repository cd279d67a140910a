"""A place in the file system that is written to without leaving it.

Every path is walked below the destination's descriptor, one component at a time, and no link is
followed; what is there of another kind than wanted is replaced, unless it is a directory.

Attributes that only root may set are set by root only: owner, device nodes, some of the extended
attributes.  Others fail loudly.
"""

from __future__ import annotations

import hashlib
import os
import stat

from common.broadcast.image import STAGE_NAME, Entry, EntryKind
from common.errors import Code, KaError

__all__ = ["Place"]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
WALKED_COUNT_MAX = 64
NAMED_SIZE_MAX = 200
"""A stage is named after its file, unless the name would become too long."""
_FORMATS = {
    EntryKind.CHARACTER: stat.S_IFCHR,
    EntryKind.BLOCK: stat.S_IFBLK,
    EntryKind.FIFO: stat.S_IFIFO,
}


class Place:
    """A destination: a directory for a tree, or the directory that a single file goes into."""

    def __init__(self, path: bytes, *, is_directory: bool) -> None:
        """Open it; raises OSError.  Makes the directory, but not those above it."""
        self._is_directory = is_directory
        self._name = b"" if is_directory else os.path.basename(path)
        if is_directory:
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:
                pass
        elif os.path.isdir(path):
            raise IsADirectoryError(21, "is a directory", path)
        above = path if is_directory else os.path.dirname(path)
        # The destination itself is the operator's choice: it may be a link.
        self._root = os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._walked: dict[bytes, int] = {}
        self._is_root_user = os.geteuid() == 0

    @property
    def _stage_name(self) -> bytes:
        if not self._name:
            return STAGE_NAME
        name = self._name
        if len(name) > NAMED_SIZE_MAX:
            name = hashlib.blake2b(name, digest_size=16).hexdigest().encode()
        return STAGE_NAME + b"-" + name

    def open_stage(self) -> int:
        """Return a descriptor of the directory for what is incomplete."""
        try:
            os.mkdir(self._stage_name, 0o700, dir_fd=self._root)
        except FileExistsError:
            pass
        return os.open(self._stage_name, _DIRECTORY, dir_fd=self._root)

    def remove_stage(self) -> None:
        os.rmdir(self._stage_name, dir_fd=self._root)

    def close(self) -> None:
        self._forget()
        os.close(self._root)

    # ------------------------------------------------------------ walking

    def _where(self, entry: Entry) -> tuple[int, bytes]:
        """Return (descriptor of the directory, name in it)."""
        return self._where_is(entry.path)

    def _where_is(self, path: bytes) -> tuple[int, bytes]:
        if not path:
            return (self._root, b".") if self._is_directory else (self._root, self._name)
        above, _, name = path.rpartition(b"/")
        return self._walk(above), name

    def _walk(self, path: bytes) -> int:
        if not path:
            return self._root
        if path in self._walked:
            return self._walked[path]
        above, _, name = path.rpartition(b"/")
        fd = os.open(name, _DIRECTORY, dir_fd=self._walk(above))
        if len(self._walked) >= WALKED_COUNT_MAX:
            self._forget()
        self._walked[path] = fd
        return fd

    def _forget(self) -> None:
        for fd in self._walked.values():
            os.close(fd)
        self._walked.clear()

    def open_file(self, entry: Entry) -> int:
        """Return a descriptor to read an existing file; -1 if there is none of that kind."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            directory, name = self._where(entry)
            fd = os.open(name, flags, dir_fd=directory)
        except OSError:
            return -1
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        return -1

    # ------------------------------------------------------------ making

    def make_directory(self, entry: Entry) -> None:
        directory, name = self._where(entry)
        if name == b".":
            return
        try:
            os.mkdir(name, 0o700, dir_fd=directory)
        except FileExistsError:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode):
                os.unlink(name, dir_fd=directory)
                os.mkdir(name, 0o700, dir_fd=directory)

    def rename_from(self, stage: int, staged: bytes, entry: Entry) -> None:
        directory, name = self._where(entry)
        os.rename(staged, name, src_dir_fd=stage, dst_dir_fd=directory)

    def make_link(self, entry: Entry) -> None:
        """Make a hard link to what is in place already."""
        directory, name = self._where(entry)
        from_directory, from_name = self._where_is(entry.target)
        old = os.stat(from_name, dir_fd=from_directory, follow_symlinks=False)
        try:
            now = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if (now.st_dev, now.st_ino) == (old.st_dev, old.st_ino):
                return
            os.unlink(name, dir_fd=directory)
        except FileNotFoundError:
            pass
        os.link(
            from_name, name, src_dir_fd=from_directory, dst_dir_fd=directory, follow_symlinks=False
        )

    def make_special(self, entry: Entry) -> None:
        """Make a symbolic link, a device node or a FIFO, if it is not there as it should be."""
        directory, name = self._where(entry)
        if not self._is_there(directory, name, entry):
            try:
                os.unlink(name, dir_fd=directory)
            except FileNotFoundError:
                pass
            if entry.kind is EntryKind.SYMLINK:
                os.symlink(entry.target, name, dir_fd=directory)
            elif entry.kind is EntryKind.FIFO or self._is_root_user:
                mode = _FORMATS[entry.kind] | 0o600
                os.mknod(name, mode, device=entry.device, dir_fd=directory)
            else:
                raise KaError(Code.EPERM, "device nodes can be made by root only")
        if self._is_root_user:
            os.chown(name, entry.uid, entry.gid, dir_fd=directory, follow_symlinks=False)
        if entry.kind is not EntryKind.SYMLINK:
            os.chmod(name, entry.mode, dir_fd=directory)
        times = (entry.mtime_ns, entry.mtime_ns)
        os.utime(name, ns=times, dir_fd=directory, follow_symlinks=False)

    def _is_there(self, directory: int, name: bytes, entry: Entry) -> bool:
        try:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if entry.kind is EntryKind.SYMLINK:
            is_link = stat.S_ISLNK(status.st_mode)
            return is_link and os.readlink(name, dir_fd=directory) == entry.target
        same_format = stat.S_IFMT(status.st_mode) == _FORMATS[entry.kind]
        return same_format and status.st_rdev == entry.device

    # ------------------------------------------------------------ attributes

    def dress(self, fd: int, entry: Entry) -> None:
        """Give an open file or directory its attributes; closes it."""
        try:
            if self._is_root_user:
                os.fchown(fd, entry.uid, entry.gid)
            os.fchmod(fd, entry.mode)
            self._set_xattrs(fd, entry)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(fd)

    def dress_directory(self, entry: Entry) -> None:
        directory, name = self._where(entry)
        self.dress(os.open(name, _DIRECTORY, dir_fd=directory), entry)

    def _set_xattrs(self, fd: int, entry: Entry) -> None:
        wanted = dict(entry.xattrs)
        try:
            present = [os.fsencode(name) for name in os.listxattr(fd)]
        except OSError:
            present = []
        for name in present:
            if name.startswith((b"user.", b"system.posix_acl_")) and name not in wanted:
                os.removexattr(fd, name)
        for name, value in wanted.items():
            try:
                os.setxattr(fd, name, value)
            except OSError:
                if self._is_root_user or name.startswith(b"user."):
                    raise

    def sync_directories(self) -> None:
        """Make the names durable."""
        for fd in (self._root, *self._walked.values()):
            os.fsync(fd)
