"""What became of the command on every node: verdicts, summary, exit code.  Pure.

The exit codes of records and of the process (docs/karun.md#exit-codes): a record has the command's
own code, 128+n for signal n, 124 for a command that was out of time, 255 for a node that could not
be reached or was lost.  The process ends with 255 as soon as one node has no code of its own; else
with 0, or with the highest code if asked (-S).

Invariants
  * the first verdict on a node stands;
  * reasons are one printable line, whatever a remote program said.
"""

from __future__ import annotations

import enum
import signal as signals
from collections.abc import Iterator
from dataclasses import dataclass

from karun.naming import Folding

__all__ = [
    "CODE_STOPPED", "CODE_TIMED_OUT", "CODE_UNREACHABLE", "STAGE_LOST", "STAGE_STOPPED",
    "STAGE_TIMEOUT", "Result", "Results",
]  # fmt: skip

CODE_UNREACHABLE = 255
CODE_TIMED_OUT = 124
CODE_STOPPED = 137
"""As of anything that SIGKILL ended."""
STAGE_TIMEOUT = "timeout"
"""The stage of a failure that says: the command had its time."""
STAGE_LOST = "lost"
"""The stage of a failure that says: the node was there, and is gone."""
STAGE_STOPPED = "stopped"
"""The stage of a failure that says: karun ended the command, because of another node."""
REASON_SIZE_MAX = 300


class State(enum.Enum):
    """What became of a node's command; the value is what JSON calls it."""

    EXITED = "exited"
    SIGNALLED = "signalled"
    STOPPED = "stopped"
    TIMED_OUT = "timed_out"
    UNREACHABLE = "unreachable"
    LOST = "lost"
    UNFINISHED = "unfinished"


_FAILED_AT = {
    STAGE_TIMEOUT: State.TIMED_OUT,
    STAGE_LOST: State.LOST,
    STAGE_STOPPED: State.STOPPED,
}
_CODES = {State.TIMED_OUT: CODE_TIMED_OUT, State.STOPPED: CODE_STOPPED}
_OWN_CODE = (State.EXITED, State.SIGNALLED, State.STOPPED)
_WORDS = {
    State.STOPPED: "stopped",
    State.TIMED_OUT: "command timed out",
    State.UNREACHABLE: "unreachable",
    State.LOST: "lost",
    State.UNFINISHED: "no result",
}


@dataclass(frozen=True, slots=True)
class Result:
    """The verdict on one node."""

    state: State
    code: int
    signal: int = 0
    reason: str = ""

    @property
    def is_good(self) -> bool:
        return self.state is State.EXITED and self.code == 0

    def __str__(self) -> str:
        if self.state is State.EXITED:
            return f"exited with exit code {self.code}"
        if self.state is State.SIGNALLED:
            return f"killed by signal {self.signal} ({_signal_name(self.signal)})"
        return f"{_WORDS[self.state]} ({self.reason})" if self.reason else _WORDS[self.state]


_UNFINISHED = Result(State.UNFINISHED, CODE_UNREACHABLE)


class Results:
    """The verdicts of a command, by rank."""

    def __init__(self, node_count: int) -> None:
        self._results: list[Result | None] = [None] * node_count
        self._interned: dict[Result, Result] = {}
        self.done_count = 0
        """Nodes with a verdict."""
        self.bad_count = 0
        """Those among them whose verdict is not: exited with 0."""

    def exited(self, node: int, code: int, signal: int = 0) -> bool:
        """The command ended by itself or by a signal; return whether that is news."""
        if signal:
            return self._set(node, Result(State.SIGNALLED, 128 + signal, signal))
        return self._set(node, Result(State.EXITED, code))

    def failed(self, node: int, reason: str, stage: str) -> bool:
        """The node or the command was given up; return whether that is news."""
        state = _FAILED_AT.get(stage, State.UNREACHABLE)
        code = _CODES.get(state, CODE_UNREACHABLE)
        return self._set(node, Result(state, code, reason=printable(reason)))

    def __getitem__(self, node: int) -> Result:
        return self._results[node] or _UNFINISHED

    def __iter__(self) -> Iterator[Result]:
        return (result or _UNFINISHED for result in self._results)

    def waiting(self) -> list[int]:
        """Return the nodes without a verdict."""
        return [node for node, result in enumerate(self._results) if result is None]

    def by_code(self) -> list[tuple[int, list[int]]]:
        """Return codes in rising order, with the nodes of each."""
        found: dict[int, list[int]] = {}
        for node, result in enumerate(self):
            found.setdefault(result.code, []).append(node)
        return sorted(found.items())

    def exit_code(self, *, highest: bool) -> int:
        """Return what the process ends with."""
        if any(result.state not in _OWN_CODE for result in self):
            return CODE_UNREACHABLE
        return max((result.code for result in self), default=0) if highest else 0

    def summary(self, names: Folding, *, quiet: bool = False) -> list[str]:
        """Return a line for each kind of bad end; *quiet* is silent on commands' own exit codes."""
        found: dict[Result, list[int]] = {}
        for node, result in enumerate(self):
            if not result.is_good and not (quiet and result.state in _OWN_CODE):
                found.setdefault(result, []).append(node)
        order = list(State)
        ordered = sorted(found.items(), key=lambda one: (order.index(one[0].state), one[1][0]))
        return [f"{names.fold(nodes)}: {result}" for result, nodes in ordered]

    def _set(self, node: int, result: Result) -> bool:
        if self._results[node] is not None:
            return False
        self._results[node] = self._interned.setdefault(result, result)
        self.done_count += 1
        self.bad_count += not result.is_good
        return True


def printable(text: str) -> str:
    """Return one line without anything that a terminal would act on."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= REASON_SIZE_MAX else line[: REASON_SIZE_MAX - 3] + "..."


def _signal_name(number: int) -> str:
    try:
        return signals.Signals(number).name
    except ValueError:
        return "unknown"
