"""Log lines: one event, its facts, and nothing a peer says can look like another line."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import log
from common.errors import Code, KaError


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    root = logging.getLogger()
    before = root.handlers[:], root.level
    root.handlers[:] = []
    log.configure("debug")
    yield stream
    root.handlers[:] = before[0]
    root.setLevel(before[1])


def line_of(**facts: object) -> str:
    message, _ = log.get("ka.test").process("event", facts)
    return str(message)


def test_a_line_has_time_level_logger_event_and_facts(lines: io.StringIO) -> None:
    log.get("ka.test", iod=3).info("iod.lost", peer="node1", after_s=2.5)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO    ka\.test iod\.lost iod=3 peer=node1 "
        r"after_s=2\.5\n",
        lines.getvalue(),
    )


def test_bound_facts_add_up_and_leave_the_first_logger_alone(lines: io.StringIO) -> None:
    first = log.get("ka.test", iod=3)
    first.bind(chunk=7).warning("event")
    first.warning("event")
    assert [line.split("ka.test ")[1] for line in lines.getvalue().splitlines()] == [
        "event iod=3 chunk=7",
        "event iod=3",
    ]


def test_a_traceback_follows_its_line(lines: io.StringIO) -> None:
    log.get("ka.test").error("request.failed", peer="x", exc_info=ValueError("boom"))
    assert "request.failed peer=x\nValueError: boom\n" in lines.getvalue()


def test_the_level_is_kept(lines: io.StringIO) -> None:
    log.configure("warning")
    log.get("ka.test").info("event")
    assert lines.getvalue() == ""


def test_an_unknown_level_is_a_usage_error() -> None:
    with pytest.raises(KaError) as caught:
        log.configure("loud")
    assert caught.value.code is Code.USAGE


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        (b"name", "name"),
        (b"\xff", "\\xff"),
        ("two words", "'two words'"),
        ("a=b", "'a=b'"),
        ("", "''"),
        ("'", '"\'"'),
        ("a\nERROR forged", "'a\\nERROR forged'"),
        ("\x1b[2J", "'\\x1b[2J'"),
        (None, "None"),
        (3, "3"),
    ],
)
def test_facts_are_quoted_where_they_could_mislead(value: object, text: str) -> None:
    assert line_of(fact=value) == f"event fact={text}"


@given(st.text() | st.binary())
def test_any_fact_stays_on_one_printable_line(value: str | bytes) -> None:
    assert line_of(fact=value).isprintable()
