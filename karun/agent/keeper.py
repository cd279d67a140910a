"""Who ends this node's commands should the agent be killed: a shell that waits for that.

It reads from a pipe which process groups there are; when the pipe ends without a word, the agent
is dead, and it kills them.  Only commands that live longer than GUARD_S are told to it, so short
ones cost nothing.  (Wrapping each command in `setpriv --pdeathsig` costs more than the command.)
What sudo has made root's is killed by sudo (karun/agent/rooted.py).
"""

from __future__ import annotations

import os

from .loop import Loop

GUARD_S = 0.05
_SCRIPT = (
    "p=; while read a b; do q=; for x in $p; do [ $x = $b ] || q=\"$q $x\"; done; p=$q; "
    '[ $a = + ] && p="$p $b"; done; for x in $p; do case $x in s*) x=${x#s}; kill -15 -$x; '
    'sudo -n /bin/sh -c "kill -9 -$x";; *) kill -9 -$x;; esac; done 2>/dev/null'
)


class Keeper:
    """The guard of one agent's commands; started with the first that needs it."""

    __slots__ = ("_fd", "_guarded", "_loop")

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._fd = -1
        self._guarded: dict[int, bytes] = {}

    def guard(self, group: int, *, by_sudo: bool) -> None:
        """End this process group if the agent dies."""
        if self._fd < 0:
            self._start()
        self._guarded[group] = name = b"s%d" % group if by_sudo else b"%d" % group
        self._say(b"+ %s\n" % name)

    def release(self, group: int) -> None:
        """The group's leader has ended."""
        name = self._guarded.pop(group, None)
        if name is not None:
            self._say(b"- %s\n" % name)

    def _start(self) -> None:
        theirs, self._fd = os.pipe()
        null = os.open("/dev/null", os.O_RDWR)
        actions = [(os.POSIX_SPAWN_DUP2, theirs, 0)]
        actions += [(os.POSIX_SPAWN_DUP2, null, stream) for stream in (1, 2)]
        try:
            pid = os.posix_spawn(
                "/bin/sh", ["sh", "-c", _SCRIPT], {}, file_actions=actions, setsid=True
            )
        except OSError:
            return  # no shell, no guard: the pipe takes what is said, and nobody reads it
        finally:
            os.close(theirs)
            os.close(null)
        os.set_blocking(self._fd, False)
        self._loop.reap(pid, _over)

    def _say(self, line: bytes) -> None:
        try:
            os.write(self._fd, line)
        except OSError:
            pass


def _over(_status: int) -> None:
    pass
