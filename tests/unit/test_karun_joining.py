"""What a session does for a program that has joined it: its commands, its input, its end."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karun import session_wire as wire
from karun.agent import frames
from karun.feed import FEED_SIZE_MAX, Feed
from karun.joining import OWED_SIZE_MAX, Member
from karun.orders import Command, Invocation, Sink

WORDS = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)


class Nodes:
    """Takes orders, and keeps them."""

    def __init__(self) -> None:
        self.closed = False
        self.commands: list[tuple[Command, Invocation]] = []
        self.said: list[tuple[str, int]] = []

    def command(
        self, invocation: Invocation, sink: Sink, *, ranks: Sequence[int] | None = None
    ) -> Command:
        assert ranks is not None
        feed = Feed(ranks) if invocation.fed else None
        command = Command(len(self.commands) + 100, ranks, sink, feed, invocation.limit_s)
        self.commands.append((command, invocation))
        return command

    def feed(self, command: Command, data: bytes) -> None:
        assert command.feed is not None
        command.feed.sent(len(data))

    def end_input(self, command: Command) -> None:
        self.said.append(("end", command.number))

    def signal(self, command: Command, number: int) -> None:
        self.said.append((f"signal {number}", command.number))

    def abandon(self, command: Command) -> None:
        self.said.append(("abandon", command.number))


class Session:
    """A member with nodes 7, 3 and 5 of a session."""

    def __init__(self) -> None:
        self.nodes = Nodes()
        self.told: list[tuple[int, int, list[bytes]]] = []
        self.member = Member(self.nodes, [7, 3, 5], self._say)

    def _say(self, kind: int, rank: int, payload: bytes) -> None:
        self.told.append((kind, rank, wire.fields_of(kind, payload)))

    def take(self, kind: int, *fields: bytes | str | int) -> None:
        self.member.take(kind, frames.pack(*fields))

    def command(self, number: int, ranks: str = "0 1 2") -> Command:
        fields = Invocation(["cat"], fed=True).fields()
        self.take(wire.COMMAND, number, ranks, *fields)
        return self.nodes.commands[-1][0]

    def taken(self) -> int:
        return sum(int(fields[1]) for kind, _rank, fields in self.told if kind == wire.TAKEN)


@given(
    st.lists(WORDS, max_size=4), st.lists(WORDS, max_size=3), WORDS, st.integers(0, 10**9),
    st.tuples(*[st.booleans()] * 5),
)  # fmt: skip
def test_an_invocation_is_what_it_was_after_the_wire(
    argv: list[str], env: list[str], cwd: str, limit_ms: int, flags: tuple[bool, ...]
) -> None:
    named = dict(zip(("line", "pty", "fed", "task", "sudo"), flags, strict=True))
    sent = Invocation(argv, env=env, cwd=cwd, limit_s=limit_ms / 1000, **named)
    fields = frames.unpack(frames.pack(*sent.fields()))
    assert Invocation.of(fields).fields() == sent.fields()


def test_ranks_are_the_clients_whatever_they_are_in_the_session() -> None:
    session = Session()
    command = session.command(1, "0 2")
    assert command.pending == {7, 5}
    command.sink.output(5, 1, b"five")
    command.sink.exited(7, 4, 0)
    command.sink.failed(5, "lost", "why")
    assert session.told == [
        (wire.OUTPUT, 2, [b"1", b"1", b"five"]),
        (wire.EXITED, 0, [b"1", b"4", b"0"]),
        (wire.FAILED, 2, [b"1", b"lost", b"why"]),
    ]


def test_input_is_taken_when_the_slowest_node_has_room() -> None:
    session = Session()
    feed = session.command(1).feed
    assert feed is not None
    session.take(wire.FEED, 1, bytes(FEED_SIZE_MAX // 2))
    assert session.taken() == FEED_SIZE_MAX // 2
    session.take(wire.FEED, 1, bytes(FEED_SIZE_MAX // 2))
    for rank in (7, 5):
        feed.consumed(rank, FEED_SIZE_MAX)
    assert session.taken() == FEED_SIZE_MAX // 2
    feed.consumed(3, FEED_SIZE_MAX)
    assert session.taken() == FEED_SIZE_MAX


def test_input_of_a_command_that_has_ended_is_taken() -> None:
    session = Session()
    command = session.command(1)
    command.done()
    session.take(wire.FEED, 1, b"late")
    session.take(wire.FEED_END, 1)
    session.take(wire.ABANDON, 1)
    assert (session.taken(), session.nodes.said) == (4, [])


def test_a_client_that_goes_ends_its_own_commands_and_no_others() -> None:
    session = Session()
    first, second, third = (session.command(number) for number in (1, 2, 3))
    session.take(wire.SIGNAL, 2, 15)
    session.take(wire.ABANDON, 2)
    third.done()
    session.member.close()
    assert session.nodes.said == [
        ("signal 15", second.number), ("abandon", second.number), ("abandon", first.number),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (wire.COMMAND, (1, "0", *Invocation(["true"]).fields())),  # the number is taken
        (wire.COMMAND, (2, "3", *Invocation(["true"]).fields())),
        (wire.COMMAND, (2, "0 0", *Invocation(["true"]).fields())),
        (wire.COMMAND, (2, "-1", *Invocation(["true"]).fields())),
        (wire.COMMAND, (2, "0", "", "soon", "", "", "")),
        (wire.COMMAND, (2, "0", "")),
        (wire.SIGNAL, (1, 0)),
        (wire.SIGNAL, (1, 65)),
        (wire.FEED, ("--1", b"")),
        (wire.JOIN, (1,)),
        (99, (1,)),
    ],
)
def test_what_no_client_says_is_refused(kind: int, fields: tuple[bytes | str | int, ...]) -> None:
    session = Session()
    session.command(1)
    with pytest.raises(frames.FrameError):
        session.take(kind, *fields)
    assert len(session.nodes.commands) == 1


def test_a_client_that_does_not_wait_for_room_is_refused() -> None:
    session = Session()
    session.command(1)
    for _ in range(1 + OWED_SIZE_MAX // FEED_SIZE_MAX):  # the first leaves some room, and is taken
        session.take(wire.FEED, 1, bytes(FEED_SIZE_MAX - 1))
    with pytest.raises(frames.FrameError, match="more input"):
        session.take(wire.FEED, 1, bytes(FEED_SIZE_MAX))


@given(
    st.integers(30, 40),
    st.lists(st.binary(max_size=12) | st.sampled_from([b"1", b"2", b"0 1", b"si"]), max_size=8),
)
def test_whatever_a_client_says_is_done_or_refused(kind: int, fields: list[bytes]) -> None:
    session = Session()
    session.command(1)
    for payload in (frames.pack(*fields), b"".join(fields)):
        with contextlib.suppress(frames.FrameError):
            session.member.take(kind, payload)
    session.member.close()
