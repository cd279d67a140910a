"""What the options of `karun run` say of the command and of its output, in a session or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from karun.lines import STDERR, STDOUT
from karun.naming import Folding
from karun.output import Form, Printer, Streams, Style, make_printer, wants_colour
from karun.sinks import NodeFiles

__all__ = ["Options", "Screen", "printing"]


class Screen(Streams, Protocol):
    """Standard streams of whoever typed the command; karun.terminal.Terminal is one."""

    def is_terminal(self, stream: int) -> bool:
        """Whether a stream is a terminal."""

    @property
    def environment(self) -> Mapping[str, str]:
        """What says whether to use colours."""


@dataclass(frozen=True, slots=True)
class Options:
    """The options, as the command line has them."""

    command: tuple[str, ...]
    gather: bool = False
    gather_all: bool = False
    by_line: bool = False
    no_label: bool = False
    diff: bool = False
    as_json: bool = False
    outdir: str | None = None
    errdir: str | None = None
    highest: bool = False
    no_stdin: bool = False
    quiet: bool = False
    limit_s: float = 0.0
    cwd: str = ""
    env: tuple[str, ...] = ()
    sudo: bool = False
    pty: bool = False
    mpi: bool = False
    """Whether it is an MPI program, which ends with the highest code of its ranks."""
    ranks: int = 1
    """On each node."""

    def style(self, screen: Screen) -> Style:
        """Return what is said of output."""
        form = Form.LABELLED
        if self.as_json:
            form = Form.JSON
        elif self.gather_all:
            form = Form.GATHERED_ALL
        elif self.gather or self.diff:
            form = Form.GATHERED
        environment = screen.environment
        return Style(
            form=form,
            by_line=self.by_line,
            diff=self.diff,
            label=not self.no_label,
            highest=self.highest or self.mpi,
            quiet=self.quiet,
            colour_out=wants_colour(environment, is_terminal=screen.is_terminal(STDOUT)),
            colour_err=wants_colour(environment, is_terminal=screen.is_terminal(STDERR)),
        )

    def settings(self) -> dict[str, str]:
        """Return what is set in the environment."""
        return dict(setting.partition("=")[::2] for setting in self.env)

    def words(self) -> tuple[list[str], bool]:
        """Return the command's words, and whether the only one is a line for a shell."""
        words = list(self.command)
        line = len(words) == 1 and any(character in words[0] for character in " \t\n;|&<>$`")
        return words, line


@contextmanager
def printing(options: Options, names: Folding, screen: Screen) -> Iterator[Printer]:
    """Give the printer that the options ask for, with its files; raises KaError."""
    files = None
    if options.outdir or options.errdir:
        files = NodeFiles(
            [names[rank] for rank in range(len(names))],
            Path(options.outdir) if options.outdir else None,
            Path(options.errdir) if options.errdir else None,
        )
    try:
        yield make_printer(names, screen, options.style(screen), files.append if files else None)
    finally:
        if files:
            files.close()
