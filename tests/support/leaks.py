"""What a test leaves behind: mounts below its directories, processes it started.

Processes are recognised by a token in their environment, which every descendant inherits: daemons
that changed session and parent are found too, and nothing that others started ever is.

Not here: deciding when to look (conftest.py).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

__all__ = ["TOKEN_VARIABLE", "describe", "end_processes", "mounts_below", "processes", "unmount"]

TOKEN_VARIABLE = "KA_TEST_TOKEN"
GRACE_S = 5.0


def mounts_below(*directories: Path) -> list[Path]:
    """Mount points inside the directories, deepest first."""
    found: list[Path] = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        escaped = line.split(" ")[4]
        point = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), escaped))
        if any(point.is_relative_to(directory) for directory in directories):
            found.append(point)
    return sorted(found, key=lambda point: len(point.parts), reverse=True)


def unmount(point: Path) -> None:
    """Detach a mount, whatever still uses it."""
    command = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
    subprocess.run([*command, str(point)], check=False, capture_output=True, timeout=30)


def processes(token: str) -> list[int]:
    """Living processes that carry the token, this one apart."""
    mark = f"{TOKEN_VARIABLE}={token}".encode()
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            carries = mark in (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # another user's, or gone
            continue
        if carries and not _is_zombie(entry):
            found.append(int(entry.name))
    return found


def _is_zombie(entry: Path) -> bool:
    try:
        return (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def describe(pid: int) -> str:
    """One line that tells a reader which process this is."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return f"{pid} (gone)"
    return f"{pid} {b' '.join(words).decode(errors='replace').strip()[:160]}"


def end_processes(token: str, *, grace_s: float = GRACE_S) -> list[str]:
    """Wait for the token's processes to end, kill those that do not, and tell which those were."""
    deadline = time.monotonic() + grace_s
    while (left := processes(token)) and time.monotonic() < deadline:
        time.sleep(0.05)
    told = [describe(pid) for pid in left]
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return told
