"""As root, by sudo: what is asked for with --sudo, and its end, where the agent is not root itself.

sudo passes on neither descriptors nor most of the environment.  So a task of the agent's own comes
to a new Python the way the agent did: its archive first, over standard input, then what is fed.
Nothing is ever asked: `sudo -n` fails rather than wait for a password.

Of what runs by sudo the agent can reach sudo alone, which passes signals on, but not SIGKILL: that
would leave the rest behind.  So another sudo is asked to send them.
"""

from __future__ import annotations

import os
import sys

from . import task
from .loop import Loop

SUDO = ("sudo", "-n", "-H", "--")
SIGKILL, SIGTERM = 9, 15
SETTINGS = ("KARUN_RANK", "KARUN_SIZE", "KARUN_NODE", "SSH_CONNECTION")
_BEGIN = (
    "import os, sys\n"
    "fd, size = os.memfd_create('karun'), int(sys.argv[1])\n"
    "while size > 0:\n"
    "    size -= os.write(fd, os.read(0, min(size, 65536)) or sys.exit(1))\n"
    "sys.path.insert(0, '/proc/self/fd/%d' % fd)\n"
    "from karun.agent import rooted\n"
    "sys.exit(rooted.main(sys.argv[2:]))\n"
)


def command(argv: list[str]) -> list[str]:
    """Return what runs a command as root."""
    return [*SUDO, *argv]


def task_of(words: list[str], env: dict[str, str]) -> tuple[list[str], bytes]:
    """Return what runs a task as root, and what its standard input begins with."""
    with open(sys.path[0], "rb") as file:
        archive = file.read()
    settings = [f"{name}={env[name]}" for name in SETTINGS if name in env]
    env["LC_ALL"] = "C"  # karun/reasons.py knows the words of sudo
    python = [sys.executable, "-I", "-S", "-c", _BEGIN, str(len(archive))]
    return [*SUDO, *python, *settings, "--", *words], archive


def main(words: list[str]) -> int:
    """Be a task: settings, `--`, its words; return the exit code."""
    at = words.index("--")
    for setting in words[:at]:
        name, _, os.environ[name] = setting.partition("=")
    return task.run(words[at + 1 :])


def signal(loop: Loop, group: int, number: int) -> None:
    """Send a signal to a process group that sudo leads; raises OSError.

    SIGTERM goes before SIGKILL, in case that this user may do by sudo only what it was started for.
    """
    if number == SIGKILL:
        try:
            os.killpg(group, SIGTERM)
        except PermissionError:
            pass  # there are sudos that take no signals from their user
    null = os.open("/dev/null", os.O_RDWR)
    actions = [(os.POSIX_SPAWN_DUP2, null, stream) for stream in (0, 1, 2)]
    argv = [*SUDO, "/bin/sh", "-c", f"kill -{number} -{group}"]
    try:
        pid = os.posix_spawnp(argv[0], argv, os.environ, file_actions=actions, setsid=True)
    finally:
        os.close(null)
    loop.reap(pid, lambda _status: None)
