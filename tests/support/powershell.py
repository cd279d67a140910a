"""What stands for a Windows node's powershell, behind a real ssh server.

It takes only the one word that karun sends, so whatever a shell in between does to other words
would be seen.  Of scripts it knows what they are for, not the language: the check of copied files
is done here in Python; any other script is printed, and its exit code is what `exit-code-N` in it
says.  With `hangs` in it none ends soon.
"""

from __future__ import annotations

import base64
import hashlib
import re
import sys
import time
from pathlib import Path

__all__ = ["install"]


def install(directory: Path) -> Path:
    """Make a program `powershell` in *directory*."""
    directory.mkdir()
    program = directory / "powershell"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} "$@"\n')
    program.chmod(0o755)
    return directory


def _literal(script: str, name: str) -> str:
    found = re.search(rf"{re.escape(name)}'((?:[^']|'')*)'", script)
    assert found is not None, script
    return found[1].replace("''", "'")


def _check(script: str) -> int:
    directory = Path(_literal(script, "$directory = "))
    sums = directory / _literal(script, "Combine($directory, ")
    bad = 0
    for line in sums.read_text().splitlines():
        expected, _, name = line.partition(" ")
        path = directory / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            print(f"differs: {name}", file=sys.stderr)
            bad = 1
    sums.unlink()
    return bad


def main() -> int:
    *options, flag, word = sys.argv[1:]
    assert flag == "-EncodedCommand", sys.argv
    assert "-NoProfile" in options
    script = base64.b64decode(word, validate=True).decode("utf-16-le")
    if "hangs" in script:
        time.sleep(10)
    if "Get-FileHash" in script:
        return _check(script)
    print(script, end="")
    code = re.search(r"exit-code-(\d+)", script)
    return int(code[1]) if code else 0


if __name__ == "__main__":
    sys.exit(main())
