"""Sockets: addresses, listening, connecting.  What is said on them is `endpoint`'s business.

Addresses: `host:port` or `[v6]:port` for TCP, a path for a unix socket.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat

import trio

from common.errors import Code, KaError

__all__ = [
    "connect_tcp",
    "connect_unix",
    "flow_evenly",
    "listen",
    "parse_address",
    "prepare",
    "start_quickly",
]

BACKLOG = 1024
SOCKET_BUFFER_SIZE = 4 * 1024 * 1024
"""Of unix sockets; TCP tunes itself."""
START_WINDOW_SIZE = 1024 * 1024
"""Full of it, a gigabit link is busy for 8 ms: a longer way than any within a cluster."""
KEEPALIVE_IDLE_S = 30
KEEPALIVE_INTERVAL_S = 10
KEEPALIVE_COUNT = 3
"""A vanished host is noticed after a minute, not after the kernel's two hours."""


def parse_address(text: str) -> tuple[str, int]:
    """Return (host, port) of `host:port` or `[v6]:port`; raises KaError USAGE."""
    host, colon, port = text.rpartition(":")
    digits = port.isascii() and port.isdigit() and len(port) <= 5
    if not colon or not host or not digits or int(port) > 65535:
        raise KaError(Code.USAGE, f"not an address (host:port): {text!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def listen(address: str, path: str = "") -> list[socket.socket]:
    """Return listening sockets for a TCP address and, if *path* is given, a unix socket.

    A stale unix socket is replaced.  The unix socket is open to every local user: the handshake
    is what protects it.  Raises KaError BUSY when an address is in use.
    """
    sockets: list[socket.socket] = []
    where = address
    try:
        if address:
            host, port = parse_address(address)
            info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            sock = socket.socket(info[0], socket.SOCK_STREAM)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(info[4])
        where = path
        if path:
            sockets.append(_bind_unix(path))
        for sock in sockets:
            where = str(sock.getsockname())
            sock.listen(BACKLOG)
            sock.setblocking(False)
    except OSError as error:
        for sock in sockets:
            sock.close()
        reason = error.strerror or str(error)
        raise KaError(Code.BUSY, f"cannot listen on {where}: {reason}") from None
    return sockets


def _bind_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_stale(path):
            os.unlink(path)
        sock.bind(path)
        os.chmod(path, 0o666)
    except OSError:
        sock.close()
        raise
    return sock


def _is_stale(path: str) -> bool:
    """Whether *path* is a unix socket that nobody listens on."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False  # somebody's file: bind will refuse
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            probe.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


async def connect_unix(path: str) -> socket.socket | None:
    """Return a connected socket, or None where TCP should be tried.

    The path may be left over, or be another host's on a shared file system.
    """
    try:
        return await _connect(socket.AF_UNIX, path)
    except (FileNotFoundError, ConnectionRefusedError, PermissionError):
        return None


async def connect_tcp(address: str) -> socket.socket:
    """Return a socket connected to `host:port`; raises OSError, or KaError USAGE."""
    host, port = parse_address(address)
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for info in found[:-1]:  # a name may have addresses that nobody listens on
        try:
            return await _connect(info[0], info[4])
        except OSError:
            continue
    return await _connect(found[-1][0], found[-1][4])


async def _connect(family: int, target: object) -> socket.socket:
    trio_socket = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        await trio_socket.connect(target)
    except BaseException:
        trio_socket.close()
        raise
    return socket.socket(
        trio_socket.family, trio_socket.type, trio_socket.proto, trio_socket.detach()
    )


def prepare(sock: socket.socket) -> None:
    """Set a connected socket up for frames."""
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_SIZE)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)
        gone_ms = 1000 * (KEEPALIVE_IDLE_S + KEEPALIVE_COUNT * KEEPALIVE_INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, gone_ms)


def start_quickly(sock: socket.socket) -> None:
    """Have TCP find its rate quickly on a connection that is new.

    CUBIC ends slow start when the round trip becomes longer (HyStart).  On a link that others fill
    it does so at once, at a few percent of the rate, and needs seconds to get its share of the
    link: this is what a node that has got another parent would wait for.  Reno goes on until
    something is lost or the window is full.  `flow_evenly` is for when that is over.

    The window is the receiver's guess, from how fast it has come so far, and on a full link that
    guess was seen to stay at half of the rate for seconds.  So there is room from the beginning.
    """
    used = _congestion_control(sock)
    if not used:
        return
    if used.startswith((b"cubic", b"bbr")):
        _set_congestion_control(sock, b"reno")
    # SO_RCVBUF would be for good, and at most net.core.rmem_max.  A low water mark makes as much
    # room as it needs, which stays, and the kernel goes on to make more.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, START_WINDOW_SIZE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


def flow_evenly(sock: socket.socket) -> None:
    """Have TCP send without pauses, by what this machine uses for long: after `start_quickly`.

    Not by BBR: it all but stops for 0.2 s every 10 s, to measure the way when it is empty.  In a
    chain each node's pauses delay all that are behind it.
    """
    if _congestion_control(sock).startswith(b"reno"):
        with socket.socket(sock.family) as fresh:
            usual = _congestion_control(fresh)
        _set_congestion_control(sock, b"cubic" if usual.startswith(b"bbr") else usual)


def _congestion_control(sock: socket.socket) -> bytes:
    """Return the name of TCP's congestion control; of what is not TCP: nothing."""
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    except OSError:
        return b""


def _set_congestion_control(sock: socket.socket, name: bytes) -> None:
    with contextlib.suppress(OSError):  # not loaded, or not allowed to everybody
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)
