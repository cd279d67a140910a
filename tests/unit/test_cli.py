"""How the command lines end: one line, the right code, and no traceback for who stops reading."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import Code

PROGRAM = """
import sys, click
from common import cli
from common.errors import Code, KaError

@click.group()
def tool():
    pass

@tool.command()
@click.argument("how")
def fail(how):
    if how == "ours":
        raise KaError(Code.BUSY, "somebody else is at it")
    if how == "os":
        open("/nowhere/at/all")
    if how == "exit":
        raise click.exceptions.Exit(7)
    if how == "interrupt":
        raise KeyboardInterrupt
    for number in range(100_000):
        click.echo(number)

cli.run(tool, "tool")
"""


def run(*words: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["fail", "ours"], Code.BUSY.exit_code, "tool: somebody else is at it\n"),
        (["fail", "os"], 1, "tool: /nowhere/at/all: No such file or directory\n"),
        (["fail", "exit"], 7, ""),
        (["fail", "interrupt"], 130, "tool: interrupted\n"),
        (["fail", "all", "too"], 2,
         "tool: Got unexpected extra argument (too) See `tool fail --help`.\n"),
        (["nothing"], 2, "tool: No such command 'nothing'. See `tool --help`.\n"),
    ],
)  # fmt: skip
def test_a_failure_is_one_line_and_its_code(words: list[str], code: int, said: str) -> None:
    found, stderr = run(*words)
    assert (found, stderr.lstrip("\n")) == (code, said)


def test_a_reader_that_has_seen_enough_is_no_failure_to_be_told() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "fail", "not"], stdout=-1, stderr=-1
    ) as tool:
        assert tool.stdout is not None
        assert tool.stderr is not None
        assert tool.stdout.readline() == b"0\n"
        tool.stdout.close()
        assert tool.stderr.read() == b""
        assert tool.wait() == 1


SLOW = """
import sys, time

def wait():
    print("here", flush=True)
    time.sleep(60)

def main():
    try:
        wait()
    except KeyboardInterrupt:
        sys.exit(7)

if sys.argv[1] == "load":
    wait()
"""


@pytest.mark.parametrize(("moment", "code"), [("load", -signal.SIGINT), ("run", 7)])
def test_an_interrupt_leaves_no_traceback_even_while_the_command_line_loads(
    moment: str, code: int, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from common.starting import command;"
        "command('slow')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, moment], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == code


CAREFUL = """
import sys

def main():
    with open(sys.argv[1], "w") as file:
        print("said")
        print("also", file=sys.stderr, flush=True)
        sys.stdout.flush()
        file.write(f"kept {sys.stdin.read()!r}")
    sys.exit(7)
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_nothing_is_printed_into_files_where_standard_output_is_closed(
    closed: str, tmp_path: Path
) -> None:
    (tmp_path / "careful.py").write_text(CAREFUL)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from common.starting import command;"
        "command('careful')"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "kept")]
    done = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", *words], stdin=subprocess.DEVNULL, timeout=60
    )
    assert done.returncode == 7
    assert (tmp_path / "kept").read_text() == "kept ''"
