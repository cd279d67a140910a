"""An edge: one connection between two hops, after the handshake.

Messages of hops travel as NOTIFY frames, a chunk as the payload of its `Chunk` message, straight
from the socket into the buffer that the owner lends.  The plan is asked for by REQUEST frames
(`briefing`).  Nothing here waits for the owner: flow control is the hop's window.

Receiving is synchronous (`drain`): a task calls it when the socket is readable; in the middle of a
payload that is when a good part of it has come (SO_RCVLOWAT), which saves most of the wake-ups on
a slow link.  The owner hears of pieces of that size; of smaller ones, and that the peer is heard
from at all, it hears from `poke`, which a clock calls.

Invariants
  * frames leave in the order of `put`, whole; `release` is called once the bytes are not needed;
  * a lent buffer is given back exactly once: `chunk_came`, or `chunk_lost` when the edge breaks;
  * after `close` no method of the owner is called; after a break only `edge_broke`, once.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from common.broadcast.cost import PIECE_SIZES
from common.broadcast.wire import HOP, Chunk
from common.errors import Code, KaError
from common.framing import Frame, FrameReceiver, Kind, encode_frame
from common.messages import Message, decode_error
from common.outbox import Outbox, Part
from common.sockets import flow_evenly, start_quickly

__all__ = ["Edge", "Owner", "chunk_header"]

SIZE_PER_TURN = 4 * 1024 * 1024
"""A busy edge lets other tasks run after this much."""
START_SIZE = 8 * 1024 * 1024
"""When so much has left, slow start is over: it doubles what is under way with each round trip."""
_AT_ONCE = struct.pack("ii", 1, 0)
UNSENT_SIZE_MAX = 1024 * 1024 * 1024
"""Far beyond all windows: a peer that makes us queue this much is out of its mind."""


class Owner(Protocol):
    """What an edge tells, always from its own tasks or from `poke`."""

    def chunk_begins(self, edge: Edge, chunk: int, size: int) -> memoryview:
        """Lend a buffer of exactly *size* bytes; raises KaError to break the edge."""

    def chunk_came(self, edge: Edge, chunk: int, data: memoryview) -> None: ...

    def chunk_lost(self, chunk: int, data: memoryview) -> None:
        """The rest of a chunk will not come."""

    def message_came(self, edge: Edge, message: Message) -> None: ...

    def request_came(self, edge: Edge, request_id: int, body: bytes) -> None: ...

    def answer_came(self, edge: Edge, request_id: int, body: bytes, payload: bytes) -> None: ...

    def bytes_came(self, edge: Edge, chunk: int, data: memoryview, size: int) -> None:
        """A piece of a chunk was received; the first *size* bytes of the lent buffer are there."""

    def bytes_heard(self, edge: Edge) -> None:
        """Pieces came since the last `poke`."""

    def bytes_left(self, edge: Edge) -> None:
        """The kernel took some of what waited to be sent."""

    def edge_broke(self, edge: Edge, reason: str) -> None: ...


def chunk_header(transfer: bytes, chunk: int, size: int) -> bytes:
    """Return what precedes the chunk's bytes."""
    return encode_frame(Kind.NOTIFY, 0, HOP.encode(Chunk(transfer, chunk)), size)


class Edge:
    """One connection; `run` drives it."""

    def __init__(
        self, sock: socket.socket, receiver: FrameReceiver, owner: Owner, *, peer: int, life: bytes
    ) -> None:
        self.peer = peer
        self.life = life
        """Random, of the peer's process; empty for one that we have called ourselves."""
        self.is_open = True
        self.piece_size = PIECE_SIZES[-1]
        """So much of a chunk is worth waking up for; well below the kernel's smallest limit for a
        receive buffer, so that it never waits for more."""
        self._sock = sock
        self._receiver = receiver
        self._owner = owner
        self._outbox = Outbox(sock)
        self._releases: deque[tuple[int, Callable[[], None]]] = deque()
        """Where in the outbox a buffer ends, and what to do when it has left."""
        self._filled = trio.Event()
        self._drained = trio.Event()
        self._closed = trio.Event()
        self._is_full = False
        """The kernel takes no more for now."""
        self._is_starting = True
        start_quickly(sock)
        self._chunk = -1
        self._payload: memoryview | None = None
        self._told_size = -1
        """How much of a chunk the owner knows of."""
        self._flows = False
        """Pieces came since the last `poke`."""
        self._answer: tuple[int, bytes] | None = None
        self._low_water = 1

    # ------------------------------------------------------------ sending

    def put(self, parts: Sequence[Part], release: Callable[[], None] | None = None) -> None:
        """Queue a frame; `flush` sends it."""
        if not self.is_open:
            if release is not None:
                release()
            return
        self._outbox.put(parts)
        if self._drained.is_set():
            self._drained = trio.Event()
        if release is not None:
            self._releases.append((self._outbox.end, release))
        if self._outbox.size > UNSENT_SIZE_MAX:
            self.fail("the peer does not read")

    def flush(self) -> None:
        """Send as much as the kernel takes now; the rest follows by itself."""
        if not self.is_open or not self._outbox:
            return
        before = self._outbox.size
        self._is_full = False
        try:
            self._outbox.pump()
        except BlockingIOError:
            self._is_full = True
            self._filled.set()
        except OSError as error:
            self.fail(error.strerror or str(error))
            return
        if self._outbox.size != before:
            self._left(self._outbox.end - self._outbox.size)
        if not self._outbox:
            self._drained.set()

    def _left(self, position: int) -> None:
        if self._is_starting and position >= START_SIZE:
            self._is_starting = False
            flow_evenly(self._sock)
        while self._releases and self._releases[0][0] <= position:
            self._releases.popleft()[1]()

    # ------------------------------------------------------------ the tasks

    async def run(self) -> None:
        """Drive the edge until it is closed or breaks; owns the socket."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                nursery.start_soon(self._read)
                await self._closed.wait()
                nursery.cancel_scope.cancel()
        finally:
            self.close()
            self._sock.close()

    async def _read(self) -> None:
        while self.is_open:
            if self._try_drain():
                await trio.lowlevel.checkpoint()
            elif self.is_open:
                await trio.lowlevel.wait_readable(self._sock)

    async def _write(self) -> None:
        while self.is_open:
            await self._filled.wait()
            self._filled = trio.Event()
            while self._is_full and self.is_open:
                await trio.lowlevel.wait_writable(self._sock)
                self.flush()
                if self.is_open:
                    self._owner.bytes_left(self)

    async def finish(self) -> None:
        """Send what waits, say that nothing follows, and give the peer a moment to hang up.

        Were the socket closed with something unread in it, the peer might never see the end.
        """
        if self._outbox:
            await self._drained.wait()
        if self.is_open:
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError:
                return
            await self._closed.wait()

    def abort(self) -> None:
        """End it, and take back what the kernel has not sent yet."""
        if self.is_open and self._sock.family != socket.AF_UNIX:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        self.close()

    def close(self) -> None:
        """End it; the owner hears nothing any more."""
        if not self.is_open:
            return
        self.is_open = False
        self._closed.set()
        self._drained.set()
        self._outbox.drop()
        while self._releases:
            self._releases.popleft()[1]()
        if self._payload is not None:
            self._receiver.discard_payload()
            if self._answer is None:
                self._owner.chunk_lost(self._chunk, self._payload)
            self._payload = None
        try:
            self._sock.shutdown(socket.SHUT_RDWR)  # the peer hears now, not when `run` ends
        except OSError:
            pass  # it has gone already

    def fail(self, reason: str) -> None:
        """It broke, or the peer broke the rules."""
        if self.is_open:
            self.close()
            self._owner.edge_broke(self, reason)

    # ------------------------------------------------------------ receiving

    def poke(self) -> None:
        """Take what has come of a chunk, though it is less than is worth waking up for."""
        if not self._flows and self._payload is not None:
            # To the end: who waits may wait for a full low water mark.
            while self.is_open and self._try_drain(least_size=1):
                pass
        if self._flows and self.is_open:
            self._flows = False
            self._owner.bytes_heard(self)

    def _try_drain(self, least_size: int = 0) -> bool:
        try:
            return self._drain(least_size or self.piece_size // 2)
        except KaError as error:
            self.fail(str(error))
        except OSError as error:
            self.fail(error.strerror or str(error))
        return False

    def _drain(self, least_size: int) -> bool:
        """Take what the socket has; return whether there may be more.

        Of a chunk that is not complete the owner hears when at least *least_size* bytes are new:
        what comes along with its header is seldom worth the work.
        """
        receiver, taken = self._receiver, 0
        is_empty = False
        while self.is_open and taken < SIZE_PER_TURN:
            if receiver.payload_complete:
                frame = receiver.next_frame()
                if frame is not None:
                    self._take(frame)
                    continue
            if is_empty:
                break
            room = receiver.want()
            try:
                count = self._sock.recv_into(room)
            except BlockingIOError:
                is_empty = True
                continue
            if not count:
                raise KaError(Code.UNREACHABLE, "the peer closed the connection")
            receiver.got(count)
            taken += count
            is_empty = count < len(room)
            if self._payload is not None and receiver.payload_complete:
                self._payload_came()
        untold_size = 0
        if self._payload is not None and self._answer is None:
            size = len(self._payload) - receiver.payload_left
            untold_size = size - self._told_size
            if untold_size >= least_size:
                self._told_size, untold_size = size, 0
                self._flows = True
                self._owner.bytes_came(self, self._chunk, self._payload, size)
        if is_empty:
            self._set_low_water(self.piece_size - untold_size)
        return self.is_open and not is_empty

    def _set_low_water(self, size: int) -> None:
        """Be woken when a good part of the rest of a chunk is there."""
        left = 1
        if self._payload is not None and self.is_open:
            left = max(1, min(size, len(self._receiver.want())))
        if left != self._low_water and self._sock.family != socket.AF_UNIX:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, left)
            self._low_water = left

    def _take(self, frame: Frame) -> None:
        match frame.kind:
            case Kind.NOTIFY:
                message = HOP.decode(frame.body)
                if type(message) is Chunk:
                    size = frame.payload_size
                    self._chunk = message.chunk
                    self._begin(self._owner.chunk_begins(self, message.chunk, size))
                elif frame.payload_size:
                    raise KaError(Code.PROTOCOL, "a message with a payload that has none")
                else:
                    self._owner.message_came(self, message)
            case Kind.REQUEST if not frame.payload_size:
                self._owner.request_came(self, frame.request_id, frame.body)
            case Kind.REPLY:
                self._answer = frame.request_id, frame.body
                self._begin(memoryview(bytearray(frame.payload_size)))
            case Kind.ERROR:
                raise KaError(Code.UNREACHABLE, f"the peer gave up: {decode_error(frame.body)}")
            case _:
                raise KaError(Code.PROTOCOL, f"unexpected {frame.kind.name} frame")

    def _begin(self, target: memoryview) -> None:
        self._payload, self._told_size = target, -1
        self._receiver.take_payload(target)
        if self._receiver.payload_complete:
            self._payload_came()

    def _payload_came(self) -> None:
        payload, self._payload = self._payload, None
        assert payload is not None
        if self._answer is not None:
            (request_id, body), self._answer = self._answer, None
            self._owner.answer_came(self, request_id, body, bytes(payload))
        else:
            self._owner.chunk_came(self, self._chunk, payload)
