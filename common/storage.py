"""System calls on files and disks that Python's `os` does not have.  They raise OSError."""

from __future__ import annotations

import ctypes
import errno
import os

__all__ = ["allocate", "punch", "sync_file_system"]

_FALLOC_KEEP_SIZE = 1
_FALLOC_PUNCH_HOLE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.syncfs.argtypes = [ctypes.c_int]


def punch(fd: int, offset: int, length: int) -> bool:
    """Make a range read as zeros and give its space back; False where that cannot be promised.

    Of a disk the range must be whole sectors, and is discarded only if zeros are certain then.
    """
    return _fallocate(fd, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, offset, length)


def allocate(fd: int, offset: int, length: int) -> bool:
    """Reserve space so that writing cannot run out of it; the size stays.  False: no such way."""
    return _fallocate(fd, _FALLOC_KEEP_SIZE, offset, length)


def sync_file_system(fd: int) -> None:
    """Put a whole file system on stable storage.

    Raises what went wrong since *fd* was opened, in writing any of its files: open it before.
    """
    if _libc.syncfs(fd):
        raise _last_error()


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    while _libc.fallocate(fd, mode, offset, length):
        error = _last_error()
        if error.errno == errno.EOPNOTSUPP:
            return False
        if error.errno != errno.EINTR:
            raise error
    return True


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
