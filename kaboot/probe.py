"""Is there another DHCP server?  One question asked as a machine would, and who answers.

`kaboot check` asks: two servers that both give addresses in one network are the commonest reason
why machines boot now and then; none at all, why they never do beside a "foreign" one.

The packets (RFC 2131) are made and read by functions without I/O; `ask` sends the question and
listens.  The question takes no address: it is an offer that is never requested.

Not here: DHCP for machines, which is dnsmasq's.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
import time
from collections.abc import Iterator

__all__ = ["ask", "make_discover", "parse_offer"]

ANSWER_S = 5.0
"""Servers make sure that nobody has an address before they offer it: dnsmasq takes 3 s for that."""
PACKET_SIZE_MAX = 1500
_SERVER_PORT, _CLIENT_PORT = 67, 68
_HEADER = struct.Struct("!BBBB4sHH4s4s4s4s16s64s128s4s")
_MAGIC = b"\x63\x82\x53\x63"
_BROADCAST = 0x8000
_PAD, _MESSAGE_TYPE, _SERVER, _PARAMETERS, _VENDOR, _END = 0, 53, 54, 55, 60, 255
_DISCOVER, _OFFER = 1, 2
_NOBODY = bytes(4)


def make_discover(mac: bytes, transaction: bytes) -> bytes:
    """Return a DHCPDISCOVER whose answers are to be broadcast."""
    header = _HEADER.pack(
        1, 1, 6, 0, transaction, 0, _BROADCAST, _NOBODY, _NOBODY, _NOBODY, _NOBODY,
        mac.ljust(16, b"\0"), bytes(64), bytes(128), _MAGIC,
    )  # fmt: skip
    options = bytes([_MESSAGE_TYPE, 1, _DISCOVER, _PARAMETERS, 2, 1, 3, _END])
    return (header + options).ljust(300, b"\0")


def parse_offer(packet: bytes, transaction: bytes) -> ipaddress.IPv4Address | None:
    """Return who offers an address in an answer to our question; None if it is something else."""
    if len(packet) < _HEADER.size:
        return None
    kind, _, _, _, number, *_, magic = _HEADER.unpack_from(packet)
    if kind != 2 or number != transaction or magic != _MAGIC:
        return None
    options = dict(_options(packet[_HEADER.size :]))
    server = options.get(_SERVER, b"")
    offered = packet[16:20] != _NOBODY
    if options.get(_MESSAGE_TYPE) != bytes([_OFFER]) or len(server) != 4 or not offered:
        return None
    return ipaddress.IPv4Address(server)


def _options(data: bytes) -> Iterator[tuple[int, bytes]]:
    place = 0
    while place < len(data) and data[place] != _END:
        if data[place] == _PAD:
            place += 1
            continue
        if place + 2 > len(data):
            return
        size = data[place + 1]
        yield data[place], data[place + 2 : place + 2 + size]
        place += 2 + size


def ask(interface: str, *, answer_s: float = ANSWER_S) -> set[ipaddress.IPv4Address]:
    """Return the DHCP servers that answer on an interface; raises OSError (it needs root)."""
    transaction = os.urandom(4)
    # A locally administered address of nobody's: no server keeps it for a machine of the room.
    question = make_discover(b"\x02ka" + os.urandom(3), transaction)
    found: set[ipaddress.IPv4Address] = set()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        asker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        asker.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        asker.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        asker.bind(("0.0.0.0", _CLIENT_PORT))
        asker.sendto(question, ("255.255.255.255", _SERVER_PORT))
        deadline = time.monotonic() + answer_s
        while (left := deadline - time.monotonic()) > 0:
            asker.settimeout(left)
            with contextlib.suppress(TimeoutError):
                server = parse_offer(asker.recv(PACKET_SIZE_MAX), transaction)
                if server is not None:
                    found.add(server)
    return found
