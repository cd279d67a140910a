"""What the benchmark asks of a system; nfsp and the local disk.

A system is started inside its own namespaces (cell.py) and never stopped: when the namespaces go,
its processes and mounts go, however they are.  All it must do is start, say where its root is,
and give up and retake its mount so that caches can be dropped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from common.errors import Code, KaError

__all__ = ["ADDRESS", "Local", "Nfsp", "System", "command", "daemon", "tail", "wait_until"]

ADDRESS = "10.99.0.1"
"""Of every system, inside its network namespace; the peers refuse loopback addresses."""

_POLL_S = 0.02
_COMMAND_TIMEOUT_S = 60.0


class System(ABC):
    """One file system under test."""

    name: ClassVar[str]
    programs: ClassVar[Mapping[str, str]] = {}
    """Programs it needs, and the Debian package of each."""
    has_mount: ClassVar[bool] = True

    def __init__(self, state: Path) -> None:
        self.state = state
        self.root = state / "mnt"
        self.root.mkdir()

    @abstractmethod
    def start(self) -> None:
        """Bring it up with its root mounted.  Raises KaError, saying why, if it cannot."""

    @abstractmethod
    def unmount(self) -> None:
        """Give up the mount; the daemons stay."""

    @abstractmethod
    def mount(self) -> None:
        """Take the mount again; return when it is usable."""

    @abstractmethod
    def client_pids(self) -> set[int]:
        """Return the processes that serve the mount."""

    @abstractmethod
    def version(self) -> str:
        """Return what was measured, for the report."""


class Local(System):
    """A directory on the disk all the stores are on: what the hardware and the kernel can do."""

    name = "local"
    has_mount = False

    def start(self) -> None:
        pass

    def unmount(self) -> None:
        pass

    def mount(self) -> None:
        pass

    def client_pids(self) -> set[int]:
        return set()

    def version(self) -> str:
        return "a directory"


class Nfsp(System):
    """Our own: one mds, three iods, one mount, from the command beside the running Python."""

    name = "nfsp"

    def __init__(self, state: Path) -> None:
        super().__init__(state)
        self._cluster = state / "cluster"
        # The virtual environment's own command, whatever PATH says; so no symlink is resolved.
        self._nfsp = str(Path(sys.executable).parent / "nfsp")

    def start(self) -> None:
        if not os.access(self._nfsp, os.X_OK):
            raise KaError(Code.USAGE, f"no {self._nfsp}: run make setup")
        up = ("up", str(self._cluster), "--iods", "3", "--mount", str(self.root), "--daemon")
        command(self._nfsp, *up)
        if not self.root.is_mount():
            raise KaError(Code.UNREACHABLE, "nfsp up returned, but nothing is mounted")

    def unmount(self) -> None:
        command(self._nfsp, "umount", str(self.root))

    def mount(self) -> None:
        configuration = str(self._cluster / "cluster.toml")
        command(self._nfsp, "-c", configuration, "mount", str(self.root))
        wait_until(self.root.is_mount, "nfsp's mount", timeout_s=20)

    def client_pids(self) -> set[int]:
        files = (self._cluster / "run").glob("mount-*.pid")
        return {int(file.read_text()) for file in files}

    def version(self) -> str:
        return "this checkout"


def command(*arguments: str, timeout_s: float = _COMMAND_TIMEOUT_S) -> str:
    """Run a command to its end and return its output.  Raises KaError with its last line."""
    name = " ".join((Path(arguments[0]).name, *arguments[1:3]))
    # Through a file, not a pipe: a daemon it leaves behind would hold a pipe open for ever.
    with open(os.memfd_create("output"), "w+b") as output:
        try:
            done = subprocess.run(
                arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                timeout=timeout_s, check=False,
            )  # fmt: skip
        except FileNotFoundError:
            raise KaError(Code.USAGE, f"not installed: {arguments[0]}") from None
        except subprocess.TimeoutExpired:
            raise KaError(Code.TIMEOUT, f"{name}: no end after {timeout_s:.0f} s") from None
        output.seek(0)
        text = output.read().decode(errors="replace").strip()
    if done.returncode:
        last = text.splitlines()[-1] if text else "no message"
        raise KaError(Code.UNREACHABLE, f"{name}: exit code {done.returncode}: {last}")
    return text


def daemon(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a daemon in the foreground mode it has; what it says goes to *log*."""
    with log.open("ab") as output:
        return subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip


def wait_until(
    condition: Callable[[], bool],
    what: str,
    *,
    timeout_s: float,
    processes: Sequence[subprocess.Popen[bytes]] = (),
    log: Path | None = None,
) -> None:
    """Return once *condition* holds.

    Raises KaError when time is up, or at once when one of *processes*, which it takes, has ended.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        ended = next((process for process in processes if process.poll() is not None), None)
        if ended is not None:
            raise KaError(
                Code.UNREACHABLE, f"{what}: ended with exit code {ended.returncode}{tail(log)}"
            )
        if time.monotonic() > deadline:
            raise KaError(Code.TIMEOUT, f"{what}: not within {timeout_s:.0f} s{tail(log)}")
        time.sleep(_POLL_S)


def tail(log: Path | None) -> str:
    """Return the last line of a log, to be put behind a message."""
    if log is None or not log.exists():
        return ""
    lines = log.read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"; last in {log.name}: {last}" if last else ""
