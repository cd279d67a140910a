"""A disk made of a sparse file, and the node's program on it.  Needs root and loop devices."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kadeploy.orders import Order, Place, to_json

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def lacking(*programs: str) -> str | None:
    """Why tests with loop devices and *programs* cannot run here; None if they can."""
    if os.geteuid() != 0:
        return "needs root"
    if not Path("/dev/loop-control").exists():
        return "no loop devices"
    absent = [name for name in programs if shutil.which(name, path=PATH) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def run(*words: str | Path, stdin: bytes = b"") -> str:
    done = subprocess.run(words, input=stdin, capture_output=True, env={**os.environ, "PATH": PATH})
    assert done.returncode == 0, (words, done.stderr.decode(errors="replace"))
    return done.stdout.decode(errors="replace")


@contextmanager
def loop_disk(path: Path, size: int) -> Iterator[str]:
    with open(path, "wb") as file:
        file.truncate(size)
    device = run("losetup", "--find", "--show", path).strip()
    try:
        yield device
    finally:
        # What a program that was killed has made on top keeps the disk busy.
        for above in run("losetup", "-n", "-O", "NAME", "-j", device).split():
            run("losetup", "--detach", above)
        run("losetup", "--detach", device)


@contextmanager
def partition(place: Place, *, read_only: bool = True) -> Iterator[str]:
    """Yield a device for a partition, made by means of our own."""
    words = ["losetup", "--find", "--show", f"--offset={place.start}", f"--sizelimit={place.size}"]
    device = run(*words, *(["--read-only"] if read_only else []), place.disk).strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


class Node:
    """Starts the node's program as the head does, but without ssh."""

    def __init__(self, directory: Path, python: str = sys.executable) -> None:
        """*python*: the deployment environment's, where a Debian library is wanted."""
        self._program = ("unshare", "--mount", python, "-m", "kadeploy.node")
        self.environment = {
            **os.environ,
            "PATH": PATH,
            "KADEPLOY_ROOT": str(directory / "root"),
        }

    def start(self, verb: str) -> subprocess.Popen[bytes]:
        """Start the program with pipes."""
        words = [*self._program, verb]
        return subprocess.Popen(words, stdin=-1, stdout=-1, env=self.environment)

    def ask(self, verb: str, stdin: bytes = b"") -> dict[str, Any]:
        words = [*self._program, verb]
        done = subprocess.run(words, input=stdin, capture_output=True, env=self.environment)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def do(self, order: Order, stream: bytes = b"") -> dict[str, Any]:
        return self.ask("do", json.dumps(to_json(order)).encode() + b"\n" + stream)

    def do_all(self, orders: Sequence[Order]) -> None:
        for order in orders:
            answer = self.do(order)
            assert answer["ok"], (order, answer)


def checksum(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
