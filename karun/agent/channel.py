"""A connection between neighbours in the tree: frames over one or two descriptors.

Invariants
  * nothing waits: what the kernel does not take is held, and sent when it does;
  * `closed` is called once, with one line that says why, and nothing after it;
  * reading can be paused, which is how back-pressure travels up the tree.
"""

from __future__ import annotations

import os

from . import frames
from .loop import READ, WRITE, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .proof import Seal

READ_SIZE = 64 << 10
"""What a pipe holds.  A buffer of 128 KiB is more than the C library keeps when it is freed: two
page faults at each read."""
SILENCE_PINGS = 4
"""A neighbour that says nothing for so many ping times is lost."""
DRAINED_SIZE = 256 << 10
HELD_SIZE_MAX = 64 << 20
"""What a neighbour may leave untaken.  Orders are bounded by the head's window, so only a
neighbour that has stopped, and is soon found out, gets near it."""


class Channel:
    """Frames to and from one neighbour."""

    __slots__ = (
        "_decoder", "_held", "_held_size", "_loop", "_paused", "_read_fd", "_seal", "_write_fd",
        "closed", "drained", "frame", "heard", "open", "peer", "sent",
    )  # fmt: skip

    def __init__(
        self, loop: Loop, read_fd: int, write_fd: int, *, size_max: int = frames.FRAME_SIZE_MAX
    ) -> None:
        self._loop = loop
        self._read_fd, self._write_fd = read_fd, write_fd
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)
        self._decoder = frames.Decoder(size_max)
        self._held: list[bytes] = []
        self._held_size = 0
        self._paused = False
        self._seal: Seal | None = None
        self.open = True
        self.peer = frames.HEAD
        """The neighbour's rank."""
        self.heard = self.sent = loop.now
        self.drained: Callable[[], None] | None = None
        """Called when what was held has fallen below DRAINED_SIZE."""
        self.frame: Callable[[Channel, int, int, bytes], None]
        self.closed: Callable[[Channel, str], None]

    def start(
        self,
        frame: Callable[[Channel, int, int, bytes], None],
        closed: Callable[[Channel, str], None],
        early: bytes = b"",
    ) -> None:
        """Begin to read; *early* is what has been read already."""
        self.frame, self.closed = frame, closed
        self.heard = self.sent = self._loop.now
        self._watch()
        if early:
            self._feed(early)

    @property
    def paused(self) -> bool:
        return self._paused

    def trust(self, *, sent: Seal, heard: Seal) -> None:
        """Both have proved themselves: from now on frames are sealed, and of every size."""
        self._seal, self._decoder.fits = sent, heard.fits
        self._decoder.size_max = frames.FRAME_SIZE_MAX

    @property
    def is_direct(self) -> bool:
        """Whether the neighbours are connected by TCP, not by what called the lower one."""
        return self._seal is not None

    @property
    def held_size(self) -> int:
        return self._held_size

    def send(self, kind: int, rank: int, payload: bytes = b"") -> None:
        self.send_raw(frames.encode(kind, rank, payload))

    def send_raw(self, data: bytes) -> None:
        if not self.open:
            return
        if self._seal is not None:
            data += self._seal.tag(data)
        if self._held:
            self._held.append(data)
            self._held_size += len(data)
            if self._held_size > HELD_SIZE_MAX:
                self.close("takes nothing")
            return
        try:
            count = os.write(self._write_fd, data)
        except BlockingIOError:
            count = 0
        except OSError as error:
            self.close(error.strerror or "write error")
            return
        self.sent = self._loop.now
        if count < len(data):
            self._held.append(data[count:])
            self._held_size = len(data) - count
            self._watch()

    def pause(self, paused: bool) -> None:
        """Stop reading, or go on."""
        if self.open and paused != self._paused:
            self._paused = paused
            self.heard = self._loop.now
            self._watch()

    def close(self, reason: str) -> None:
        if not self.open:
            return
        self.open = False
        for fd in {self._read_fd, self._write_fd}:
            self._loop.unwatch(fd)
            os.close(fd)
        self._held.clear()
        self._held_size = 0
        self.closed(self, reason)

    def _watch(self) -> None:
        reading = 0 if self._paused else READ
        writing = WRITE if self._held else 0
        if self._read_fd == self._write_fd:
            self._loop.watch(self._read_fd, reading | writing, self._ready)
        else:
            self._loop.watch(self._read_fd, reading, self._ready)
            if writing:
                self._loop.watch(self._write_fd, writing, self._ready)
            else:
                self._loop.unwatch(self._write_fd)

    def _ready(self, events: int) -> None:
        if events & WRITE and self._held:
            self._flush()
        if not self.open or not events & ~WRITE:
            return
        try:
            data = os.read(self._read_fd, READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self.close(error.strerror or "read error")
            return
        if not data:
            self.close("connection closed")
            return
        self.heard = self._loop.now
        self._feed(data)

    def _feed(self, data: bytes) -> None:
        try:
            for kind, rank, payload in self._decoder.feed(data):
                if kind != frames.PING:
                    self.frame(self, kind, rank, payload)
                if not self.open:
                    return
        except frames.FrameError as error:
            self.close(f"protocol error: {error}")

    def _flush(self) -> None:
        """Send what is held, now that the kernel takes more."""
        try:
            while self._held:
                data = self._first()
                count = os.write(self._write_fd, data)
                self.sent = self._loop.now
                self._held_size -= count
                if count < len(data):
                    self._held.insert(0, data[count:])
        except BlockingIOError:
            self._held.insert(0, data)
        except OSError as error:
            self.close(error.strerror or "write error")
            return
        self._watch()
        if self._held_size < DRAINED_SIZE and self.drained is not None:
            self.drained()

    def _first(self) -> bytes:
        """Take what is to be sent next: small frames together, in one system call."""
        size = count = 0
        while count < len(self._held) and size < READ_SIZE:
            size += len(self._held[count])
            count += 1
        data = self._held[0] if count == 1 else b"".join(self._held[:count])
        del self._held[:count]
        return data
