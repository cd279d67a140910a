"""The group of a multicast pass: its address, and sockets that send into it or hear it.

Group and port follow from the transfer id, so two transfers seldom meet; if they do, each drops the
other's datagrams.  The group is of the administratively scoped ones, and no router passes them on
(time to live 1).  The interface is that of the route between the source and the nodes.  IPv4 only.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable

from common.errors import Code, KaError
from common.sockets import parse_address

__all__ = ["group_of", "open_listener", "open_sender"]

PORT_MIN, PORT_COUNT = 32768, 16384
"""None of the well-known ones."""
TTL = 1
BUFFER_SIZE = 8 << 20
"""Of a listener: what comes while it sums a chunk, or does not run."""
_SO_RCVBUFFORCE = 33


def group_of(transfer_id: bytes) -> tuple[str, int]:
    """Return the group's address and port."""
    digest = hashlib.blake2b(transfer_id, digest_size=4, person=b"ka group").digest()
    port = PORT_MIN + int.from_bytes(digest[2:], "big") % PORT_COUNT
    return f"239.255.{digest[0]}.{digest[1]}", port


def open_sender(transfer_id: bytes, towards: str) -> socket.socket:
    """Return a socket connected to the group; *towards*: a node's address.

    Raises KaError UNREACHABLE.  May look up a name.
    """
    group = group_of(transfer_id)
    return _opened(towards, lambda sock, here: _aim(sock, here, group))


def open_listener(transfer_id: bytes, towards: str) -> socket.socket:
    """Return a socket that hears the group; *towards*: the source's address.  As above."""
    group = group_of(transfer_id)
    return _opened(towards, lambda sock, here: _join(sock, here, group))


def _opened(towards: str, set_up: Callable[[socket.socket, bytes], None]) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        set_up(sock, _local_address(towards))
    except OSError as error:
        sock.close()
        reason = f"no multicast towards {towards}: {error.strerror or error}"
        raise KaError(Code.UNREACHABLE, reason) from None
    return sock


def _local_address(towards: str) -> bytes:
    """Return the address of the interface that leads there."""
    host, port = parse_address(towards)
    target = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_DGRAM)[0][4]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing
        return socket.inet_aton(probe.getsockname()[0])


def _aim(sock: socket.socket, here: bytes, group: tuple[str, int]) -> None:
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, here)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, TTL)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)  # nodes may be on this machine
    sock.connect(group)


def _join(sock: socket.socket, here: bytes, group: tuple[str, int]) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, BUFFER_SIZE)
    except OSError:  # only root may have more than the machine's limit
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_SIZE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # several nodes on one machine
    sock.bind(group)
    membership = socket.inet_aton(group[0]) + here
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
