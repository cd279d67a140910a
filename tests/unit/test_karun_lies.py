"""Nodes that lie: whatever one says, the head hangs up on it or goes on, with all others."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

import karun.engine
from karun.agent import frames
from karun.agent.channel import Channel
from karun.archive import Archive
from karun.connectors import local
from karun.engine import Engine, Limits
from karun.feed import CHUNK_SIZE
from karun.lines import STDERR, STDOUT
from karun.nodes import Names
from karun.orders import Invocation
from karun.output import Form, Style, make_printer
from karun.roster import _FIELD_COUNTS as FIELD_COUNTS

NODES = ("honest", "liar", "absent")
HONEST, LIAR, ABSENT = range(3)
NUMBERS = st.integers(-2, 5) | st.sampled_from((127, 255, 65535, 10**9, 10**19, -(10**9)))
FIELDS = NUMBERS | st.binary(max_size=3) | st.sampled_from(("connect:timeout", "lost", "1", ""))
RANKS = st.sampled_from((HONEST, LIAR, ABSENT, 3, frames.HEAD, frames.ALL))
EVENTS = st.sampled_from(tuple(FIELD_COUNTS)).flatmap(
    lambda kind: st.tuples(
        st.just(frames.EVENT),
        st.just(LIAR),
        st.tuples(st.just(kind), *[FIELDS] * FIELD_COUNTS[kind]),
    )
)
FRAMES = st.tuples(st.integers(0, 40), RANKS, st.lists(FIELDS, max_size=7).map(tuple))
Frame = tuple[int, int, tuple[bytes | str | int, ...]]


class _Sink:
    """What a command line makes of it all."""

    has_reader = True

    def __init__(self, form: Form) -> None:
        self.printer = make_printer(Names(NODES), self, Style(form, highest=True))

    def write(self, stream: int, data: bytes) -> None:
        assert stream in (STDOUT, STDERR)

    def output(self, rank: int, stream: int, data: bytes) -> None:
        self.printer.output(rank, stream, data)

    def exited(self, rank: int, code: int, signal: int) -> None:
        self.printer.exited(rank, code, signal)

    def failed(self, rank: int, stage: str, reason: str) -> None:
        self.printer.failed(rank, reason, stage)


class _Head:
    """A head that two nodes have come to, with a command for three; it calls nobody."""

    def __init__(self, form: Form, *, relayed: bool) -> None:
        """*relayed*: the liar's way to the head is by the honest node."""
        limits = Limits(window=0)
        self.engine = Engine(NODES, local("python3"), Archive(b"", ""), limits)
        self.engine.launch()
        self.sink = _Sink(form)
        self._ends = [self._child(HONEST)]
        self._ends.append(self._ends[0] if relayed else self._child(LIAR))
        self._told = [0, 0]
        for rank, end in enumerate(self._ends):
            attach = frames.pack(b"i", 1, 0, HONEST if relayed else frames.HEAD, b"", 0)
            end.send(frames.encode(frames.ATTACH, rank, attach))
            self.engine.step()
        self.engine.world(1, lambda rank, code, reason: None)
        self.command = self.engine.command(Invocation(("true",), fed=True), self.sink)

    def _child(self, rank: int) -> socket.socket:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        fd = ours.detach()
        channel = Channel(self.engine.loop, fd, fd)
        channel.peer = rank
        hub = self.engine._hub
        hub.children.add(channel)
        channel.start(hub._frame, hub._closed)
        return theirs

    def hear(self, node: int, kind: int, about: int, fields: tuple[bytes | str | int, ...]) -> None:
        """Let a node say something; who is not listened to any more says it to nobody."""
        if kind == frames.EVENT and about == node:
            self._told[node] += 1
            fields = (self._told[node], 0, *fields)
        self.say(node, frames.encode(kind, about, frames.pack(*fields)))

    def say(self, node: int, data: bytes) -> None:
        try:
            self._ends[node].send(data)
        except BrokenPipeError:
            pass
        self.engine.step()

    def heard_by(self, node: int) -> list[int]:
        """Return the kinds of the frames that the head has sent since this was last asked."""
        data = self._ends[node].recv(1 << 20)
        return [kind for kind, _rank, _payload in frames.Decoder().feed(data)]

    def close(self) -> None:
        self.engine.close()
        for end in self._ends:
            end.close()


def _lies(form: Form, said: list[Frame], *, relayed: bool) -> None:
    head = _Head(form, relayed=relayed)
    try:
        for frame in said:
            head.hear(LIAR, *frame)
        number = head.command.number
        head.hear(HONEST, frames.EVENT, HONEST, (frames.OUTPUT, number, STDOUT, b"well"))
        head.hear(HONEST, frames.EVENT, HONEST, (frames.EXITED, number, 0, 0))
        assert HONEST not in head.command.pending
        assert 0 <= head.sink.printer.finish() <= 255
    finally:
        head.close()


@given(st.sampled_from(Form), st.lists(EVENTS | FRAMES, max_size=12))
def test_a_node_that_lies_harms_nobody_else(form: Form, said: list[Frame]) -> None:
    _lies(form, said, relayed=False)


@given(st.sampled_from(Form), st.lists(EVENTS, max_size=12))
def test_nor_does_it_where_another_passes_on_what_it_says(form: Form, said: list[Frame]) -> None:
    _lies(form, said, relayed=True)


@given(st.lists(NUMBERS, max_size=8))
def test_nor_does_it_keep_input_from_others(sizes: list[int]) -> None:
    head = _Head(Form.LABELLED, relayed=False)
    engine = head.engine
    command = engine.command(Invocation(("cat",), fed=True), head.sink, ranks=[HONEST, LIAR])
    number, feed = command.number, command.feed
    assert feed is not None
    try:
        for size in sizes:
            engine.feed(command, b"x" * 1000)
            head.hear(LIAR, frames.EVENT, LIAR, (frames.CONSUMED, number, size))
        sent_size = 1000 * len(sizes)
        while feed.room:
            engine.feed(command, b"x" * CHUNK_SIZE)
            sent_size += CHUNK_SIZE
        head.hear(HONEST, frames.EVENT, HONEST, (frames.CONSUMED, number, sent_size))
        head.hear(LIAR, frames.EVENT, LIAR, (frames.EXITED, number, 0, 0))
        assert feed.room
    finally:
        head.close()


def test_nor_does_it_make_all_introduce_themselves_each_time_that_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(karun.engine, "RESYNC_S", 0.0)
    head = _Head(Form.LABELLED, relayed=False)
    try:
        for first in (1, 6):
            strangers = [
                frames.encode(frames.ATTACH, LIAR, frames.pack(b"j", count, 0, frames.HEAD, b"", 0))
                for count in range(first, first + 5)
            ]
            head.say(LIAR, b"".join(strangers))
            head.engine.step()
            assert head.heard_by(HONEST).count(frames.RESYNC) == 1
    finally:
        head.close()
