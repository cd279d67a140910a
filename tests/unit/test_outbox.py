"""Laws of the outbox: what was queued leaves whole and in order, also while it still grows."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.outbox import Growing, GrowingPayload, Outbox

DATA = bytes(range(256)) * 4096


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def pump(outbox: Outbox, theirs: socket.socket) -> bytes:
    """Send what can be sent, and return what has arrived."""
    arrived = bytearray()
    while True:
        try:
            outbox.pump()
            is_full = False
        except BlockingIOError:
            is_full = True
        try:
            while part := theirs.recv(1 << 20):
                arrived += part
        except BlockingIOError:
            pass
        if not is_full:
            return bytes(arrived)


def growing_in(path: Path, offset: int) -> Growing:
    """Return what is still to come, with a file that has other bytes than memory."""
    path.write_bytes(bytes(offset) + DATA.swapcase())
    growing = Growing(memoryview(bytearray(DATA)))
    growing.place = os.open(path, os.O_RDONLY), offset
    return growing


def test_what_grows_leaves_as_far_as_it_has_come_and_what_follows_waits(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    outbox = Outbox(ours)
    growing = Growing(memoryview(bytearray(DATA)))
    outbox.put((b"before", GrowingPayload(growing), b"behind"))
    assert pump(outbox, theirs) == b"before"
    growing.grow(1000)
    assert pump(outbox, theirs) == DATA[:1000]
    growing.grow(len(DATA))
    assert pump(outbox, theirs) == DATA[1000:] + b"behind"
    assert not outbox
    assert outbox.size == 0


def test_what_one_outbox_waits_for_no_longer_the_others_still_wait_for(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    outbox = Outbox(ours)
    growing = Growing(memoryview(bytearray(DATA)))
    payloads = [GrowingPayload(growing), GrowingPayload(growing)]
    outbox.put((payloads[0], b"behind"))
    growing.grow(1000)
    assert pump(outbox, theirs) == DATA[:1000]
    payloads[0].given_up = True
    assert pump(outbox, theirs) == DATA[1000:] + b"behind"
    assert payloads[1].ready_size == 1000


def test_what_is_stored_leaves_from_the_file_and_the_rest_from_memory(
    pair: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    ours, theirs = pair
    outbox = Outbox(ours)
    growing = growing_in(tmp_path / "file", 4096)
    outbox.put((GrowingPayload(growing), b"behind"))
    growing.stored_size = 300_000
    growing.grow(400_000)
    expected = DATA.swapcase()[:300_000] + DATA[300_000:400_000]
    assert pump(outbox, theirs) == expected
    growing.give_up()
    assert pump(outbox, theirs) == DATA[400_000:] + b"behind"


@pytest.mark.parametrize("size", [0, 5000])
def test_a_file_that_cannot_be_sent_is_replaced_by_memory(
    pair: tuple[socket.socket, socket.socket], tmp_path: Path, size: int
) -> None:
    ours, theirs = pair
    outbox = Outbox(ours)
    growing = growing_in(tmp_path / "file", 0)
    os.truncate(tmp_path / "file", size)
    if not size:
        assert growing.place is not None
        os.close(growing.place[0])
    outbox.put((GrowingPayload(growing), b"behind"))
    growing.stored_size = len(DATA)
    growing.grow(len(DATA))
    assert pump(outbox, theirs) == DATA.swapcase()[:size] + DATA[size:] + b"behind"
