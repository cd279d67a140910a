"""Sockets: how TCP is told to send."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from common.sockets import flow_evenly

AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")


def congestion_control(sock: socket.socket) -> bytes:
    name: bytes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return name.rstrip(b"\0")


@pytest.mark.parametrize(("before", "after"), [(b"bbr", b"cubic"), (b"reno", b"reno")])
def test_what_a_listener_accepts_does_not_pause_to_measure(before: bytes, after: bytes) -> None:
    available = AVAILABLE.read_text().split()
    missing = {before.decode(), after.decode()}.difference(available)
    if missing:
        pytest.skip(f"this kernel has no {missing}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, before)
        flow_evenly(server)
        with socket.create_connection(server.getsockname()), server.accept()[0] as accepted:
            assert congestion_control(accepted) == after


def test_a_socket_that_is_not_tcp_is_left_alone() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        flow_evenly(ours)
        ours.send(b"x")
        assert theirs.recv(1) == b"x"
