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

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callable[[], None] | None) -> None:
        self.when = when
        self.callback = callback

    def __lt__(self, other: Timer) -> bool:
        return self.when < other.when

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """Calls back when descriptors are ready, times have come, children have ended."""

    __slots__ = ("_children", "_epoll", "_handlers", "_timers", "gap_s", "now")

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._timers: list[Timer] = []
        self._children: set[int] = set()
        self.now = monotonic()
        self.gap_s = 0.0
        """How much later than asked for the last step ran: a sleeper does not judge others."""

    def fileno(self) -> int:
        return self._epoll.fileno()

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call *handler(events)* when *fd* is ready; replaces an earlier watch of it."""
        if fd in self._handlers:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def at(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(monotonic() + delay_s, callback)
        heappush(self._timers, timer)
        return timer

    def timeout(self) -> float | None:
        """Return how long a step may wait; None: until a descriptor is ready."""
        while self._timers and self._timers[0].callback is None:
            heappop(self._timers)
        return max(0.0, self._timers[0].when - monotonic()) if self._timers else None

    def step(self, wait_s: float | None) -> None:
        """Wait at most *wait_s*, then call what is due."""
        due = None if wait_s is None else monotonic() + wait_s
        ready = self._epoll.poll(wait_s, BATCH_COUNT)
        self.now = monotonic()
        self.gap_s = max(0.0, self.now - due) if due is not None and not ready else 0.0
        for fd, events in ready:
            handler = self._handlers.get(fd)
            if handler is not None:  # else an earlier one of this batch closed it
                handler(events)
        while self._timers and self._timers[0].when <= self.now:
            callback = heappop(self._timers).callback
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
