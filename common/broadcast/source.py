"""Sources: a file, a directory, a block device, standard input, what a command prints.

A source is described by a table (`image`) and read chunk by chunk.  A stream is spooled first, to
a file without a name: nobody can be sent it again otherwise.

The source must not change while it is sent.  If it does, the sums of the manifest tell, and the
transfer ends with an error: nobody gets a mixture.
"""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from common.broadcast.briefing import Plan, encode_plan
from common.broadcast.filecache import FileCache
from common.broadcast.image import STAGE_NAME, Content, Entry, EntryKind, encode_table, image_id
from common.broadcast.manifest import Algorithm, Manifest
from common.errors import Code, KaError, from_errno

__all__ = ["Source", "spool_command", "spool_stream"]

SPOOL_READ_SIZE = 1024 * 1024
WORKER_COUNT_MAX = 4
"""Threads that sum; one takes some 8 GB/s out of the page cache."""
XATTR_PREFIXES = ("user.", "trusted.", "security.capability", "system.posix_acl_")


class Source:
    """What is to be sent; a `Store` once it has made its plan."""

    def __init__(self, path: str | bytes | int) -> None:
        """*path*: or an open file descriptor, which is closed in the end."""
        self._path = path if isinstance(path, int) else os.fsencode(path)
        self._entries: list[Entry] = []
        self._content = Content(())
        self._chunk_size = 0
        self._single = -1
        """The file, when there is but one."""
        self._files = FileCache(self._open)

    @property
    def size(self) -> int:
        """Bytes of content, after `scan`."""
        return self._content.size

    def scan(self) -> None:
        """Find out what there is; raises KaError when the source cannot be read."""
        try:
            self._scan()
        except OSError as error:
            raise _unreadable(error, self._path) from None
        self._content = Content(self._entries)

    def make_plan(
        self,
        transfer_id: bytes,
        token: bytes,
        *,
        name: str,
        chunk_size: int,
        algorithm: Algorithm,
    ) -> Plan:
        """Sum every chunk; `scan` comes first."""
        self._chunk_size = chunk_size
        try:
            sums = self._sum_all(algorithm)
        except OSError as error:
            raise _unreadable(error, self._path) from None
        table = encode_table(self._entries)
        manifest = Manifest(
            transfer_id, image_id(name, table), self.size, chunk_size, algorithm, sums
        )
        return Plan(manifest, self._entries, encode_plan(manifest, table, token))

    @property
    def entries(self) -> Sequence[Entry]:
        """What there is, after `scan`."""
        return self._entries

    def content(self, piece_size: int) -> Iterator[memoryview]:
        """Yield the content, once through; a piece is good until the next one is asked for."""
        buffer = memoryview(bytearray(min(piece_size, self.size)))
        for offset in range(0, self.size, piece_size):
            yield self._read_into(offset, buffer[: min(piece_size, self.size - offset)])

    # ------------------------------------------------------------ a Store

    def locate(self, chunk: int) -> tuple[int, int] | None:
        if self._single < 0:
            return None
        piece = self._content.piece(*self._extent(chunk))
        return None if piece is None else (self._single, piece.offset)

    def read(self, chunk: int) -> bytes:
        offset, length = self._extent(chunk)
        return bytes(self._read_into(offset, memoryview(bytearray(length))))

    def close(self) -> None:
        self._files.close()
        if self._single >= 0:
            os.close(self._single)
            self._single = -1

    def _extent(self, chunk: int) -> tuple[int, int]:
        """Return (offset, length) of a chunk in the content."""
        offset = chunk * self._chunk_size
        return offset, min(self._chunk_size, self.size - offset)

    def _sum_all(self, algorithm: Algorithm) -> bytes:
        """Sum every chunk: nothing is sent before, so no processor should be idle meanwhile."""
        count, size = -(-self.size // self._chunk_size), algorithm.sum_size
        worker_count = max(1, min(WORKER_COUNT_MAX, os.cpu_count() or 1, count))
        sums = bytearray(count * size)

        def sum_some(first: int) -> None:
            buffer = memoryview(bytearray(min(self._chunk_size, self.size)))
            for chunk in range(first, count, worker_count):
                offset, length = self._extent(chunk)
                part = self._read_into(offset, buffer[:length])
                sums[chunk * size : (chunk + 1) * size] = algorithm.sum_of(part)

        with ThreadPoolExecutor(worker_count, "sums") as workers:
            list(workers.map(sum_some, range(worker_count)))
        return bytes(sums)

    def _read_into(self, offset: int, buffer: memoryview) -> memoryview:
        """Fill the buffer from the content."""
        at = 0
        for piece in self._content.pieces(offset, len(buffer)):
            with self._files.lend(piece.entry) as fd:
                count = os.preadv(fd, [buffer[at : at + piece.length]], piece.offset)
            if count != piece.length:
                raise KaError(Code.EIO, "the source was changed while it was being read")
            at += count
        return buffer

    def _open(self, index: int) -> int:
        if self._single >= 0:
            return os.dup(self._single)
        assert isinstance(self._path, bytes)
        path = os.path.join(self._path, self._entries[index].path)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    # ------------------------------------------------------------ looking at it

    def _scan(self) -> None:
        if isinstance(self._path, int):
            self._single = self._path
        elif not stat.S_ISDIR(os.stat(self._path).st_mode):
            self._single = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        if self._single >= 0:
            self._entries = [self._single_entry()]
            return
        assert isinstance(self._path, bytes)
        links: dict[tuple[int, int], bytes] = {}
        self._entries = [_entry(self._path, b"", os.stat(self._path), links)]
        waiting = [b""]
        while waiting:
            above = waiting.pop()
            with os.scandir(os.path.join(self._path, above)) as found:
                names = sorted(one.name for one in found)
            for name in names:
                path = os.path.join(above, name)
                full = os.path.join(self._path, path)
                status = os.lstat(full)
                if stat.S_ISSOCK(status.st_mode) or path.startswith(STAGE_NAME):
                    continue  # it belongs to a process, or is left of a transfer to here
                entry = _entry(full, path, status, links)
                self._entries.append(entry)
                if entry.kind is EntryKind.DIRECTORY:
                    waiting.append(path)

    def _single_entry(self) -> Entry:
        status = os.fstat(self._single)
        size = os.lseek(self._single, 0, os.SEEK_END)  # of a device too
        ranges = tuple(_ranges(self._single, size, status))
        mode = stat.S_IMODE(status.st_mode) if stat.S_ISREG(status.st_mode) else 0o600
        xattrs = _xattrs(self._single) if stat.S_ISREG(status.st_mode) else ()
        return Entry(
            b"", EntryKind.FILE, mode, status.st_uid, status.st_gid, status.st_mtime_ns,
            size, ranges, xattrs=xattrs,
        )  # fmt: skip


def _unreadable(error: OSError, path: bytes | int) -> KaError:
    name = os.fsdecode(error.filename or (b"the source" if isinstance(path, int) else path))
    code = from_errno(error.errno or 0)
    return KaError(code, f"cannot read {name}: {error.strerror or error}")


_KINDS = {
    stat.S_IFREG: EntryKind.FILE,
    stat.S_IFDIR: EntryKind.DIRECTORY,
    stat.S_IFLNK: EntryKind.SYMLINK,
    stat.S_IFCHR: EntryKind.CHARACTER,
    stat.S_IFBLK: EntryKind.BLOCK,
    stat.S_IFIFO: EntryKind.FIFO,
}


def _entry(
    full: bytes,
    path: bytes,
    status: os.stat_result,
    links: dict[tuple[int, int], bytes],
) -> Entry:
    kind = _KINDS[stat.S_IFMT(status.st_mode)]
    entry = Entry(
        path,
        kind,
        stat.S_IMODE(status.st_mode),
        status.st_uid,
        status.st_gid,
        status.st_mtime_ns,
        xattrs=_xattrs(full),
    )
    if kind is EntryKind.SYMLINK:
        return entry._replace(target=os.readlink(full))
    if kind in (EntryKind.CHARACTER, EntryKind.BLOCK):
        return entry._replace(device=status.st_rdev)
    if kind is not EntryKind.FILE:
        return entry
    if status.st_nlink > 1:
        first = links.setdefault((status.st_dev, status.st_ino), path)
        if first != path:
            return entry._replace(kind=EntryKind.HARD_LINK, target=first, xattrs=())
    ranges: tuple[tuple[int, int], ...] = ()
    if status.st_size:
        fd = os.open(full, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            ranges = tuple(_ranges(fd, status.st_size, status))
        finally:
            os.close(fd)
    return entry._replace(size=status.st_size, ranges=ranges)


def _ranges(fd: int, size: int, status: os.stat_result) -> Iterator[tuple[int, int]]:
    """Yield what is not a hole."""
    has_holes = stat.S_ISREG(status.st_mode) and status.st_blocks * 512 < size
    if not has_holes:
        if size:
            yield 0, size
        return
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        end = min(size, os.lseek(fd, start, os.SEEK_HOLE))
        yield start, end - start


def _xattrs(where: bytes | int) -> tuple[tuple[bytes, bytes], ...]:
    follow = isinstance(where, int)
    found = []
    try:
        for name in sorted(os.listxattr(where, follow_symlinks=follow)):
            if name.startswith(XATTR_PREFIXES):
                value = os.getxattr(where, name, follow_symlinks=follow)
                found.append((os.fsencode(name), value))
    except OSError:
        return ()  # the file system has none
    return tuple(found)


def spool_stream(stream: int, directory: str | None = None) -> int:
    """Copy a stream to its end into a nameless file; return its descriptor."""
    with tempfile.TemporaryFile(dir=directory, prefix="ka-spool-") as spool:
        while data := os.read(stream, SPOOL_READ_SIZE):
            spool.write(data)
        spool.flush()
        return os.dup(spool.fileno())


def spool_command(command: Sequence[str], directory: str | None = None) -> int:
    """Run a command, without a shell, and spool what it prints; raises KaError if it fails."""
    try:
        process = subprocess.Popen(list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    except OSError as error:
        raise KaError(Code.USAGE, f"cannot run {command[0]}: {error.strerror}") from None
    with process:
        assert process.stdout is not None
        spool = spool_stream(process.stdout.fileno(), directory)
    if process.returncode:
        os.close(spool)
        raise KaError(Code.EIO, f"{command[0]} ended with {process.returncode}")
    return spool
