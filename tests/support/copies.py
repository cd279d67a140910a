"""What the tests of copying share: data, and the processes of nodes while a copy is under way."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tests.support.volumes import until

__all__ = ["ended", "listening_port", "process_writing", "random_file", "under_way"]

_SOCKET = re.compile(r"socket:\[(\d+)\]")


def random_file(path: Path, size: int) -> bytes:
    data = os.urandom(size)
    path.write_bytes(data)
    return data


async def under_way(directory: Path, name: str) -> int:
    """Wait until the process that writes *directory/name* has begun; return its id."""
    await until(lambda: process_writing(directory, name) is not None, f"{name} is written")
    pid = process_writing(directory, name)
    assert pid is not None
    return pid


async def ended(pid: int) -> None:
    """Wait until a process has ended, whether or not anybody has looked after it."""
    await until(lambda: _state(pid) in "Z-", f"{pid} has ended")


def process_writing(directory: Path, name: str) -> int | None:
    stage = f"{directory}/.ka-part-{name}"
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            for target in _open_files(process):
                if target.startswith(stage):
                    return int(process.name)
    return None


def listening_port(pid: int) -> int:
    """Return a TCP port that a process listens on."""
    found = (_SOCKET.fullmatch(target) for target in _open_files(Path(f"/proc/{pid}")))
    inodes = {match[1] for match in found if match}
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and fields[9] in inodes:
            return int(fields[1].rpartition(":")[2], 16)
    raise AssertionError("it listens on nothing")


def _open_files(process: Path) -> list[str]:
    try:
        return [os.readlink(link) for link in (process / "fd").iterdir()]
    except OSError:  # it has ended, or is another user's
        return []


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "-"
