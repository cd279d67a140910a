"""Sessions seen from the command line: started, listed, stopped.

A session is a process of its own, karun/session_server.py, with a Unix socket in a directory that
is this user's alone.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from common.errors import Code, KaError
from karun import client
from karun.agent import frames
from karun.running import Where

__all__ = ["describe", "start", "stop"]


def start(name: str, where: Where) -> str:
    """Start a session and wait for its nodes; return a line that says what it is."""
    path = client.socket_path(name)
    if _answers(path):
        raise KaError(Code.EEXIST, f"session {name!r} is there already (karun session stop {name})")
    process = subprocess.Popen(
        [sys.executable, "-m", "karun.session_server", name],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, cwd="/",
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin as settings:
        settings.write(json.dumps(asdict(where)).encode())
    with process.stdout as out:
        line = out.readline().decode("utf-8", "replace").strip()
    process.returncode = 0  # it stays: nobody waits for it
    verdict, _, text = line.partition(" ")
    if verdict != "ready":
        raise KaError(Code.UNREACHABLE, text or "the session did not start")
    return f"session {name}: {text}"


def describe() -> Iterator[str]:
    """Yield a line for each session of this user."""
    for path in sorted(Path(client.directory()).glob("*.sock")):
        name = path.name.removesuffix(".sock")
        try:
            with client.connected(name) as sock:
                sock.sendall(frames.encode(client.INFO, 0))
                decoder = frames.Decoder()
                while data := sock.recv(client.READ_SIZE):
                    for _kind, _rank, payload in decoder.feed(data):
                        yield f"{name}: {frames.text(frames.unpack(payload)[0])}"
        except KaError:
            path.unlink(missing_ok=True)


def stop(name: str) -> None:
    """End a session, and wait until it is gone; raises KaError."""
    with client.connected(name) as sock:
        sock.sendall(frames.encode(client.STOP, 0))
        while sock.recv(client.READ_SIZE):
            pass


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0
