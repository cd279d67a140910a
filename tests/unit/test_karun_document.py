"""docs/karun.md names what karun prints, counts and obeys."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from karun import cli
from karun.agent import frames
from karun.lines import STDOUT
from karun.nodes import Names
from karun.output import Form, Style, make_printer
from karun.power import Policy
from karun.prompt import FORMS
from karun.results import State
from karun.sampler import FIELDS
from karun.top import COLUMNS

TEXT = (Path(__file__).parents[2] / "docs/karun.md").read_text(encoding="utf-8")


def codes(section: str) -> set[str]:
    """Everything set as code in a section, whole or as `a`, `b` in a cell."""
    body = re.split(r"^## ", TEXT, flags=re.M)
    found = next(part for part in body if part.startswith(section + "\n"))
    return set(re.findall(r"`([^`\n]+)`", found))


class Screen:
    has_reader = True

    def __init__(self) -> None:
        self.lines: list[bytes] = []

    def write(self, stream: int, data: bytes) -> None:
        if stream == STDOUT:
            self.lines += data.splitlines()


def test_every_field_of_json_is_documented() -> None:
    screen = Screen()
    show = make_printer(Names(["a", "b"]), screen, Style(form=Form.JSON))
    show.output(0, 1, b"\xff")
    show.output(1, 2, b"\xff")
    show.finish()
    fields = {key for line in screen.lines for key in json.loads(line)}
    assert fields <= codes("JSON")
    assert {state.value for state in State} <= codes("JSON")


def test_every_counter_and_column_is_documented() -> None:
    assert {*FIELDS, *(column.key for column in COLUMNS)} <= codes("Top")


def test_every_form_of_the_prompt_is_documented() -> None:
    assert set(FORMS) <= codes("The prompt")


@pytest.mark.parametrize("field", dataclasses.fields(Policy), ids=lambda field: str(field.name))
def test_every_setting_of_a_reboot_is_documented(field: dataclasses.Field[object]) -> None:
    row = re.search(rf"^\| `{field.name}` \| ([^|]+) \|", TEXT, re.M)
    assert row is not None
    assert row[1] in (f"{field.default:g}" if field.type == "float" else "", "all", "no") or (
        field.name == "failures_max"
    )


def test_every_option_of_run_is_documented() -> None:
    sections = ("Which nodes", "How nodes are reached", "The command", "What is printed")
    known = " ".join(code for section in sections for code in codes(section))
    other = {"--session", "-S"}
    for parameter in cli.run.params:
        if parameter.param_type_name == "option":
            assert any(
                re.search(rf"(^| ){re.escape(name)}\b", known) or name in other
                for name in parameter.opts
            ), parameter.opts


def test_every_frame_is_documented() -> None:
    plain = ("SETUP", "ORDER", "ACK", "WELCOME", "REFUSE", "RESYNC", "QUIT", "ATTACH", "EVENT")
    for name in (*plain, "PING"):
        assert f"| {getattr(frames, name)} | {name} |" in TEXT
    assert (frames.CALL, frames.RECALL) == (7, 9)
    assert (frames.ASK, frames.RETURN, frames.SETTLED, frames.CANNOT) == (20, 21, 22, 23)
    assert (frames.PROVE, frames.CHALLENGE, frames.ACCEPT) == (31, 32, 33)
