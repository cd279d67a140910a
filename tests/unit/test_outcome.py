"""Laws of ledgers: merging is a join, so order, repetition and detours do not matter."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from common.broadcast.outcome import Ledger, Verdict
from common.broadcast.wire import Report

COUNT = 6
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["join", "lose", "fail", "verify"]),
        st.integers(1, COUNT),
        st.integers(1, 3),
    ),
    max_size=12,
)


def told(events: list[tuple[str, int, int]]) -> Ledger:
    ledger = Ledger(COUNT)
    for what, rank, attempt in events:
        match what:
            case "join":
                ledger.join(rank, attempt)
            case "lose":
                ledger.lose(rank, attempt, "lost")
            case "fail":
                ledger.fail(rank, attempt, "failed")
            case _:
                ledger.verify(rank)
    return ledger


def state(ledger: Ledger) -> list[tuple[Verdict, int]]:
    return [ledger.entry(rank)[:2] for rank in range(1, COUNT + 1)]


def report_of(ledger: Ledger) -> Report:
    ledger.forget_told()
    return ledger.untold(b"") or Report(b"", b"\0", b"\0", [], [])


@given(st.lists(EVENTS, max_size=4), st.randoms(use_true_random=False))
def test_reports_may_come_in_any_order_and_more_than_once(
    parts: list[list[tuple[str, int, int]]], shuffle: random.Random
) -> None:
    reports = [report_of(told(part)) for part in parts]
    first = Ledger(COUNT)
    for report in reports:
        first.merge(report)
    second = Ledger(COUNT)
    again = reports * 2
    shuffle.shuffle(again)
    for report in again:
        second.merge(report)
    assert state(first) == state(second)


@given(EVENTS, EVENTS)
def test_a_report_brings_everything_and_is_no_news_twice(
    events: list[tuple[str, int, int]], others: list[tuple[str, int, int]]
) -> None:
    report = report_of(told(events))
    ledger = told(others)
    ledger.merge(report)
    assert not ledger.merge(report)
    assert state(ledger) == state(told(others + events))


@given(EVENTS)
def test_only_what_is_new_is_told(events: list[tuple[str, int, int]]) -> None:
    ledger = told(events)
    ledger.untold(b"")
    assert ledger.untold(b"") is None
    ledger.note(1, "slow")
    report = ledger.untold(b"")
    assert report is not None
    assert (report.others, report.notes) == ([], [[1, "slow"]])


def test_lost_under_an_earlier_attempt_is_void() -> None:
    ledger = told([("join", 1, 1), ("lose", 1, 1)])
    assert ledger.entry(1).verdict is Verdict.LOST
    ledger.join(1, 2)
    assert ledger.entry(1).verdict is Verdict.PENDING
    ledger.lose(1, 1, "late news")
    assert ledger.entry(1).verdict is Verdict.PENDING


def test_verified_beats_everything_and_is_in_no_other_list() -> None:
    ledger = told([("verify", 1, 1), ("lose", 1, 3), ("fail", 1, 3)])
    assert ledger.summary().verified == 1 << 1
    assert 1 not in ledger.summary().others


def test_the_exit_code_says_all_some_or_none() -> None:
    ledger = told([("lose", 1, 1), ("verify", 2, 1)])
    assert ledger.summary().exit_code == 2
    assert told([("lose", 1, 1)]).summary().exit_code == 1
    assert told([("verify", rank, 1) for rank in range(1, COUNT + 1)]).summary().exit_code == 0


def test_who_never_joined_is_told_from_who_did_not_report() -> None:
    reasons = {
        rank: entry.reason for rank, entry in told([("join", 1, 1)]).summary().others.items()
    }
    assert reasons[1] == "did not report in time"
    assert reasons[2] == "never joined"


def test_only_who_has_never_joined_is_waited_for_as_one_who_may_be_summing() -> None:
    ledger = told([("lose", 1, 1)] + [("verify", rank, 1) for rank in range(2, COUNT + 1)])
    assert ledger.all_open_are_lost(0)
    assert ledger.some_never_joined()
    ledger.join(1, 1)
    assert ledger.all_open_are_lost(0)
    assert not ledger.some_never_joined()
    restarted = told([("verify", rank, 1) for rank in range(2, COUNT + 1)] + [("lose", 1, 2)])
    assert not restarted.some_never_joined()


def test_who_has_joined_and_is_heard_of_by_nobody_is_lost_whatever_was_said_of_it() -> None:
    """As when it attached once more, and who saw it was lost with it."""
    others = [("verify", rank, 1) for rank in range(3, COUNT + 1)]
    ledger = told([("lose", 1, 1), ("join", 1, 2), *others])
    ledger.join(2, 1)
    assert not ledger.all_open_are_lost(0b110)
    assert not ledger.all_open_are_lost(0b100)
    assert ledger.all_open_are_lost(0)
    ledger.lose_absent(0b100)
    assert (ledger.entry(1).verdict, ledger.entry(1).attempt) == (Verdict.LOST, 2)
    assert ledger.entry(2).verdict is Verdict.PENDING
    ledger.join(1, 3)
    assert ledger.entry(1).verdict is Verdict.PENDING, "it came back"


def test_who_never_joined_is_not_lost_for_not_being_heard_of() -> None:
    ledger = told([("verify", one, 1) for one in range(2, COUNT + 1)])
    assert not ledger.all_open_are_lost(0)
    ledger.lose_absent(0)
    assert ledger.summary().others[1].reason == "never joined"
