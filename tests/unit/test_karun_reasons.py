"""One line for each way in which a node cannot be reached; feed; connectors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import Code, KaError
from karun import connectors, reasons
from karun.feed import CHUNK_SIZE, FEED_SIZE_MAX, Feed
from karun.latecomers import Latecomers

CHANGED = b"""@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!
Host key for [127.0.0.1]:2222 has changed and you have requested strict checking.
Host key verification failed.
"""


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (CHANGED, "changed host key; if that is right, ssh-keygen -R"),
        (b"Host key verification failed.\r\n", "unknown host key; add it to known_hosts"),
        (
            b"root@n1: Permission denied (publickey).\r\n",
            "permission denied; no accepted key (or password needed)",
        ),
        (b"ssh: connect to host n1 port 22: Connection refused\r\n", "connection refused"),
        (b"ssh: Could not resolve hostname n9: Name or service not known", "unknown host name"),
        (b"", "the connector ended with code 255"),
        (b"something\x1b[2J else\n\n", "something [2J else"),
    ],
)
def test_what_ssh_says_becomes_one_line(words: bytes, reason: str) -> None:
    assert reasons.explain("connect:connector ended", words, 255) == reason


@given(st.text(max_size=20), st.binary(max_size=300), st.none() | st.integers(-64, 255))
def test_a_reason_is_always_one_printable_line(reason: str, words: bytes, code: int | None) -> None:
    line = reasons.explain(reason, words, code)
    assert line
    assert "\n" not in line
    assert all(character >= " " for character in line)


@pytest.mark.parametrize(
    ("reason", "words", "may_pass"),
    [
        ("connect:connector ended", b"ssh: connect to host n1 port 22: Connection refused", True),
        ("connect:timeout", b"", True),
        ("connect:connector ended", b"Could not resolve hostname n9", True),
        ("connect:connector ended", b"System is booting up. Permission denied.", True),
        ("connect:connector ended", b"root@n1: Permission denied (publickey).", False),
        ("connect:connector ended", CHANGED, False),
        ("agent:no Python 3.10", b"", False),
    ],
)
def test_what_time_does_not_mend_is_not_waited_for(
    reason: str, words: bytes, may_pass: bool
) -> None:
    assert reasons.may_pass(reason, words) is may_pass


def test_who_is_not_reached_is_called_again_until_the_patience_is_over() -> None:
    late = Latecomers(60.0)
    assert late.missed(1, "connect", "refused")
    assert late.missed(2, "connect", "refused")
    late.attached(0, 0.5)
    late.attached(2, 12.0)
    assert late.came_s == {2: 12.0}
    assert late.end() == [(1, "connect", "refused (for 60 s)")]
    assert not late.missed(1, "connect", "refused")


def test_without_patience_nobody_is_called_again() -> None:
    assert not Latecomers(0.0).missed(1, "connect", "refused")


def test_a_deadline_says_which() -> None:
    assert reasons.explain("agent:timeout", b"", None) == "no answer before the agent timeout"


def test_a_feed_has_no_room_until_the_slowest_has_taken_enough() -> None:
    feed = Feed([0, 1])
    while feed.room:
        feed.sent(CHUNK_SIZE)
    feed.consumed(0, FEED_SIZE_MAX)
    assert not feed.room
    told: list[int] = []
    feed.changed = lambda: told.append(1)
    feed.consumed(1, CHUNK_SIZE)
    assert feed.room
    assert told == [1]


def test_a_node_that_is_gone_holds_nobody_up() -> None:
    feed = Feed([0, 1])
    while feed.room:
        feed.sent(CHUNK_SIZE)
    feed.consumed(0, FEED_SIZE_MAX)
    feed.gone(1)
    assert feed.room
    feed.gone(0)
    feed.sent(10 * FEED_SIZE_MAX)
    assert feed.room, "nobody is left to wait for"


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3 * CHUNK_SIZE)), max_size=60))
def test_a_feed_agrees_with_counting(steps: list[tuple[int, int]]) -> None:
    feed = Feed([0, 1, 2])
    taken, sent = [0, 0, 0], 0
    for rank, size in steps:
        while feed.room:
            feed.sent(CHUNK_SIZE)
            sent += CHUNK_SIZE
        step = min(size, sent - taken[rank])
        feed.consumed(rank, step)
        taken[rank] += step
        whole = min(taken) // CHUNK_SIZE * CHUNK_SIZE
        assert feed.room == (sent - whole < FEED_SIZE_MAX)


def test_ssh_asks_nothing_and_takes_no_node_for_an_option() -> None:
    one = connectors.make("ssh", python="python", user="u", ssh_config="f", connect_s=2)
    assert "-oBatchMode=yes" in one.argv
    assert one.argv[-2:] == ("--", "%h")
    assert one.lined


def test_an_unknown_connector_is_a_usage_error() -> None:
    with pytest.raises(KaError) as caught:
        connectors.make("telnet", python="python")
    assert caught.value.code is Code.USAGE


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("sudo: a password is required", "sudo asks for a password: allow it without one"),
        ("karun: sudo: command not found", "no sudo on the node"),
        ("sudo: sorry, you must have a tty to run sudo", "sudo: sorry, you must have a tty"),
        ("cannot write /sudo: a password is required", ""),
        ("", ""),
    ],
)
def test_what_sudo_says_is_told_from_what_others_say(words: str, reason: str) -> None:
    found = reasons.refusal(words)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)
