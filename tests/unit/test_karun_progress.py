"""Progress: what is said, when it is drawn, and that it never stays in the way."""

from __future__ import annotations

from karun.nodes import Names
from karun.progress import APPEAR_S, REDRAW_S, WAITING_COUNT_MAX, Progress, StatusLine
from karun.results import Results


def progress(count: int) -> tuple[Progress, Results]:
    results = Results(count)
    return Progress(Names([f"n{number}" for number in range(count)]), results), results


def test_the_line_counts_what_is_done_and_what_went_wrong() -> None:
    told, results = progress(12)
    assert told.line(0) == "karun: 0/12 done, 0 s"
    results.exited(0, 0)
    results.exited(1, 1)
    results.failed(2, "no route to host", "connect")
    assert told.line(5.2) == "karun: 3/12 done, 2 bad, 5 s"


def test_standard_input_is_told_with_its_rate() -> None:
    told, _ = progress(2)
    told.sent_size = 3 << 20
    assert told.line(2) == "karun: 0/2 done, 3.0 MiB sent (1.5 MiB/s), 2 s"
    assert "0 B/s" in told.line(0)


def test_the_status_names_whom_the_run_waits_for() -> None:
    told, results = progress(5)
    for node in (0, 4):
        results.exited(node, 0)
    assert told.status(3) == ["karun: 2/5 done, 3 s", "karun: waiting for 3: n[1-3]"]
    for node in (1, 2, 3):
        results.exited(node, 0)
    assert told.status(4) == ["karun: 5/5 done, 4 s"]


def test_a_crowd_is_not_named_in_full() -> None:
    told, _ = progress(WAITING_COUNT_MAX + 7)
    assert told.status(1)[1] == (
        f"karun: waiting for {WAITING_COUNT_MAX + 7}: n[0-{WAITING_COUNT_MAX - 1}] and 7 more"
    )


def test_the_line_appears_late_changes_seldom_and_makes_way() -> None:
    drawn: list[bytes] = []
    line = StatusLine(drawn.append, started=100, columns=10)
    line.update(100 + APPEAR_S / 2, "early")
    line.clear()
    assert drawn == []
    line.update(102, "a")
    line.update(102 + REDRAW_S / 2, "b")
    assert drawn == [b"\r\x1b[Ka"]
    line.update(102 + REDRAW_S, "longer than it fits")
    assert drawn[1:] == [b"\r\x1b[Klonger th"]
    line.clear()
    line.clear()
    assert drawn[2:] == [b"\r\x1b[K"]
