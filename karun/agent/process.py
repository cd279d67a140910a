"""A command on this node: started, fed, listened to, ended.  Its whole session ends with it.

Invariants
  * the command leads a session (and process group) of its own: a signal reaches all of it;
  * should the agent be killed, its keeper kills the command (karun/agent/keeper.py);
  * `exited` is called once, after the last `output`;
  * all output that came before the end is told; what holds the pipes open after it (a daemon) is
    waited for at most LINGER_S.
"""

from __future__ import annotations

import os
from _functools import partial  # type: ignore[import-not-found]  # functools loads much
from _signal import valid_signals  # type: ignore[import-not-found]

from .keeper import GUARD_S, Keeper
from .loop import READ, WRITE, Loop, Timer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

READ_SIZE = 64 << 10
LINGER_S = 1.0
KILL_S = 2.0
"""Between SIGTERM and SIGKILL when a time limit has passed."""
SIGKILL, SIGTERM = 9, 15
OUT_OF_TIME = -1
CODE_NOT_STARTED = 126
CODE_NOT_FOUND = 127
_PATH = os.environ.get("PATH", os.defpath)
_DEFAULT_SIGNALS = tuple(valid_signals())
"""All: Python ignores SIGPIPE and SIGXFSZ, who started the agent perhaps others.  Of a signal that
is not named the C library asks the kernel first: fifty system calls more for each command."""


class Process:
    """One running command."""

    __slots__ = (
        "_awaited", "_by_sudo", "_consumed", "_exited", "_guarding", "_input", "_input_ended",
        "_input_fd", "_keeper", "_loop", "_output", "_outputs", "_paused", "_status", "_timed_out",
        "_timer", "_uncounted", "pid",
    )  # fmt: skip

    def __init__(
        self,
        loop: Loop,
        keeper: Keeper,
        *,
        output: Callable[[int, bytes], None],
        consumed: Callable[[int], None],
        exited: Callable[[int, int], None],
    ) -> None:
        """Who is told: of output, by stream; of standard input that it took; of the exit code
        (OUT_OF_TIME after its time limit) and the signal (0: none) that ended it."""
        self._loop, self._keeper = loop, keeper
        self._awaited = False
        """Whether the loop has been asked to tell of its end."""
        self._by_sudo = False
        self._guarding: Timer | None = None
        self._output, self._consumed, self._exited = output, consumed, exited
        self._outputs: dict[int, int] = {}
        self._input: list[bytes] = []
        self._input_fd = -1
        self._input_ended = False
        self._paused = False
        self._status = -1
        self._timed_out = False
        self._timer: Timer | None = None
        self._uncounted = 0
        """Of standard input, what is ours and not fed."""
        self.pid = 0

    def start(
        self, argv: list[str], env: dict[str, str], cwd: str,
        *, pty: bool, fed: bool, limit_s: float, task: bool = False, third: int = -1,
        by_sudo: bool = False, before: bytes = b"",
    ) -> None:  # fmt: skip
        """Start *argv*, a command or a task of the agent's own (karun/agent/task.py).

        What prevents it is told as the shell does, with code 126 or 127.
        third: a descriptor that a command gets as its 3; it stays the caller's.
        by_sudo: its processes are root's.
        before: what standard input begins with, before what is fed.
        """
        self._by_sudo = by_sudo
        try:
            if task:
                self._fork(argv, env, cwd, fed=fed)
            else:
                self._spawn(argv, env, cwd, pty=pty, fed=fed or bool(before), third=third)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError) and error.filename != cwd
            reason = error.strerror if not missing or "/" in argv[0] else "command not found"
            self._output(2, f"karun: {error.filename or argv[0]}: {reason}\n".encode())
            self._end_input()
            self._exited(CODE_NOT_FOUND if missing else CODE_NOT_STARTED, 0)
            return
        if before:
            self._uncounted = len(before)
            self.write(before)
            if not fed:
                self.end_input()
        self._guarding = self._loop.at(GUARD_S, self._guard)
        if limit_s > 0:
            self._timer = self._loop.at(limit_s, self._out_of_time)

    def write(self, data: bytes) -> None:
        """Feed its standard input; it is told as it takes it, or cannot."""
        if self._input_fd < 0:
            self._count(len(data))
            return
        self._input.append(data)
        if len(self._input) == 1:
            self._feed(0)

    def end_input(self) -> None:
        self._input_ended = True
        if not self._input:
            self._end_input()

    def signal(self, number: int) -> None:
        if self._status < 0 and self.pid:
            try:
                if self._by_sudo:
                    from . import rooted

                    rooted.signal(self._loop, self.pid, number)
                else:
                    os.killpg(self.pid, number)
            except OSError:  # it has ended, or is another user's
                pass

    def pause(self, paused: bool) -> None:
        """Stop reading its output, or go on."""
        if paused != self._paused:
            self._paused = paused
            for fd in self._outputs:
                if paused:
                    self._loop.unwatch(fd)
                else:
                    self._loop.watch(fd, READ, partial(self._read, fd))

    def _guard(self) -> None:
        self._guarding = None
        self._keeper.guard(self.pid, by_sudo=self._by_sudo)
        self._await()

    def _await(self) -> None:
        """See to it that its end is heard of.  Most commands have ended when it comes to that."""
        if self._awaited:
            return
        self._awaited = True
        found, status = os.waitpid(self.pid, os.WNOHANG)
        if found:
            self._ended(status)
        else:
            self._loop.reap(self.pid, self._ended)

    def _spawn(
        self, argv: list[str], env: dict[str, str], cwd: str,
        *, pty: bool, fed: bool, third: int,
    ) -> None:  # fmt: skip
        theirs: list[int] = []
        back = os.open(".", os.O_RDONLY | os.O_DIRECTORY) if cwd else -1
        try:
            actions = self._on_terminal(theirs) if pty else self._on_pipes(theirs, fed)
            if third >= 0:
                actions.append((os.POSIX_SPAWN_DUP2, third, 3))
            if cwd:
                os.chdir(cwd)
            path = env.get("PATH", os.defpath)
            # posix_spawnp looks where this process's own PATH says.
            program = argv[0] if path == _PATH else _find(argv[0], path)
            self.pid = os.posix_spawnp(
                program, argv, env, file_actions=actions, setsid=True, setsigdef=_DEFAULT_SIGNALS
            )
        except OSError:
            self._drop_outputs()
            raise
        finally:
            if back >= 0:
                os.fchdir(back)
                os.close(back)
            for fd in theirs:
                os.close(fd)
        self._listen()

    def _fork(self, words: list[str], env: dict[str, str], cwd: str, *, fed: bool) -> None:
        from . import task

        theirs: list[int] = []
        try:
            ends = {target: end for _dup2, end, target in self._on_pipes(theirs, fed)}
            self.pid = task.fork(words, env, ends, cwd)
        except OSError:
            self._drop_outputs()
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        self._listen()

    def _drop_outputs(self) -> None:
        for fd in self._outputs:
            os.close(fd)
        self._outputs.clear()

    def _listen(self) -> None:
        if self._input_fd >= 0:
            os.set_blocking(self._input_fd, False)
        for fd in self._outputs:
            os.set_blocking(fd, False)
            self._loop.watch(fd, READ, partial(self._read, fd))

    def _on_pipes(self, theirs: list[int], fed: bool) -> list[tuple[Any, ...]]:
        actions = []
        if fed:  # else it has ours, which is /dev/null (karun/agent/main.py)
            end, self._input_fd = os.pipe()
            theirs.append(end)
            actions.append((os.POSIX_SPAWN_DUP2, end, 0))
        for stream in (1, 2):
            mine, end = os.pipe()
            self._outputs[mine] = stream
            theirs.append(end)
            actions.append((os.POSIX_SPAWN_DUP2, end, stream))
        return actions

    def _on_terminal(self, theirs: list[int]) -> list[tuple[Any, ...]]:
        mine, terminal = os.openpty()
        theirs.append(terminal)
        self._outputs[mine] = 1
        self._input_fd = os.dup(mine)
        # A session leader that opens a terminal gets it as its controlling one.
        opening = (os.POSIX_SPAWN_OPEN, 0, os.ttyname(terminal), os.O_RDWR, 0)
        return [opening, (os.POSIX_SPAWN_DUP2, 0, 1), (os.POSIX_SPAWN_DUP2, 0, 2)]

    def _read(self, fd: int, events: int = READ) -> None:
        try:
            data = os.read(fd, READ_SIZE) if events & READ else b""
        except BlockingIOError:
            return
        except OSError:  # a terminal whose other end is closed
            data = b""
        if data:
            self._output(self._outputs[fd], data)
            return
        self._close_output(fd)
        if self._outputs:
            return
        if self._status < 0:
            self._await()
        else:
            self._finish()

    def _close_output(self, fd: int) -> None:
        self._loop.unwatch(fd)
        os.close(fd)
        del self._outputs[fd]

    def _feed(self, _events: int) -> None:
        fd = self._input_fd
        try:
            while self._input:
                count = os.write(fd, self._input[0])
                if count < len(self._input[0]):
                    self._input[0] = self._input[0][count:]
                else:
                    del self._input[0]
                self._count(count)
        except BlockingIOError:
            self._loop.watch(fd, WRITE, self._feed)
            return
        except OSError:  # it reads no more
            self._end_input()
            return
        self._loop.unwatch(fd)
        if self._input_ended:
            self._end_input()

    def _end_input(self) -> None:
        if self._input_fd >= 0:
            self._loop.unwatch(self._input_fd)
            os.close(self._input_fd)
            self._input_fd = -1
        unread, self._input = self._input, []
        if unread:
            self._count(sum(map(len, unread)))

    def _count(self, size: int) -> None:
        own_size = min(size, self._uncounted)
        self._uncounted -= own_size
        if size > own_size:
            self._consumed(size - own_size)

    def _out_of_time(self) -> None:
        self._timed_out = True
        self.signal(SIGTERM)
        self._timer = self._loop.at(KILL_S, lambda: self.signal(SIGKILL))

    def _ended(self, status: int) -> None:
        self._status = status
        if self._guarding is not None:
            self._guarding.cancel()
        else:
            self._keeper.release(self.pid)
        if self._timer is not None:
            self._timer.cancel()
        if self._input_fd >= 0:
            self._end_input()
        self._finish()
        if self._outputs:
            self._timer = self._loop.at(LINGER_S, self._linger)

    def _linger(self) -> None:
        """Take what is there; whoever still holds the pipes is not waited for any longer."""
        if self._paused:
            self._timer = self._loop.at(LINGER_S, self._linger)
            return
        for fd in list(self._outputs):
            self._read(fd)
        for fd in list(self._outputs):
            self._close_output(fd)
        self._finish()

    def _finish(self) -> None:
        if self._status < 0 or self._outputs or not self.pid:
            return
        self.pid = 0
        if self._timer is not None:
            self._timer.cancel()
        if self._timed_out:
            self._exited(OUT_OF_TIME, 0)
        elif os.WIFSIGNALED(self._status):
            self._exited(0, os.WTERMSIG(self._status))
        else:
            self._exited(os.WEXITSTATUS(self._status), 0)


def _find(name: str, path: str) -> str:
    """Return the program that a shell with this PATH would run; raises FileNotFoundError."""
    if "/" in name:
        return name
    for directory in path.split(":"):
        program = f"{directory or '.'}/{name}"
        if os.access(program, os.X_OK) and os.path.isfile(program):
            return program
    raise FileNotFoundError(2, "command not found", name)
