"""The language of karun's prompt: what a typed line means, and what it changes.  Pure.

    uptime              run it on the nodes            :run TEXT    run it, whatever it begins with
    -w NODES            from now on on these nodes     +NODES       on these as well
    -x NODES            no longer on these             :nodes       which ones are they
    =                   gathered or as it comes        =FORM        labelled, gathered, all, lines
    !COMMAND            run it here                    :help, :quit (or quit, exit, Ctrl-D)

Node sets and groups are karun/nodes.py's, given as a function.  Not here: reading lines, running
commands (karun/prompt_loop.py).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from dataclasses import dataclass

from common.errors import Code, KaError
from karun.output import Form

__all__ = ["FORMS", "HELP", "Kind", "Line", "Settings", "change", "parse"]

HELP = __doc__.split("\n\n")[1] if __doc__ else ""
FORMS: dict[str, tuple[Form, bool]] = {
    "labelled": (Form.LABELLED, False),
    "gathered": (Form.GATHERED, False),
    "all": (Form.GATHERED_ALL, False),
    "lines": (Form.GATHERED, True),
}
"""Names of forms: the form, and whether it is by line."""


class Kind(enum.Enum):
    """What a line asks for."""

    NOTHING = "nothing"
    RUN = "run on the nodes"
    LOCAL = "run here"
    SELECT = "nodes: only these"
    ADD = "nodes: these too"
    REMOVE = "nodes: not these"
    NODES = "show the nodes"
    FORM = "change the form of output"
    HELP = "help"
    QUIT = "quit"


@dataclass(frozen=True, slots=True)
class Line:
    """A line, understood."""

    kind: Kind
    text: str = ""


@dataclass(frozen=True, slots=True)
class Settings:
    """What holds for the commands to come."""

    nodes: tuple[str, ...]
    form: str = "labelled"


_WORDS = {
    ":nodes": Kind.NODES,
    "?": Kind.NODES,
    ":help": Kind.HELP,
    "help": Kind.HELP,
    ":quit": Kind.QUIT,
    "quit": Kind.QUIT,
    "exit": Kind.QUIT,
}
_OPTIONS = {"-w": Kind.SELECT, "-x": Kind.REMOVE, ":run": Kind.RUN}
_SIGNS = {"+": Kind.ADD, "!": Kind.LOCAL, "=": Kind.FORM}
_NEEDS_TEXT = {
    Kind.SELECT: "which nodes? (-w node[1-4])",
    Kind.REMOVE: "which nodes? (-x node3)",
    Kind.ADD: "which nodes? (+node5)",
    Kind.LOCAL: "which command? (!uptime)",
    Kind.RUN: "which command? (:run uptime)",
}


def parse(text: str) -> Line:
    """Return what a line asks for; raises KaError USAGE with a line of help."""
    text = text.strip()
    if not text:
        return Line(Kind.NOTHING)
    if kind := _WORDS.get(text):
        return Line(kind)
    word, _, rest = text.partition(" ")
    if kind := _OPTIONS.get(word):
        return _with_text(kind, rest)
    if kind := _SIGNS.get(text[0]):
        return _with_text(kind, text[1:])
    if text[0] in ":-":
        raise KaError(Code.USAGE, f"no such command: {word[:40]} (:help lists them; :run runs any)")
    return Line(Kind.RUN, text)


def _with_text(kind: Kind, text: str) -> Line:
    text = text.strip()
    if not text and kind in _NEEDS_TEXT:
        raise KaError(Code.USAGE, _NEEDS_TEXT[kind])
    if kind is Kind.FORM and text and text not in FORMS:
        raise KaError(Code.USAGE, f"no such form: {text[:40]} (there are {', '.join(FORMS)})")
    return Line(kind, text)


def change(settings: Settings, line: Line, expand: Callable[[str], list[str]]) -> Settings:
    """Return the settings after a line; raises KaError, and nothing has changed then."""
    if line.kind is Kind.FORM:
        toggled = "gathered" if settings.form == "labelled" else "labelled"
        return dataclasses.replace(settings, form=line.text or toggled)
    if line.kind not in (Kind.SELECT, Kind.ADD, Kind.REMOVE):
        return settings
    named = expand(line.text)
    if line.kind is Kind.SELECT:
        nodes = tuple(named)
    elif line.kind is Kind.ADD:
        nodes = tuple(dict.fromkeys((*settings.nodes, *named)))
    else:
        out = set(named)
        nodes = tuple(name for name in settings.nodes if name not in out)
    if not nodes:
        raise KaError(Code.USAGE, "no nodes would be left")
    return dataclasses.replace(settings, nodes=nodes)
