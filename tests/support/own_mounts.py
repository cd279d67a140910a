"""A mount namespace for this process.  Needs root."""

from __future__ import annotations

import ctypes
import os
import threading

__all__ = ["unshare"]

CLONE_NEWNS = 0x20000
MS_REC, MS_PRIVATE = 0x4000, 1 << 18


def unshare() -> None:
    """Leave the mounts of other processes alone from now on, as they leave ours."""
    assert threading.get_native_id() == os.getpid(), "/proc/self would tell of other mounts"
    libc = ctypes.CDLL(None, use_errno=True)
    flags = ctypes.c_ulong(MS_REC | MS_PRIVATE)
    if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, flags, None):
        raise OSError(ctypes.get_errno(), "no mount namespace for this worker")
