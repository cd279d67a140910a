"""The interactive prompt: reads lines, keeps a history, and has commands run.

What a line means is decided by karun/prompt.py; what running it means is up to the caller, who
gives a function.  Ctrl-C at the prompt drops the line; during a command it is the command's.
"""

from __future__ import annotations

import contextlib
import os
import readline
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from common.errors import KaError
from karun.nodes import Groups, Names
from karun.prompt import HELP, Kind, Line, Settings, change, parse

__all__ = ["ask", "history_file", "loop", "with_history"]

PROMPT_SIZE_MAX = 40
HISTORY_COUNT_MAX = 1000

Run = Callable[[Settings, str], int]
"""Run a command on the nodes and print; return the exit code.  May raise KaError."""


def loop(
    settings: Settings,
    run: Run,
    *,
    read: Callable[[str], str],
    say: Callable[[str], None] = print,
    groups: Groups | None = None,
) -> int:
    """Read and obey lines until the end; return the exit code of the last command."""
    site = groups or Groups()
    code = 0
    while True:
        try:
            line = parse(read(_prompt(settings)))
        except EOFError:
            return code
        except KeyboardInterrupt:
            say("")
            continue
        except KaError as error:
            say(f"karun: {error}")
            continue
        if line.kind is Kind.QUIT:
            return code
        try:
            settings, code = _obey(settings, line, code, run, say, site)
        except KeyboardInterrupt:
            say("karun: interrupted")
            code = 130
        except KaError as error:
            say(f"karun: {error}")
            code = error.code.exit_code


def _obey(
    settings: Settings,
    line: Line,
    code: int,
    run: Run,
    say: Callable[[str], None],
    site: Groups,
) -> tuple[Settings, int]:
    """Return the settings and the exit code after a line."""
    if line.kind is Kind.RUN:
        return settings, run(settings, line.text)
    if line.kind is Kind.LOCAL:
        return settings, subprocess.run(["/bin/sh", "-c", line.text], check=False).returncode
    if line.kind is Kind.NODES:
        say(f"{_folded(settings)} ({len(settings.nodes)})")
    elif line.kind is Kind.HELP:
        say(HELP)
    elif line.kind is Kind.FORM:
        settings = change(settings, line, site.expand)
        say(f"output is {settings.form}")
    else:
        settings = change(settings, line, site.expand)
    return settings, code


def ask(prompt: str) -> str:
    """Read a line at the terminal, and begin a new one there when it was the end."""
    try:
        return input(prompt)
    except EOFError:
        print()
        raise


def history_file() -> Path:
    """Return where the history is kept, by the XDG rules."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(state) / "karun/history"


@contextlib.contextmanager
def with_history(path: Path) -> Iterator[None]:
    """Give `input` line editing and a history; a history that cannot be kept is not missed."""
    readline.set_history_length(HISTORY_COUNT_MAX)
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.write_history_file(path)


def _prompt(settings: Settings) -> str:
    folded = _folded(settings)
    if len(folded) > PROMPT_SIZE_MAX:
        folded = f"{len(settings.nodes)} nodes"
    return f"karun {folded}> "


def _folded(settings: Settings) -> str:
    return Names(settings.nodes).fold(range(len(settings.nodes)))
