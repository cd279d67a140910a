"""A cell, seen from outside: the namespaces one system lives in.

Each system gets its own network, mount and pid namespace.  So it has an address that is not
loopback, its mounts are nobody else's, and when the namespace's first process is killed the kernel
kills every other and drops every mount: nothing can be left running or mounted.  That holds even
when this process is killed outright: the parent-death signal runs down the chain
(harness -> unshare -> first process).

The first process is `python -m bench.inside`; the two talk in lines of JSON over its standard
input and output.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from bench import cpu
from common.errors import Code, KaError

__all__ = ["Cell", "require_root"]

_STOP_TIMEOUT_S = 30.0


def require_root() -> None:
    """Raise KaError where the benchmark cannot run at all."""
    if os.geteuid() != 0:
        raise KaError(
            Code.USAGE, "the benchmark needs root: it makes namespaces and drops the page cache"
        )
    for program, package in (("unshare", "util-linux"), ("ip", "iproute2"), ("tar", "tar")):
        if not shutil.which(program):
            raise KaError(Code.USAGE, f"{program} is missing (Debian package {package})")


class Cell:
    """A running cell; leaving the context ends everything in it."""

    def __init__(self, system: str, state: Path) -> None:
        self.system = system
        self._state = state
        self._log = state / "inside.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._received = b""

    def __enter__(self) -> Cell:
        self._state.mkdir()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    "setpriv", "--pdeathsig", "KILL",
                    "unshare", "--net", "--mount", "--pid", "--fork", "--kill-child=SIGKILL",
                    "--mount-proc", "--propagation", "private",
                    sys.executable, "-m", "bench.inside", self.system, str(self._state),
                ],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0,
                cwd=Path(__file__).resolve().parent.parent,
                # Ctrl-C is for the harness alone; it then ends the cells.
                start_new_session=True,
            )  # fmt: skip
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End everything in the cell, now.  More than once does no harm."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()  # enough for one that has not come to its first question yet
        # Killing the namespace's first process, not unshare: unshare then waits for it, and the
        # kernel lets that end only after every process of the namespace has ended.
        for pid in cpu.children_of(process.pid, cpu.snapshot()):
            os.kill(pid, signal.SIGKILL)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def ask(self, question: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Send *question* and return the answer.

        Raises KaError if the cell answers with an error, ends, or takes too long.  After the
        last two it is of no use any more.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
        except BrokenPipeError:
            raise KaError(Code.UNREACHABLE, f"the cell has ended{self._last_words()}") from None
        answer = json.loads(self._line(timeout_s))
        assert isinstance(answer, dict)
        if "error" in answer:
            raise KaError(Code.INTERNAL, str(answer["error"]))
        return answer

    def _line(self, timeout_s: float) -> bytes:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        while b"\n" not in self._received:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not poll.poll(left_s * 1000):
                raise KaError(Code.TIMEOUT, f"no answer within {timeout_s:.0f} s")
            part = process.stdout.read(1 << 16)
            if not part:
                raise KaError(Code.UNREACHABLE, f"the cell has ended{self._last_words()}")
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""
