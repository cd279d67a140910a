"""Giving up root, all but what DHCP needs.

The server starts as root and becomes `Site.user` before it reads its first request.  It keeps three
capabilities, and hands them to dnsmasq as ambient ones: binding ports below 1024, raw packets to
machines without an address, and entries in the ARP table.  With them dnsmasq can be started again
at any time, which a process without root could not do otherwise.

Called in the only thread: capabilities belong to threads.
"""

from __future__ import annotations

import ctypes
import os
import pwd
from collections.abc import Iterable
from pathlib import Path

from common.errors import Code, KaError

__all__ = ["become"]

_NET_BIND_SERVICE, _NET_ADMIN, _NET_RAW = 10, 12, 13
_KEPT = (_NET_BIND_SERVICE, _NET_ADMIN, _NET_RAW)
_PR_SET_KEEPCAPS, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 8, 38, 47
_PR_CAP_AMBIENT_RAISE = 2
_CAPABILITY_VERSION_3 = 0x20080522


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Data(ctypes.Structure):
    _fields_ = [
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    ]


def become(user: str, own: Iterable[Path]) -> None:
    """Become a user who owns these files and directories; raises KaError.

    Without root, or for the user root, only gaining privileges is given up.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0 and user != "root":
        try:
            entry = pwd.getpwnam(user)
        except KeyError:
            raise KaError(Code.USAGE, f"no user {user} on this host ('user' in [site])") from None
        for path in own:
            os.chown(path, entry.pw_uid, entry.pw_gid, follow_symlinks=False)
        _call(libc.prctl, _PR_SET_KEEPCAPS, 1, 0, 0, 0)
        os.setgroups([])
        os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
        os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
        mask = sum(1 << capability for capability in _KEPT)
        data = (_Data * 2)(_Data(mask, mask, mask), _Data(0, 0, 0))
        _call(libc.capset, ctypes.byref(_Header(_CAPABILITY_VERSION_3, 0)), data)
        for capability in _KEPT:
            _call(libc.prctl, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability, 0, 0)
    _call(libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _call(function: ctypes._NamedFuncPointer, *arguments: object) -> None:
    if function(*arguments) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise KaError(Code.EPERM, f"cannot keep what DHCP needs without root: {reason}")
