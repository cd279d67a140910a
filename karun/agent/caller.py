"""One call to one node: the connector is started, the loader answered, the agent set up.

A connector is a command whose standard input and output become the agent's.  Stages: `connect`
until the loader speaks (TCP, host key, login: what ssh does by itself), `agent` until the agent
has introduced itself.  A call that fails says at which stage, what the connector wrote last, and
its wait status: the head makes one line of that (karun/reasons.py).  Deadlines are the plan's.
"""

from __future__ import annotations

import os
from _socket import AF_UNIX, SOCK_STREAM, socketpair

from .channel import Channel
from .loop import READ, WRITE, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MARK = b"KARUN1 "
NOISE_SIZE_MAX = 64 << 10
"""What login scripts may print before the loader speaks."""
TAIL_SIZE = 2000
SIGKILL = 9
NO_PYTHON = "no Python 3.10"
AGENT_S = 20.0
"""From the loader's first word to the agent's, the archive's way included."""


class Call:
    """A node being called."""

    __slots__ = (
        "_archive", "_buffer", "_error_fd", "_failed", "_fd", "_loop", "_pid", "_ready", "_status",
        "_tail", "attempt", "channel", "name", "rank", "reached", "searched", "stage",
    )  # fmt: skip

    def __init__(
        self,
        loop: Loop,
        rank: int,
        name: str,
        archive: bytes,
        ready: Callable[[Call, Channel, bytes], None],
        failed: Callable[[Call, str], None],
    ) -> None:
        """*ready* gets the channel, not yet started, and what was read beyond the loader's word;
        *failed* gets why, in one word or line; what the connector said is in `tail`."""
        self._loop = loop
        self.rank, self.name = rank, name
        self._archive = archive
        self._ready, self._failed = ready, failed
        self._buffer = b""
        self._tail = b""
        self._status = -1
        self._pid = 0
        self._fd = self._error_fd = -1
        self.searched = False
        """Whether this call already looks for a Python of another name."""
        self.stage = "connect"
        self.channel: Channel | None = None
        self.attempt = 1
        self.reached: Callable[[Call], None] = _nothing
        """Called when the loader has spoken."""

    def start(self, argv: list[str], env: dict[str, str]) -> None:
        """Start the connector."""
        ours, theirs = socketpair(AF_UNIX, SOCK_STREAM)
        error, their_error = os.pipe()
        self._fd, self._error_fd = ours.detach(), error
        end = theirs.fileno()
        actions = [(os.POSIX_SPAWN_DUP2, end, 0), (os.POSIX_SPAWN_DUP2, end, 1)]
        actions.append((os.POSIX_SPAWN_DUP2, their_error, 2))
        try:
            self._pid = os.posix_spawnp(
                argv[0], argv, env, file_actions=actions, setsid=True, setsigdef=(13, 25)
            )
        except OSError as problem:
            self._fail(f"cannot start {argv[0]}: {problem.strerror}")
            return
        finally:
            theirs.close()
            os.close(their_error)
        os.set_blocking(self._fd, False)
        os.set_blocking(error, False)
        self._loop.watch(self._fd, READ, self._readable)
        self._loop.watch(error, READ, self._error_readable)
        self._loop.reap(self._pid, self._ended)

    def settled(self) -> None:
        """The agent has introduced itself."""
        self.stage = "ready"

    def outrun(self) -> None:
        """Its node has come in another way; what this call set up is that one, or is refused."""
        self.settled()
        if self.channel is not None:
            self.channel.close("came another way")

    @property
    def tail(self) -> bytes:
        return self._tail

    @property
    def status(self) -> int:
        """The connector's wait status, -1 while it runs."""
        return self._status

    def abandon(self) -> None:
        """Give up without a word."""
        self._kill()
        self.stage = "failed"
        self._close_own()
        if self.channel is not None:
            self.channel.close("abandoned")

    def gone(self) -> None:
        """The agent has closed its channel before it introduced itself."""
        if self._status >= 0:
            self._fail("agent ended")

    def _kill(self) -> None:
        if self._pid and self._status < 0:
            try:
                os.killpg(self._pid, SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass

    def _fail(self, reason: str) -> None:
        if self.stage in ("ready", "failed"):
            return
        stage, self.stage = self.stage, "failed"
        self._close_own()
        self._failed(self, stage + ":" + reason)

    def _close_own(self) -> None:
        if self._fd >= 0:
            self._loop.unwatch(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _readable(self, _events: int) -> None:
        try:
            data = os.read(self._fd, 4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._gone()
            return
        self._buffer += data
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if not newline:
                break
            at = line.find(MARK)
            if at < 0:  # a login script's chatter
                self._tail = (self._tail + line + b"\n")[-TAIL_SIZE:]
                self._buffer = rest
                continue
            self._buffer = rest
            if self._spoken(line[at + len(MARK) :].split()):
                return
        if len(self._buffer) > NOISE_SIZE_MAX:
            self._fail("noise instead of an agent")
            self._kill()

    def _spoken(self, words: list[bytes]) -> bool:
        """Obey the loader's word; return whether the call's reading is over."""
        verb = words[0] if words else b""
        if self.stage == "connect":
            self.stage = "agent"
            self.reached(self)
        if verb == b"have":
            fd, self._fd = self._fd, -1
            self._loop.unwatch(fd)
            self._archive = b""
            self.channel = Channel(self._loop, fd, fd)
            self._ready(self, self.channel, self._buffer)
            return True
        if verb == b"need":
            self._push()
            return self._fd < 0
        self._fail(NO_PYTHON if verb in (b"old", b"none") else "agent did not start")
        return True

    def _push(self) -> None:
        try:
            count = os.write(self._fd, self._archive)
        except BlockingIOError:
            count = 0
        except OSError:
            self._fail("closed")
            return
        self._archive = self._archive[count:]
        if self._archive:
            self._loop.watch(self._fd, READ | WRITE, self._pushing)
        else:
            self._loop.watch(self._fd, READ, self._readable)

    def _pushing(self, events: int) -> None:
        if events & WRITE:
            self._push()
        if events & ~WRITE and self._fd >= 0:
            self._readable(events)

    def _gone(self) -> None:
        """The connector has closed its output: it says why on the other pipe, and ends."""
        self._close_own()
        if self._status >= 0:
            self._over()

    def _error_readable(self, _events: int) -> None:
        try:
            data = os.read(self._error_fd, 4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._tail = (self._tail + data)[-TAIL_SIZE:]
            return
        self._close_error()

    def _close_error(self) -> None:
        if self._error_fd >= 0:
            self._loop.unwatch(self._error_fd)
            os.close(self._error_fd)
            self._error_fd = -1

    def _ended(self, status: int) -> None:
        self._status = status
        if self._error_fd >= 0:
            self._error_readable(0)
        self._close_error()
        if self.channel is None:
            if self._fd >= 0:
                self._readable(0)
            self._over()
        elif self.stage == "agent":
            self.channel.close("connector ended")
            self._fail("agent ended")

    def _over(self) -> None:
        if self.channel is None and self.stage not in ("ready", "failed"):
            self._fail("connector ended")


def _nothing(_call: Call) -> None:
    pass
