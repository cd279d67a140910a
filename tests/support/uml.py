"""A real Linux kernel as an ordinary process: user-mode Linux with the host's files as its root.

Owns the boot and the end of one guest, which runs one program and halts.  What the program may
touch: uml_init.sh.  Boots take about a second; system calls are some ten times slower than the
host's, so programs should do little and do it in bulk.

On a processor with AMX the kernel of Debian 12 needs help to write registers back: uml_ptrace.c.

Needs root and Debian's `user-mode-linux`; tests that boot carry the mark `uml`.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Outcome", "boot"]

PTRACE = Path(__file__).with_name("uml_ptrace.c")
INIT = Path(__file__).with_name("uml_init.sh")
MODULES = ("fuse", "nfsd", "nfs", "nfsv3", "nfsv4")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a guest's one program ended; status is None when the guest died or was stopped."""

    status: int | None
    output: str
    console: str
    elapsed_s: float

    def check(self) -> str:
        """Return the output of a program that succeeded; fail with all that is known otherwise."""
        if self.status != 0:
            raise AssertionError(
                f"the guest's program ended with {self.status} after {self.elapsed_s:.0f} s\n"
                f"--- output\n{self.output}\n--- console\n{self.console[-4000:]}"
            )
        return self.output


def boot(
    program: Sequence[str | Path],
    *,
    share: Path,
    working_directory: Path,
    environment: Mapping[str, str] | None = None,
    memory_mib: int = 1024,
    time_limit_s: float = 120.0,
) -> Outcome:
    """Boot a kernel, run the program in it as root, halt; `share` is the directory both see.

    `share` must be new; it may be read while the guest runs and afterwards.  The guest is killed
    at the time limit.
    """
    (share / "work").mkdir(parents=True)
    _write_program(share / "program", program, working_directory, environment or {})
    command = [
        "linux.uml",
        f"mem={memory_mib}M",
        "rootfstype=hostfs",
        "rootflags=/",
        "ro",
        f"init={INIT}",
        f"ka_share={share}",
        f"ka_modules={','.join(MODULES)}",
        "con=null",
        "con0=fd:0,fd:1",
        "quiet",
    ]
    library = share / "ptrace.so"
    preload = {}
    if _is_state_large():
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", library, PTRACE], check=True)
        preload["LD_PRELOAD"] = str(library)
    started_s = time.monotonic()
    with (share / "console").open("wb") as console:
        _run(command, os.environ | preload, console=console.fileno(), time_limit_s=time_limit_s)
    elapsed_s = time.monotonic() - started_s
    status = share / "status"
    return Outcome(
        int(status.read_text()) if status.exists() else None,
        _text(share / "output"),
        _text(share / "console"),
        elapsed_s,
    )


def _is_state_large() -> bool:
    """Return whether a process has registers here that user-mode Linux 6.1 cannot restore."""
    return " amx_tile" in Path("/proc/cpuinfo").read_text()


def _write_program(
    path: Path,
    program: Sequence[str | Path],
    working_directory: Path,
    environment: Mapping[str, str],
) -> None:
    lines = ["#!/bin/sh", f"cd {shlex.quote(str(working_directory))} || exit 1"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    lines.append("exec " + shlex.join(str(word) for word in program))
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)


def _run(
    command: Sequence[str], environment: Mapping[str, str], *, console: int, time_limit_s: float
) -> None:
    # The console's input must be something epoll accepts and must never end: an idle pipe.
    idle_read, idle_write = os.pipe()
    try:
        process = subprocess.Popen(
            command, env=environment, stdin=idle_read, stdout=console, stderr=console,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(time_limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:  # each guest process is a host process: end the whole group
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    finally:
        os.close(idle_read)
        os.close(idle_write)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
