"""Printers: the output of many nodes as people and programs read it.  Pure.

One interface for all forms: `output` as bytes come, `exited` or `failed` once for each node, then
`finish`, which returns the exit code of the process.  A printer can be finished early (Ctrl-C):
what was gathered is printed, and nodes without a verdict are named.

Forms: `Labelled` (`node: line` as it comes), `Gathered` (dshbak-like, -b -B -L --diff),
`JsonLines`, and `PerFile` around any of them (--outdir, --errdir).

Invariants
  * bytes are bytes: nothing is decoded but for JSON, which says when it could not be;
  * every line written is whole, and the lines of one call are written at once;
  * once the reader is gone (`| head`), printers go on without writing, and `finish` says 141.

Not here: descriptors and files (karun/sinks.py), exit codes (karun/results.py).
"""

from __future__ import annotations

import base64
import enum
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from karun.fold import Fold, Group, diff
from karun.lines import STDERR, STDOUT, Lines
from karun.naming import Folding
from karun.results import Result, Results

__all__ = [
    "CODE_NO_READER", "Form", "Printer", "Streams", "Style", "make_printer", "wants_colour",
]  # fmt: skip

CODE_NO_READER = 141
"""128 + SIGPIPE, as a shell reports it."""
SEPARATOR = b"-" * 15 + b"\n"

_LABEL_COLOURS = {STDOUT: b"\x1b[94m", STDERR: b"\x1b[91m"}
_HEADER_COLOUR = b"\x1b[92m"
_DIFF_COLOURS = {b"-": b"\x1b[91m", b"+": b"\x1b[92m", b"@": b"\x1b[96m"}
_PLAIN = b"\x1b[0m"


class Streams(Protocol):
    """Standard output and error of this process; karun.sinks.Terminal is one."""

    def write(self, stream: int, data: bytes) -> None:
        """Write to standard output (1) or error (2)."""

    @property
    def has_reader(self) -> bool:
        """Whether standard output still goes somewhere."""


class Form(enum.Enum):
    """How output is printed."""

    LABELLED = "labelled"
    GATHERED = "gathered"
    GATHERED_ALL = "gathered with standard error"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Style:
    """What the options of a command line say about output."""

    form: Form = Form.LABELLED
    by_line: bool = False
    """-L: no headers; in the order of nodes when not gathered."""
    diff: bool = False
    """--diff: differences from the most common output only."""
    label: bool = True
    """Whether lines carry their node's name (not with -N)."""
    highest: bool = False
    """-S: end with the highest exit code."""
    quiet: bool = False
    """-q: no lines on commands' exit codes."""
    colour_out: bool = False
    colour_err: bool = False


def wants_colour(environment: Mapping[str, str], *, is_terminal: bool) -> bool:
    """Return whether to use colours: NO_COLOR, then CLICOLOR_FORCE and CLICOLOR, then the rest."""
    if environment.get("NO_COLOR"):
        return False
    if environment.get("CLICOLOR_FORCE", "0") != "0":
        return True
    return is_terminal and environment.get("CLICOLOR") != "0" and environment.get("TERM") != "dumb"


class Printer:
    """What all forms have in common."""

    def __init__(self, names: Folding, streams: Streams, style: Style) -> None:
        self._names = names
        self._streams = streams
        self._style = style
        self.results = Results(len(names))

    def output(self, node: int, stream: int, data: bytes) -> None:
        """A node wrote to standard output (1) or error (2)."""
        raise NotImplementedError

    def exited(self, node: int, code: int, signal: int = 0) -> None:
        """A node's command has ended, after all its output."""
        if self.results.exited(node, code, signal):
            self._ended(node)

    def failed(self, node: int, reason: str, stage: str = "connect") -> None:
        """A node or its command was given up: one line says why, the stage says what for."""
        if self.results.failed(node, reason, stage):
            self._ended(node)

    def finish(self) -> int:
        """Print what is left and the summary; return the exit code of the process."""
        for node in self.results.waiting():
            self._ended(node)
        self._finish()
        for line in self.results.summary(self._names, quiet=self._style.quiet):
            self._streams.write(STDERR, b"karun: " + _encoded(line) + b"\n")
        if not self._streams.has_reader:
            return CODE_NO_READER
        return self.results.exit_code(highest=self._style.highest)

    def _ended(self, node: int) -> None:
        """A node writes no more."""

    def _finish(self) -> None:
        """No node writes any more."""

    def _write_lines(self, stream: int, label: str, lines: Iterable[bytes]) -> None:
        """Write lines under a label; what has no newline gets one."""
        prefix = self._label(stream, label)
        text = b"".join(
            prefix + line if line.endswith(b"\n") else prefix + line + b"\n" for line in lines
        )
        if text:
            self._streams.write(stream, text)

    def _label(self, stream: int, label: str) -> bytes:
        if not self._style.label:
            return b""
        text = _encoded(label) + b":"
        if self._style.colour_out if stream == STDOUT else self._style.colour_err:
            text = _LABEL_COLOURS[stream] + text + _PLAIN
        return text + b" "


class Labelled(Printer):
    """Lines as they come, each with its node's name, to the stream that they were written to."""

    def __init__(self, names: Folding, streams: Streams, style: Style) -> None:
        super().__init__(names, streams, style)
        self._lines = Lines()

    def output(self, node: int, stream: int, data: bytes) -> None:
        self._write_lines(stream, self._names[node], self._lines.feed(node, stream, data))

    def _ended(self, node: int) -> None:
        for stream in (STDOUT, STDERR):
            if rest := self._lines.close(node, stream):
                self._write_lines(stream, self._names[node], [rest])


class Gathered(Labelled):
    """Equal output once, under the names of all nodes that wrote it, by exit code and size.

    Standard error is folded in with -B; else it is printed as it comes.
    """

    def __init__(self, names: Folding, streams: Streams, style: Style) -> None:
        super().__init__(names, streams, style)
        self._fold = Fold(len(names))

    def output(self, node: int, stream: int, data: bytes) -> None:
        if stream == STDOUT or self._style.form is Form.GATHERED_ALL:
            self._fold.feed(node, data, stream)
        else:
            super().output(node, stream, data)

    def _ended(self, node: int) -> None:
        super()._ended(node)
        self._fold.close(node)

    def _finish(self) -> None:
        if self._style.form is Form.LABELLED:
            for node in range(len(self._names)):
                self._show_lines(self._fold.groups([node])[0])
            return
        groups = [
            group for _, nodes in self.results.by_code() for group in self._fold.groups(nodes)
        ]
        if self._style.diff:
            self._show_differences(groups)
            return
        for group in groups:
            if self._fold.is_empty(group):
                continue
            if self._style.by_line:
                self._show_lines(group)
            else:
                self._show_block(group)

    def _show_lines(self, group: Group) -> None:
        self._write_lines(STDOUT, self._names.fold(group.nodes), self._fold.lines(group))

    def _show_block(self, group: Group) -> None:
        text = b"".join(self._fold.lines(group))
        if not text.endswith(b"\n"):
            text += b"\n"
        self._streams.write(STDOUT, (self._header(group) if self._style.label else b"") + text)

    def _header(self, group: Group) -> bytes:
        header = SEPARATOR + _encoded(self._title(group)) + b"\n" + SEPARATOR
        return _HEADER_COLOUR + header[:-1] + _PLAIN + b"\n" if self._style.colour_out else header

    def _title(self, group: Group) -> str:
        folded = self._names.fold(group.nodes)
        return folded if len(group.nodes) == 1 else f"{folded} ({len(group.nodes)})"

    def _show_differences(self, groups: list[Group]) -> None:
        """The first group, of the lowest exit code and the most nodes, is what others differ from.

        Nodes without any output come into it only if nobody else has the lowest code.
        """
        reference = next((one for one in groups if not self._fold.is_empty(one)), None)
        for group in groups if reference else []:
            assert reference is not None
            titles = (self._title(reference), self._title(group))
            lines = diff(self._fold, reference, group, names=titles)
            if lines:
                self._streams.write(STDOUT, b"".join(map(self._diff_line, lines)))

    def _diff_line(self, line: bytes) -> bytes:
        line = line if line.endswith(b"\n") else line + b"\n"
        colour = _DIFF_COLOURS.get(line[:1]) if self._style.colour_out else None
        return colour + line[:-1] + _PLAIN + b"\n" if colour else line


class JsonLines(Printer):
    """One JSON object a line: each node when it has its verdict, and a summary.

    The fields are in docs/karun.md#json.  Output is kept folded until its node has ended.
    """

    def __init__(self, names: Folding, streams: Streams, style: Style) -> None:
        super().__init__(names, streams, style)
        self._folds = {stream: Fold(len(names), exact=True) for stream in (STDOUT, STDERR)}

    def output(self, node: int, stream: int, data: bytes) -> None:
        self._folds[stream].feed(node, data)

    def _ended(self, node: int) -> None:
        record = {"type": "node", "node": self._names[node], "rank": node}
        record |= _verdict(self.results[node])
        for stream, name in ((STDOUT, "stdout"), (STDERR, "stderr")):
            self._folds[stream].close(node)
            record |= _text(name, self._folds[stream].of_node(node))
        self._emit(record)

    def _finish(self) -> None:
        codes = self.results.by_code()
        self._emit(
            {
                "type": "summary",
                "nodes": len(self._names),
                "good": sum(result.is_good for result in self.results),
                "codes": {str(code): self._names.fold(nodes) for code, nodes in codes},
                "exit_code": self.results.exit_code(highest=self._style.highest),
            }
        )

    def _emit(self, record: dict[str, Any]) -> None:
        self._streams.write(STDOUT, json.dumps(record, separators=(",", ":")).encode() + b"\n")


class PerFile(Printer):
    """Another printer, and what each node wrote, byte by byte, in a file of its own."""

    def __init__(self, inner: Printer, append: Callable[[int, int, bytes], None]) -> None:
        """*append* gets the node, the stream and the bytes."""
        self._inner = inner
        self._append = append
        self.results = inner.results

    def output(self, node: int, stream: int, data: bytes) -> None:
        self._append(node, stream, data)
        self._inner.output(node, stream, data)

    def exited(self, node: int, code: int, signal: int = 0) -> None:
        self._inner.exited(node, code, signal)

    def failed(self, node: int, reason: str, stage: str = "connect") -> None:
        self._inner.failed(node, reason, stage)

    def finish(self) -> int:
        return self._inner.finish()


def make_printer(
    names: Folding,
    streams: Streams,
    style: Style,
    append: Callable[[int, int, bytes], None] | None = None,
) -> Printer:
    """Return the printer that the options ask for; *append* writes the files of each node."""
    kinds: dict[Form, type[Printer]] = {
        Form.LABELLED: Gathered if style.by_line else Labelled,
        Form.GATHERED: Gathered,
        Form.GATHERED_ALL: Gathered,
        Form.JSON: JsonLines,
    }
    printer = kinds[style.form](names, streams, style)
    return PerFile(printer, append) if append else printer


def _verdict(result: Result) -> dict[str, Any]:
    return {
        "state": result.state.value,
        "code": result.code,
        "signal": result.signal or None,
        "reason": result.reason or None,
    }


def _text(name: str, data: bytes) -> dict[str, str]:
    """Return a field with text, or one that says that it is not text."""
    try:
        return {name: data.decode("utf-8")}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(data).decode("ascii")}


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "replace")
