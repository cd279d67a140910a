"""The loop of an agent, and of the head: descriptors, timers, children.  No threads.

The head lets trio wait for `fileno()` and then calls `step(0)`; an agent calls `step` for ever.
Callbacks run one at a time and never wait; what they raise ends the loop.
"""

from __future__ import annotations

import os
import select
from heapq import heappop, heappush
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
SIGKILL = 9
BATCH_COUNT = 32
"""Descriptors served between two looks at the timers.  One may stand for a process to be started,
which takes as long as it waits for a processor; pings must go out meanwhile."""
_POLL_S = 0.05
"""How often a child is asked for where the kernel has no pidfd (before 5.3)."""


class Timer:
    """A callback to come; `cancel` is for good."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None] | None) -> None:
        self.callback = callback

    def __lt__(self, _other: Timer) -> bool:
        return False  # of two for the same time any is first

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """Calls back when descriptors are ready, times have come, children have ended.

    With few descriptors it hands all of them to the kernel at each step, which saves two system
    calls for each that comes and goes; `grow` is for those that will have many.
    """

    __slots__ = ("_children", "_epoll", "_poll", "_timers", "_watched", "now")

    def __init__(self) -> None:
        self._poll: select.poll | select.epoll = select.poll()
        self._epoll: select.epoll | None = None
        self._watched: dict[int, tuple[int, Callable[[int], None]]] = {}
        """Of each descriptor, events and handler."""
        self._timers: list[tuple[float, Timer]] = []
        self._children: set[int] = set()
        self.now = monotonic()

    def grow(self) -> None:
        """Be ready for many descriptors, and for `fileno`."""
        if self._epoll is None:
            self._poll = self._epoll = select.epoll()
            for fd, (events, _handler) in self._watched.items():
                self._epoll.register(fd, events)

    def fileno(self) -> int:
        """Return what is readable when there is something to do; after `grow`."""
        assert self._epoll is not None
        return self._epoll.fileno()

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call *handler(events)* when *fd* is ready; replaces an earlier watch of it."""
        if fd in self._watched:
            self._poll.modify(fd, events)
        else:
            self._poll.register(fd, events)
        self._watched[fd] = (events, handler)

    def unwatch(self, fd: int) -> None:
        if self._watched.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def at(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(callback)
        heappush(self._timers, (monotonic() + delay_s, timer))
        return timer

    def timeout(self) -> float | None:
        """Return how long a step may wait; None: until a descriptor is ready."""
        timers = self._timers
        while timers:
            when, timer = timers[0]
            if timer.callback is not None:
                wait_s = when - monotonic()
                return wait_s if wait_s > 0 else 0.0
            heappop(timers)
        return None

    def step(self, wait_s: float | None) -> None:
        """Wait at most *wait_s*, then call what is due."""
        if self._epoll is None:
            ready = self._poll.poll(None if wait_s is None else wait_s * 1000)
        else:
            ready = self._epoll.poll(wait_s, BATCH_COUNT)
        self.now = now = monotonic()
        watched = self._watched
        for fd, events in ready:
            if fd in watched:  # else an earlier one of this batch closed it
                watched[fd][1](events)
        timers = self._timers
        while timers and timers[0][0] <= now:
            callback = heappop(timers)[1].callback
            if callback is not None:
                callback()

    def reap(self, pid: int, ended: Callable[[int], None]) -> None:
        """Call *ended(wait status)* when the child has ended."""
        self._children.add(pid)
        try:
            fd = os.pidfd_open(pid)
        except (AttributeError, OSError):
            self.at(_POLL_S, lambda: self._poll_child(pid, ended))
            return

        def over(_events: int) -> None:
            self.unwatch(fd)
            os.close(fd)
            self._children.discard(pid)
            ended(_status(pid, 0))

        self.watch(fd, READ, over)

    def _poll_child(self, pid: int, ended: Callable[[int], None]) -> None:
        status = _status(pid, os.WNOHANG)
        if status < 0:
            self.at(_POLL_S, lambda: self._poll_child(pid, ended))
        else:
            self._children.discard(pid)
            ended(status)

    def end_children(self) -> None:
        """Kill the children that are left, with their process groups, and wait for their end."""
        for pid in self._children:
            try:
                os.killpg(pid, SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        for pid in self._children:
            _status(pid, 0)
        self._children.clear()

    def close(self) -> None:
        if self._epoll is not None:
            self._epoll.close()


def _status(pid: int, flags: int) -> int:
    """Return the wait status of a child; -1 while it runs."""
    try:
        found, status = os.waitpid(pid, flags)
    except ChildProcessError:
        return 0  # another reaper in this process was quicker; how it ended is lost
    return status if found else -1


def boot_id() -> bytes:
    """Return what tells machines apart: nodes on the head's own machine make no quicker tree."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb", buffering=0) as file:
            return file.read(36)
    except OSError:
        return b""
