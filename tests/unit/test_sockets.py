"""Sockets: how TCP is told to send."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from common.sockets import flow_evenly, start_quickly

AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")


def congestion_control(sock: socket.socket) -> bytes:
    name: bytes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return name.rstrip(b"\0")


def needs(*names: bytes) -> None:
    missing = {name.decode() for name in names}.difference(AVAILABLE.read_text().split())
    if missing:
        pytest.skip(f"this kernel has no {missing}")


def usual() -> bytes:
    """Return what this machine uses where nothing else is asked for."""
    with socket.socket() as fresh:
        return congestion_control(fresh)


@pytest.mark.parametrize("before", [b"cubic", b"bbr"])
def test_a_connection_starts_by_reno_and_goes_on_without_pauses(before: bytes) -> None:
    needs(before, b"reno", b"cubic")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, before)
        with socket.create_connection(server.getsockname()), server.accept()[0] as accepted:
            start_quickly(accepted)
            assert congestion_control(accepted) == b"reno"
            flow_evenly(accepted)
            assert congestion_control(accepted) == (b"cubic" if usual() == b"bbr" else usual())


def test_a_socket_that_is_not_tcp_is_left_alone() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        start_quickly(ours)
        flow_evenly(ours)
        ours.send(b"x")
        assert theirs.recv(1) == b"x"
