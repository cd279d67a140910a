"""The agent's loop, and what a channel asks of it."""

import socket
from collections.abc import Iterator
from time import monotonic

import pytest

from karun.agent.channel import Channel
from karun.agent.loop import READ, Loop


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_loop_that_grows_keeps_what_it_watches(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    loop = Loop()
    seen: list[bytes] = []
    loop.watch(ours.fileno(), READ, lambda _events: seen.append(ours.recv(9)))
    for word in (b"few", b"many"):
        theirs.send(word)
        loop.step(5)
        loop.grow()
    assert seen == [b"few", b"many"]
    loop.unwatch(ours.fileno())
    theirs.send(b"nobody")
    loop.step(0)
    assert len(seen) == 2
    loop.close()


@pytest.mark.parametrize("is_grown", [False, True])
def test_a_step_takes_as_long_as_it_was_given(is_grown: bool) -> None:
    loop = Loop()
    if is_grown:
        loop.grow()
    begun = loop.now
    loop.step(0.05)
    assert loop.now - begun >= 0.05


def test_timers_run_in_turn_and_not_when_cancelled() -> None:
    loop = Loop()
    ran: list[str] = []
    loop.at(0.02, lambda: ran.append("later"))
    loop.at(0.01, lambda: ran.append("cancelled")).cancel()
    loop.at(0.0, lambda: ran.append("at once"))
    while loop.timeout() is not None:
        loop.step(loop.timeout())
    assert ran == ["at once", "later"]


@pytest.mark.parametrize("is_grown", [False, True])
def test_a_channel_that_has_sent_what_it_held_leaves_the_loop_alone(
    pair: tuple[socket.socket, socket.socket], is_grown: bool
) -> None:
    ours, theirs = pair
    loop = Loop()
    if is_grown:
        loop.grow()

    channel = Channel(loop, ours.fileno(), ours.fileno())
    channel.start(lambda *_frame: None, lambda *_end: None)
    sent = b"x" * (1 << 20)
    channel.send_raw(sent)
    assert channel.held_size
    received = 0
    while received < len(sent):
        received += len(theirs.recv(1 << 20))
        if channel.held_size:
            loop.step(5)
    assert not channel.held_size
    begun = monotonic()
    loop.step(0.05)  # a channel that still asks whether it may write is told so at once
    assert loop.now - begun >= 0.05
