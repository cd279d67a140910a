"""Telling a machine that asks for an IPv6 router that there is none here.

iPXE sets up IPv6 along with IPv4, and where no router answers it waits 13 s for one, at every boot.
kaboot boots by IPv4 alone.  So where it gives out the addresses, it answers router solicitations
(RFC 4861) with an advertisement that offers nothing: no route, no prefix, no other server.  It goes
to the asker alone, and is in no real router's way.
"""

from __future__ import annotations

import ipaddress
import socket
import struct

import trio

from common import log

__all__ = ["ADVERTISEMENT", "answer_solicitations"]

_SOLICITATION, _ADVERTISEMENT = 133, 134
ADVERTISEMENT = struct.pack("!BBHBBHII", _ADVERTISEMENT, 0, 0, 0, 0, 0, 0, 0)
"""A lifetime of 0 s is that of no router.  The kernel fills in the checksum."""
_HOPS = 255
"""What comes from another network has fewer left."""
_ALL_ROUTERS = "ff02::2"
_ICMP6_FILTER = 1
_PACKET_SIZE_MAX = 1500

_log = log.get("kaboot.no_router")


async def answer_solicitations(interface: str) -> None:
    """Answer an interface's machines until cancelled; return where there is no IPv6."""
    try:
        listener = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        with listener:
            _listen(listener, interface)
            await _serve(trio.socket.from_stdlib_socket(listener))
    except OSError as error:
        _log.info("ipv6.absent", interface=interface, reason=error.strerror)


def _listen(listener: socket.socket, interface: str) -> None:
    """Let solicitations in, and nothing else."""
    blocked = [0xFFFFFFFF] * 8
    blocked[_SOLICITATION // 32] &= ~(1 << _SOLICITATION % 32)
    group = socket.inet_pton(socket.AF_INET6, _ALL_ROUTERS)
    group += struct.pack("@I", socket.if_nametoindex(interface))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
    listener.setsockopt(socket.IPPROTO_ICMPV6, _ICMP6_FILTER, struct.pack("@8I", *blocked))
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, _HOPS)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group)


async def _serve(listener: trio.socket.SocketType) -> None:
    room = socket.CMSG_SPACE(struct.calcsize("@i"))
    while True:
        _, ancillary, _, sender = await listener.recvmsg(_PACKET_SIZE_MAX, room)
        assert isinstance(sender, tuple)
        hops = [data for _, kind, data in ancillary if kind == socket.IPV6_HOPLIMIT]
        address = ipaddress.IPv6Address(str(sender[0]))
        if hops != [struct.pack("@i", _HOPS)] or not address.is_link_local:
            continue
        try:
            await listener.sendto(ADVERTISEMENT, sender)
        except OSError as error:  # switched off meanwhile, say
            _log.debug("advertisement.failed", to=sender[0], reason=error.strerror)
