"""What a connection has still to send: bytes by gathering writes, files by sendfile.

Synchronous: `transport` decides when to pump.  Positions count the bytes ever queued, so that
"has this frame left?" is one comparison.

Invariants
  * parts leave in the order of `put`, whole;
  * a file is released exactly once: when it is on its way, or when the outbox is dropped;
  * behind a payload that is still growing everything waits: whoever lets it grow pumps again.

A frame's size is on the wire before its file is read.  A file that turns out shorter, or that
the disk cannot read, is therefore filled up with zeros: the receiver's checksum tells, and the
other requests of the connection go on.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from common import log
from common.checksum import Buffer

__all__ = ["FilePayload", "Growing", "GrowingPayload", "Outbox", "Part"]

_GATHER_MAX = 512
"""Below the kernel's IOV_MAX, 1,024."""
_ZEROS = bytes(1 << 20)

_log = log.get("ka.outbox")


class FilePayload(NamedTuple):
    """A payload sent by the kernel from a file; `release` is called when it is on its way.

    The receiver must check what it gets: what cannot be read is sent as zeros.
    """

    fd: int
    offset: int
    length: int
    release: Callable[[], None]


class Growing:
    """Bytes that are still being received, while several outboxes send what there is of them."""

    __slots__ = ("data", "place", "ready_size", "stored_size")

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.ready_size = 0
        self.place: tuple[int, int] | None = None
        """The file and the offset at which the first `stored_size` bytes are as well."""
        self.stored_size = 0

    def grow(self, size: int) -> None:
        self.ready_size = max(self.ready_size, size)

    def give_up(self) -> None:
        """Pass for complete: the receiver's checksum tells that it is not."""
        self.ready_size = len(self.data)


class GrowingPayload:
    """A payload, or what has not left of it yet; for one outbox."""

    __slots__ = ("given_up", "growing", "offset")

    def __init__(self, growing: Growing) -> None:
        self.growing = growing
        self.offset = 0
        self.given_up = False
        """The rest is not waited for: whatever is there passes for it."""

    @property
    def length(self) -> int:
        return len(self.growing.data) - self.offset

    @property
    def ready_size(self) -> int:
        return len(self.growing.data) if self.given_up else self.growing.ready_size


Part = Buffer | FilePayload | GrowingPayload


class Outbox:
    """The queue in front of one non-blocking socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._parts: deque[Part] = deque()
        self.size = 0
        """Bytes that wait."""
        self.end = 0
        """The position behind the last byte queued; `end - size` have left."""

    def __bool__(self) -> bool:
        return bool(self._parts)

    def put(self, parts: Sequence[Part]) -> None:
        """Queue *parts* (views of bytes) behind what waits."""
        for part in parts:
            size = _size_of(part)
            if size:
                self._parts.append(part)
                self.size += size
                self.end += size
            elif isinstance(part, FilePayload):
                part.release()

    def pump(self) -> None:
        """Send until nothing waits, or what is next has not come yet.

        Raises BlockingIOError when the socket is full.
        """
        parts = self._parts
        while parts:
            first = parts[0]
            if isinstance(first, FilePayload):
                self._send_file(first)
                continue
            if isinstance(first, GrowingPayload):
                if not self._send_grown(first):
                    return
                continue
            if len(parts) == 1:
                sent = self._sock.send(first)
            else:
                gather: list[Buffer] = []
                flags = 0
                for part in parts:
                    if isinstance(part, (FilePayload, GrowingPayload)):
                        flags = socket.MSG_MORE  # or a header were a packet of its own
                        break
                    if len(gather) == _GATHER_MAX:
                        break
                    gather.append(part)
                sent = self._sock.sendmsg(gather, [], flags)
            self.size -= sent
            while sent:
                part = parts[0]
                assert not isinstance(part, (FilePayload, GrowingPayload))
                if sent < len(part):
                    parts[0] = memoryview(part)[sent:]
                    break
                sent -= len(part)
                parts.popleft()

    def keep(self, end: int, size: int) -> None:
        """Copy what still waits of the *size* bytes before position *end*.

        Their owner gets the buffers back before they have left.
        """
        position = self.end - self.size
        for index, part in enumerate(list(self._parts)):
            if position >= end:
                return
            position += _size_of(part)
            if isinstance(part, (bytes, FilePayload, GrowingPayload)):
                continue
            if position > end - size:
                self._parts[index] = bytes(part)

    def drop(self) -> None:
        """Forget what waits."""
        parts = list(self._parts)
        self._parts.clear()
        self.size = 0
        for part in parts:
            if isinstance(part, FilePayload):
                part.release()

    def _send_grown(self, first: GrowingPayload) -> bool:
        """Send what there is of it; return whether more can be sent."""
        growing, offset = first.growing, first.offset
        ready_size = first.ready_size
        if ready_size <= offset:
            return False
        sent = 0
        if growing.place is not None and offset < growing.stored_size:
            fd, start = growing.place
            stored = growing.stored_size - offset
            try:
                sent = os.sendfile(self._sock.fileno(), fd, start + offset, stored)
            except (BlockingIOError, ConnectionError):
                raise
            except OSError:
                growing.place = None
        if not sent:
            sent = self._sock.send(growing.data[offset:ready_size])
        self.size -= sent
        first.offset = offset + sent
        if not first.length:
            self._parts.popleft()
            return True
        return first.offset < ready_size

    def _send_file(self, first: FilePayload) -> None:
        reason = "file too short"
        try:
            sent = os.sendfile(self._sock.fileno(), first.fd, first.offset, first.length)
        except (BlockingIOError, ConnectionError):
            raise
        except OSError as error:
            # If it was the socket's, sending the zeros meets it again.
            reason, sent = str(error), 0
        self.size -= sent
        left = first.length - sent
        if sent and left:
            self._parts[0] = first._replace(offset=first.offset + sent, length=left)
            return
        self._parts.popleft()
        first.release()
        if left:
            _log.error("sendfile.failed", offset=first.offset, length=left, reason=reason)
            self._parts.extendleft(
                memoryview(_ZEROS)[: min(left - at, len(_ZEROS))]
                for at in range(0, left, len(_ZEROS))
            )


def _size_of(part: Part) -> int:
    return part.length if isinstance(part, (FilePayload, GrowingPayload)) else len(part)
