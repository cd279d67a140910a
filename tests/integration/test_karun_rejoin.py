"""The way back to an ancestor over TCP (karun/agent/rejoin.py): who is turned away comes again."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from time import monotonic

import pytest

from karun.agent import frames, proof
from karun.agent.channel import Channel
from karun.agent.loop import READ, Loop
from karun.agent.rejoin import Rejoin
from karun.agent.setup import Setup

TOKEN = b"t" * 32
RANK, ANCESTOR = 7, 3
PATIENCE_S = 30.0


class Door:
    """An ancestor that turns away who comes until it has time."""

    def __init__(self, loop: Loop) -> None:
        self.busy_count = 0
        self.turned_away_count = 0
        self._loop = loop
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self._channels: list[Channel] = []
        self._nonce = os.urandom(proof.NONCE_SIZE)
        self.address = self._listener.getsockname()
        loop.watch(self._listener.fileno(), READ, self._knock)

    def close(self) -> None:
        for channel in self._channels:
            channel.close("over")
        self._listener.close()

    def _knock(self, _events: int) -> None:
        guest, _address = self._listener.accept()
        if self.turned_away_count < self.busy_count:
            self.turned_away_count += 1
            guest.close()
            return
        fd = guest.detach()
        channel = Channel(self._loop, fd, fd)
        self._channels.append(channel)
        channel.start(self._proved, lambda _channel, _reason: None)
        channel.send(frames.CHALLENGE, 0, frames.pack(self._nonce))

    def _proved(self, channel: Channel, kind: int, rank: int, payload: bytes) -> None:
        theirs = proof.proved(TOKEN, rank, self._nonce, payload)
        assert (kind, rank) == (frames.PROVE, RANK)
        assert theirs is not None
        answer = proof.accept(TOKEN, ANCESTOR, rank, self._nonce, theirs)
        channel.send(frames.ACCEPT, rank, answer)


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def door(loop: Loop) -> Iterator[Door]:
    door = Door(loop)
    yield door
    door.close()


class Search:
    """A node that looks for its way back, from its start to what it has found."""

    def __init__(self, loop: Loop, door: Door) -> None:
        self.found: list[tuple[int, int]] = []
        setup = Setup(b"run", TOKEN, RANK, "n7", 10, ANCESTOR, [door.address], 2.0, 30.0)
        Rejoin(loop, setup, 0, self._reached)

    def _reached(self, channel: Channel, rank: int, index: int) -> None:
        self.found.append((rank, index))
        channel.closed = lambda _channel, _reason: None
        channel.close("over")


def until_found(loop: Loop, search: Search) -> None:
    late_s = monotonic() + PATIENCE_S
    while not search.found and monotonic() < late_s:
        loop.step(loop.timeout())


def test_a_node_that_a_busy_ancestor_turns_away_comes_again(loop: Loop, door: Door) -> None:
    door.busy_count = 2
    search = Search(loop, door)
    until_found(loop, search)
    assert door.turned_away_count == 2
    assert search.found == [(ANCESTOR, 0)]


def test_a_node_without_a_descriptor_left_comes_again_when_it_has_one(
    loop: Loop, door: Door
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    least = os.dup(0)
    os.close(least)
    resource.setrlimit(resource.RLIMIT_NOFILE, (least, hard))
    try:
        search = Search(loop, door)
        for _ in range(3):
            loop.step(loop.timeout())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not search.found
    until_found(loop, search)
    assert search.found == [(ANCESTOR, 0)]
