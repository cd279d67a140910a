"""The system calls on chunk files, behind one small object.

`Disk` adds nothing but completeness: short reads and writes are continued, a file system without
holes is made to look as if it had them.  Tests put another object in its place to stop, refuse or
record; that is why every change of a chunk file goes through here.

Errors stay OSError; the chunk store translates them.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections import deque
from collections.abc import Sequence
from itertools import islice

from common import storage
from common.checksum import Buffer

__all__ = ["Disk"]

_IOVECS_MAX = 1024  # IOV_MAX of Linux

# A call that covers 2 MiB of the file makes the page cache take huge pages: in a virtual machine
# they are those that were given back to the host, and cost four times as much to fill.
_CALL_SIZE_MAX = 1 << 20
_ZEROS = bytes(1 << 20)

_sync_file_range = ctypes.CDLL(None, use_errno=True).sync_file_range
_sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_sync_file_range.restype = ctypes.c_int
_SYNC_FILE_RANGE_WRITE = 2


class Disk:
    """The real system calls."""

    def pwritev(self, fd: int, pieces: Sequence[Buffer], offset: int) -> None:
        """Write all *pieces* one after the other; a failure may leave a part written."""
        rest = deque(memoryview(piece) for piece in pieces if len(piece))
        while rest:
            call: list[Buffer] = []
            room = _CALL_SIZE_MAX
            for view in islice(rest, _IOVECS_MAX):
                call.append(view[:room])
                room -= len(call[-1])
                if not room:
                    break
            written = os.pwritev(fd, call, offset)
            offset += written
            while rest and written >= len(rest[0]):
                written -= len(rest.popleft())
            if written:
                rest[0] = rest[0][written:]

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """Return up to *length* bytes; less only at the end of the file."""
        data = os.pread(fd, length, offset)
        while data and len(data) < length:
            more = os.pread(fd, length - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def pread_now(self, fd: int, length: int, offset: int) -> bytes | None:
        """Return *length* bytes from the page cache; None if that would have to wait."""
        data = bytearray(length)
        try:
            count = os.preadv(fd, [data], offset, os.RWF_NOWAIT)
        except OSError:  # EAGAIN: not in memory; EOPNOTSUPP: the file system cannot tell
            return None
        return bytes(data) if count == length else None

    def ftruncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def punch(self, fd: int, offset: int, length: int) -> None:
        """Make a range inside the file read as zeros; gives its space back where possible."""
        if not storage.punch(fd, offset, length):
            end = min(offset + length, os.fstat(fd).st_size)
            while offset < end:
                offset += os.pwrite(fd, _ZEROS[: end - offset], offset)

    def allocate(self, fd: int, offset: int, length: int) -> None:
        """Reserve space so that writing there cannot run out of it; the size stays."""
        storage.allocate(fd, offset, length)

    def start_writeback(self, fd: int, offset: int, length: int) -> None:
        """Let the kernel begin to write a range to the disk; a hint, so failure is no matter."""
        _sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def fsync_directory(self, path: str) -> None:
        """Make the entries of a directory durable; one that is gone has none."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def next_data(self, fd: int, offset: int) -> int | None:
        """Return where the first allocated byte at or after *offset* is, or None."""
        try:
            return os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return None

    def next_hole(self, fd: int, offset: int) -> int:
        """Return where the first hole at or after *offset* is; the end of the file is one."""
        try:
            return os.lseek(fd, offset, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return offset
