"""What is said to a Windows node's ssh server: PowerShell scripts and sftp commands.  No I/O.

The server hands a command line to cmd.exe, or to the shell that its keeper has chosen, and each
quotes in its own way.  So no word of the user's is ever in that line: it is always `powershell`
with one word of base64.  Inside, words are PowerShell's literal strings, and a program's arguments
are joined by the rules that programs on Windows split them by (`subprocess.list2cmdline`), not by
PowerShell, which loses quotes in them.

Sources: powershell.exe's -EncodedCommand (UTF-16LE, base64); cmd.exe's limit of 8191 characters.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PureWindowsPath
from subprocess import list2cmdline

from common.errors import Code, KaError

__all__ = ["check_script", "put_batch", "remote_command", "run_script"]

LINE_SIZE_MAX = 8000
_POWERSHELL = "powershell -NoProfile -NonInteractive -InputFormat None -EncodedCommand "
_QUIET = "$ProgressPreference = 'SilentlyContinue'"


def remote_command(script: str) -> str:
    """Return the command line that runs *script*; raises E2BIG."""
    line = _POWERSHELL + base64.b64encode(script.encode("utf-16-le")).decode("ascii")
    if len(line) > LINE_SIZE_MAX:
        raise KaError(Code.E2BIG, "the command is too long for Windows", size_max=LINE_SIZE_MAX)
    return line


def run_script(words: Sequence[str], *, line: bool, cwd: str, env: Mapping[str, str]) -> str:
    """Return the script that runs a program, or with *line* a line of PowerShell."""
    lines = [_QUIET]
    lines += [f"[Environment]::SetEnvironmentVariable({_literal(name)}, {_literal(value)})"
              for name, value in env.items()]  # fmt: skip
    if cwd:
        lines.append(f"Set-Location -LiteralPath {_literal(cwd)} -ErrorAction Stop")
        lines.append("[Environment]::CurrentDirectory = (Get-Location).ProviderPath")
    if line:
        lines += [
            "$global:LASTEXITCODE = $null",
            f"& {{ {words[0]}\n}}",
            "$good = $?",
            "if ($null -ne $LASTEXITCODE) { exit $LASTEXITCODE }",
            "exit [int](-not $good)",
        ]
    else:
        lines += [
            "$start = New-Object Diagnostics.ProcessStartInfo",
            f"$start.FileName = {_literal(words[0])}",
            f"$start.Arguments = {_literal(list2cmdline(words[1:]))}",
            "$start.UseShellExecute = $false",
            "try { $process = [Diagnostics.Process]::Start($start) }",
            "catch { [Console]::Error.WriteLine($_.Exception.Message); exit 127 }",
            "$process.WaitForExit()",
            "exit $process.ExitCode",
        ]
    return "\n".join(lines) + "\n"


def check_script(directory: str, sums: str) -> str:
    """Return the script that compares files below *directory* with the file of sums in it.

    A line of that file: SHA-256 in hexadecimal, a blank, the path.  The file is removed.  A line on
    standard error names each file that differs; the exit code is then 1.
    """
    return (
        f"{_QUIET}\n$directory = {_literal(directory)}\n"
        f"$sums = [IO.Path]::Combine($directory, {_literal(sums)})\n"
        "$bad = 0\n"
        "foreach ($line in [IO.File]::ReadAllLines($sums)) {\n"
        "  $sum, $name = $line.Split(' ', 2)\n"
        "  $file = [IO.Path]::Combine($directory, $name)\n"
        "  try { $found = (Get-FileHash -LiteralPath $file -Algorithm SHA256 -EA Stop).Hash }\n"
        "  catch { $found = 'nothing' }\n"
        '  if ($found -ne $sum) { [Console]::Error.WriteLine("differs: $name"); $bad = 1 }\n'
        "}\n"
        "Remove-Item -LiteralPath $sums\n"
        "exit $bad\n"
    )


def put_batch(sources: Iterable[str], directory: str, sums: tuple[str, str]) -> str:
    """Return the sftp commands that put *sources* into *directory*, which is made.

    *sums*: the local file of sums, and its name in the directory.
    """
    remote = _sftp_path(directory)
    parts = remote.split("/")
    lines = [
        f"-mkdir {_quoted('/'.join(parts[: count + 1]))}"
        for count in range(len(parts))
        if parts[count] and not parts[count].endswith(":")
    ]
    lines += [f"put -Rp {_quoted(source)} {_quoted(remote + '/')}" for source in sources]
    lines.append(f"put {_quoted(sums[0])} {_quoted(f'{remote}/{sums[1]}')}")
    return "\n".join(lines) + "\n"


def _sftp_path(path: str) -> str:
    """Return a Windows path as sftp has it: `C:\\a` is `/C:/a`."""
    if path.startswith(("\\\\", "//")):
        raise KaError(Code.USAGE, f"a share is no destination for Windows nodes: {path}")
    pure = PureWindowsPath(path)
    if pure.drive and not pure.root:
        raise KaError(Code.USAGE, f"{path}: say from where on the drive: {pure.drive}\\...")
    text = pure.as_posix()
    return f"/{text}" if pure.drive else text


def _literal(text: str) -> str:
    if "\0" in text:
        raise KaError(Code.USAGE, "a word of the command has a zero byte")
    for quote in "\u2018\u2019\u201a\u201b":  # to PowerShell they are quotes like any other
        text = text.replace(quote, quote * 2)
    return "'" + text.replace("'", "''") + "'"


def _quoted(path: str) -> str:
    if "\n" in path or "\r" in path:
        raise KaError(Code.USAGE, f"a name with a line break cannot go to Windows: {path!r}")
    escaped = path.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
