"""The prompt: what lines mean, what they change, and a session with a scripted user."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import nodeset
from common.errors import Code, KaError
from karun.nodes import Groups
from karun.prompt import FORMS, HELP, Kind, Line, Settings, change, parse
from karun.prompt_loop import loop, with_history


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", Line(Kind.NOTHING)),
        ("   ", Line(Kind.NOTHING)),
        ("uptime", Line(Kind.RUN, "uptime")),
        ("  cat /etc/motd ", Line(Kind.RUN, "cat /etc/motd")),
        ("exit 3", Line(Kind.RUN, "exit 3")),
        ("wall -w", Line(Kind.RUN, "wall -w")),
        (":run :quit", Line(Kind.RUN, ":quit")),
        ("-w node[1-3]", Line(Kind.SELECT, "node[1-3]")),
        ("-x @bad", Line(Kind.REMOVE, "@bad")),
        ("+n5", Line(Kind.ADD, "n5")),
        ("!ls -l", Line(Kind.LOCAL, "ls -l")),
        ("=", Line(Kind.FORM)),
        ("= all", Line(Kind.FORM, "all")),
        (":nodes", Line(Kind.NODES)),
        ("?", Line(Kind.NODES)),
        (":help", Line(Kind.HELP)),
        ("quit", Line(Kind.QUIT)),
    ],
)
def test_a_line_means_one_thing(text: str, line: Line) -> None:
    assert parse(text) == line


@pytest.mark.parametrize("text", ["-w", "-x ", "+", "!", ":run", "=nosuch", ":nosuch", "-z n1"])
def test_a_mistake_is_explained_in_a_line(text: str) -> None:
    with pytest.raises(KaError) as caught:
        parse(text)
    assert caught.value.code is Code.USAGE
    assert "\n" not in str(caught.value)


@given(st.text(max_size=20))
def test_any_line_is_understood_or_refused(text: str) -> None:
    try:
        line = parse(text)
    except KaError as error:
        assert error.code is Code.USAGE  # noqa: PT017 (both outcomes are right)
        return
    assert line.text in text


def test_help_names_every_way_to_change_something() -> None:
    for sign in ("-w", "-x", "+NODES", "!COMMAND", ":run", ":nodes", ":quit", *FORMS):
        assert sign in HELP


def changed(settings: Settings, *lines: str) -> Settings:
    for line in lines:
        settings = change(settings, parse(line), nodeset.expand)
    return settings


def test_nodes_are_selected_added_and_removed() -> None:
    start = Settings(("n1", "n2"))
    assert changed(start, "-w m[1-2]", "+m2,m4", "-x m1").nodes == ("m2", "m4")
    assert changed(start, "+n2").nodes == ("n1", "n2")
    with pytest.raises(KaError, match="no nodes would be left"):
        changed(start, "-x n[1-9]")


def test_the_form_is_toggled_or_named() -> None:
    start = Settings(("n1",))
    assert changed(start, "=").form == "gathered"
    assert changed(start, "=", "=").form == "labelled"
    assert changed(start, "=all").form == "all"
    assert changed(start, "=lines", "=").form == "labelled"


def test_a_session_runs_commands_on_the_nodes_of_the_moment() -> None:
    ran: list[tuple[tuple[str, ...], str, str]] = []
    said: list[str] = []
    prompts: list[str] = []
    script = iter(["id", "-w n[1-3]", "=", "date", "oops[", "-x n9,n[", "?", "fail", "quit"])

    def read(prompt: str) -> str:
        prompts.append(prompt)
        return next(script)

    def run(settings: Settings, text: str) -> int:
        ran.append((settings.nodes, settings.form, text))
        return 5 if text == "fail" else 0

    code = loop(Settings(("a",)), run, read=read, say=said.append, groups=Groups([]))
    assert code == 5
    assert ran == [
        (("a",), "labelled", "id"),
        (("n1", "n2", "n3"), "gathered", "date"),
        (("n1", "n2", "n3"), "gathered", "oops["),
        (("n1", "n2", "n3"), "gathered", "fail"),
    ]
    assert prompts[0] == "karun a> "
    assert prompts[-1] == "karun n[1-3]> "
    assert said[0] == "output is gathered"
    assert said[1].startswith("karun: not a node set")
    assert said[2] == "n[1-3] (3)"


def test_interrupts_and_the_end_of_input_are_no_errors() -> None:
    script: list[object] = [KeyboardInterrupt(), "slow", "broken", EOFError()]
    said: list[str] = []

    def read(prompt: str) -> str:
        word = script.pop(0)
        if isinstance(word, BaseException):
            raise word
        return str(word)

    def run(settings: Settings, text: str) -> int:
        if text == "slow":
            raise KeyboardInterrupt
        raise KaError(Code.UNREACHABLE, "nobody is there")

    assert loop(Settings(("a",)), run, read=read, say=said.append) == 3
    assert said == ["", "karun: interrupted", "karun: nobody is there"]


def test_a_local_command_runs_here(tmp_path: Path) -> None:
    script = iter([f"!echo here > {tmp_path}/out; exit 7", "quit"])
    code = loop(Settings(("a",)), lambda settings, text: 0, read=lambda prompt: next(script))
    assert code == 7
    assert (tmp_path / "out").read_text() == "here\n"


def test_the_history_is_kept_privately(tmp_path: Path) -> None:
    path = tmp_path / "state/karun/history"
    with with_history(path):
        pass
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_history_that_cannot_be_kept_is_not_missed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with with_history(tmp_path / "file/history"):
        pass
