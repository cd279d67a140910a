"""Asks nodes for their boot id and orders reboots, each by a process of its own.

No agent: it would die with the node that it reboots.  A node is called as a connector calls it: an
argv with `%h` for its name, before the command.  A hard reboot is a command on this machine, again
with `%h` (`ipmitool -H %h-bmc chassis power cycle`).

Not here: when to ask and whom (karun/power.py), deadlines (karun/reboot.py, which cancels; the
process is killed then).
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence

import trio

from common.errors import Code, KaError
from karun.results import printable

__all__ = ["BOOT_ID_FILE", "ProcessHands", "words"]

BOOT_ID_FILE = "/proc/sys/kernel/random/boot_id"
BOOT_ID_SIZE = 36


class ProcessHands:
    """`karun.reboot.Hands` by processes."""

    def __init__(
        self,
        names: Sequence[str],
        call: Sequence[str],
        *,
        lined: bool = True,
        soft: Sequence[str] = ("reboot",),
        hard: Sequence[str] | None = None,
    ) -> None:
        """*call* reaches a node; *lined*: it takes the command as one line for a shell, as ssh.

        *soft* is run on the node, or *hard* here, if given.
        """
        self._names = tuple(names)
        self._call = tuple(call)
        self._lined = lined
        self._soft = tuple(soft)
        self._hard = tuple(hard) if hard is not None else None

    async def boot_id(self, node: int) -> str:
        """Return a node's boot id; empty when it does not answer, or with something else."""
        done = await _run(self._remote(node, ("cat", BOOT_ID_FILE)))
        text = done.stdout.decode("ascii", "replace").strip().lower()
        is_id = len(text) == BOOT_ID_SIZE and not set(text) - set("0123456789abcdef-")
        return text if done.returncode == 0 and is_id else ""

    async def order(self, node: int) -> str:
        """Have a node reboot; return why not, or nothing."""
        if self._hard is not None:
            done = await _run(_filled(self._hard, self._names[node]))
            is_refused = done.returncode != 0
        else:
            done = await _run(self._remote(node, self._soft))
            # A process that a signal ended was ended by the reboot, as the connection was.
            is_refused = 0 < done.returncode < 128
        return _why(done) if is_refused else ""

    def _remote(self, node: int, command: Sequence[str]) -> list[str]:
        rest = [shlex.join(command)] if self._lined else list(command)
        return _filled(self._call, self._names[node]) + rest


def words(text: str) -> list[str]:
    """Return the words of a command as a shell would part them; raises KaError USAGE."""
    try:
        found = shlex.split(text)
    except ValueError as error:
        raise KaError(Code.USAGE, f"not a command: {error}: {text[:80]!r}") from None
    if not found:
        raise KaError(Code.USAGE, "not a command: there are no words in it")
    return found


async def _run(argv: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    """Run a process to its end; one that cannot be started ends with 127, as in a shell."""
    try:
        return await trio.run_process(
            argv,
            stdin=subprocess.DEVNULL,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    except OSError as error:
        why = f"{argv[0]}: {error.strerror}"
        return subprocess.CompletedProcess(argv, 127, b"", why.encode())


def _filled(argv: Sequence[str], name: str) -> list[str]:
    return [word.replace("%h", name) for word in argv]


def _why(done: subprocess.CompletedProcess[bytes]) -> str:
    """Return the last line that a process said, or its exit code."""
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return printable(lines[-1]) if lines else f"exit code {done.returncode}"
