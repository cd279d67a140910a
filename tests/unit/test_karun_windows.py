"""What Windows nodes are told, word by word."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import KaError
from karun import windows


def split_as_windows_does(line: str) -> list[str]:
    """Split as CommandLineToArgvW does the words behind the program's.

    Source: Microsoft, "Parsing C command-line arguments": 2n backslashes and a quote are n and a
    quote that opens or closes, 2n + 1 are n and a quote itself; others stand for themselves.
    """
    words: list[str] = []
    word: str | None = None
    quoted, at = False, 0
    while at < len(line):
        run = at
        while run < len(line) and line[run] == "\\":
            run += 1
        count, at = run - at, run
        char = line[at] if at < len(line) else ""
        if count:
            word = (word or "") + "\\" * (count // 2 if char == '"' else count)
        if char == '"' and count % 2:
            word = (word or "") + '"'
        elif char == '"':
            quoted, word = not quoted, word or ""
        elif char in (" ", "\t") and not quoted:
            words += [word] if word is not None else []
            word = None
        else:
            word = (word or "") + char if char else word
        at += 1
    return words + ([word] if word is not None else [])


def literal_after(script: str, name: str) -> str:
    """Read one of PowerShell's literal strings: any quote, doubled, is itself."""
    quotes = "'\u2018\u2019\u201a\u201b"
    at = script.index(name) + len(name) + 1
    text = ""
    while True:
        if script[at] in quotes:
            if script[at + 1] not in quotes:
                return text
            at += 1
        text += script[at]
        at += 1


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
def test_every_word_reaches_the_program_as_it_was(words: list[str]) -> None:
    script = windows.run_script(["prog's", *words], line=False, cwd="", env={})
    assert literal_after(script, "FileName = ") == "prog's"
    assert split_as_windows_does(literal_after(script, "Arguments = ")) == words


def test_the_command_line_is_one_word_of_base64() -> None:
    line = windows.remote_command("exit 3\n")
    *head, word = line.split(" ")
    assert head == ["powershell", "-NoProfile", "-NonInteractive", "-InputFormat", "None",
                    "-EncodedCommand"]  # fmt: skip
    assert base64.b64decode(word).decode("utf-16-le") == "exit 3\n"


def test_files_are_put_below_a_directory_that_is_made() -> None:
    batch = windows.put_batch(["a b", 'q"'], "C:\\img\\new", ("/tmp/s", ".sums"))
    assert batch.splitlines() == [
        '-mkdir "/C:/img"', '-mkdir "/C:/img/new"',
        'put -Rp "a b" "/C:/img/new/"', 'put -Rp "q\\"" "/C:/img/new/"',
        'put "/tmp/s" "/C:/img/new/.sums"',
    ]  # fmt: skip


@pytest.mark.parametrize("path", ["\\\\server\\share", "//server/share", "C:here"])
def test_paths_that_are_no_place_on_a_drive_are_refused(path: str) -> None:
    with pytest.raises(KaError):
        windows.put_batch(["a"], path, ("s", "t"))


def test_a_name_that_would_be_two_sftp_commands_is_refused() -> None:
    with pytest.raises(KaError):
        windows.put_batch(["a\nrm *"], "x", ("s", "t"))
