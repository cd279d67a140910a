"""The MPI programs on this node: a socket to each rank, and the barriers that pass through here.

What ranks say is understood by karun/pmi.py, how barriers are gathered is in
karun/agent/barrier.py; here bytes are read and written, and it is seen to that a rank's end is
told after all that it said.

Loaded by nodes of an MPI program only.
"""

from __future__ import annotations

import os
from _socket import AF_UNIX, SOCK_STREAM, socketpair

from karun.pmi import Abort, BarrierUp, Proxy, Reply, environment, process_mapping

from . import frames
from .barrier import Gathering, world_of
from .loop import READ, Loop, Timer
from .setup import Setup

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from karun.pmi import Action

HOLD_S = 0.2
"""How long a relay waits for the rest of its subtree."""
READ_SIZE = 16 << 10
CHILD_FD = 3
"""The descriptor that a rank finds its launcher on."""


class Worlds:
    """All MPI programs of a run, on this node and on their way through it."""

    def __init__(
        self,
        loop: Loop,
        setup: Setup,
        tell: Callable[..., None],
        send_up: Callable[[int, bytes], None],
        below: Callable[[], Iterable[int]],
    ) -> None:
        """*tell(kind, ...)* is an event for the head, *send_up(kind, payload)* for the parent;
        *below* gives the nodes that are reached through this one."""
        self._loop, self._setup = loop, setup
        self._tell, self._send_up, self._below = tell, send_up, below
        self._gatherings: dict[int, Gathering] = {}
        self._held: dict[int, Timer] = {}
        self._worlds: dict[int, _World] = {}

    def begin(self, number: int, count: int) -> None:
        """Expect *count* ranks of a program on this node, as on all others."""

        def brought(puts: bytes, left: int) -> None:
            self._gathering(number).bring(1 << self._setup.rank, puts, left)
            self._pass_on(number)

        def aborted(rank: int, code: int, reason: str) -> None:
            self._tell(frames.ABORTED, number, rank, code, reason)

        self._worlds[number] = _World(self._loop, self._setup, number, count, brought, aborted)

    def place(self, number: int, local: int) -> tuple[dict[str, str], int]:
        """Return the environment of a rank, and its end of a socket, to be closed when it has it.

        Raises OSError.
        """
        return self._worlds[number].place(local)

    def ended(self, number: int, local: int, code: int, signal: int) -> None:
        """A rank's process has ended."""
        self._worlds[number].ended(local, code, signal)

    def passed(self, number: int, barrier: int, puts: bytes) -> None:
        """The head lets all go on."""
        self._gathering(number).passed(barrier)
        self._worlds[number].released(puts)

    def take(self, payload: bytes) -> None:
        """Add what a child has gathered; raises FrameError."""
        number = world_of(payload)
        self._gathering(number).take(payload, self._setup.size)
        self._pass_on(number)

    def again(self) -> None:
        """There is another parent: it may lack what the one before was sent."""
        for number, gathering in self._gatherings.items():
            gathering.forget()
            self._pass_on(number)

    def _gathering(self, number: int) -> Gathering:
        return self._gatherings.setdefault(number, Gathering())

    def _pass_on(self, number: int) -> None:
        everyone = 1 << self._setup.rank
        for rank in self._below():
            everyone |= 1 << rank
        if self._gathering(number).has(everyone):
            self._send(number)
        elif number not in self._held:
            self._held[number] = self._loop.at(HOLD_S, lambda: self._send(number))

    def _send(self, number: int) -> None:
        held = self._held.pop(number, None)
        if held is not None:
            held.cancel()
        news = self._gathering(number).news(number)
        if news is not None:
            self._send_up(frames.BARRIER, news)


class _World:
    """The ranks of one program on this node."""

    def __init__(
        self,
        loop: Loop,
        setup: Setup,
        number: int,
        count: int,
        brought: Callable[[bytes, int], None],
        aborted: Callable[[int, int, str], None],
    ) -> None:
        self._loop = loop
        self._count = count
        self._first = setup.rank * count
        self._size = setup.size * count
        self._brought, self._aborted = brought, aborted
        self._fds: dict[int, int] = {}
        self._proxy = Proxy(
            f"karun_{setup.run_id}_{number}",
            self._size,
            range(self._first, self._first + count),
            mapping=process_mapping([count] * setup.size),
        )

    def place(self, local: int) -> tuple[dict[str, str], int]:
        ours, theirs = socketpair(AF_UNIX, SOCK_STREAM)
        rank = self._first + local
        self._fds[rank] = fd = ours.detach()
        os.set_blocking(fd, False)
        self._loop.watch(fd, READ, lambda _events: self._readable(rank))
        env = environment(rank, self._size, CHILD_FD, (local, self._count))
        return env, theirs.detach()

    def released(self, puts: bytes) -> None:
        self._act(self._proxy.released(puts))

    def ended(self, local: int, code: int, signal: int) -> None:
        rank = self._first + local
        self._readable(rank)
        self._close(rank)
        self._act(self._proxy.exited(rank, code, signal))

    def _readable(self, rank: int) -> None:
        while self._read(rank):
            pass

    def _read(self, rank: int) -> bool:
        """Take what a rank wrote; return whether there may be more."""
        fd = self._fds.get(rank)
        if fd is None:
            return False
        try:
            data = os.read(fd, READ_SIZE)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._close(rank)
            return False
        self._act(self._proxy.receive(rank, data))
        return True

    def _close(self, rank: int) -> None:
        fd = self._fds.pop(rank, None)
        if fd is not None:
            self._loop.unwatch(fd)
            os.close(fd)
            self._act(self._proxy.closed(rank))

    def _act(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, Reply):
                self._write(action.rank, action.data)
            elif isinstance(action, BarrierUp):
                self._brought(action.payload, action.left)
            elif isinstance(action, Abort):
                self._aborted(action.rank, action.code, action.reason)

    def _write(self, rank: int, data: bytes) -> None:
        """Answer a rank.  It asks and waits: what it does not take at once it will never take."""
        fd = self._fds.get(rank)
        try:
            if fd is not None:
                os.write(fd, data)
        except OSError:
            self._close(rank)
