"""Connections: authenticated, multiplexed requests over a TCP or unix socket.  The trio shell.

`dial` and `serve` perform the handshake of `session`; a `Connection` then carries requests in
both directions.  Sockets are used directly (non-blocking, waiting through trio) so that payloads
are received straight into the caller's buffer and sent by gathering writes or sendfile; a small
message usually costs one system call and no scheduling point.

Tasks of a connection: one reader (parses, starts handlers, wakes callers), one writer (only when
the socket is full), one watchdog (deadlines), one for each handler that waits.  Invariants:
  * frames leave in the order in which they were queued, whole: a frame is queued by a
    synchronous call, so a cancelled caller can never cut one;
  * a caller's buffers, sent or received into, are not touched after `call` has ended;
  * after `ended` nothing of this connection runs any more, its handlers included.

This module is the caller's side and the life of a connection; `serving` is the other side, and
says which limits callers keep, `outbox` what waits for the socket.

Not here: retrying and reconnecting (`link`), what messages mean.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import outcome
import trio

from common.checksum import Buffer
from common.errors import Code, KaError
from common.framing import PAYLOAD_SIZE_MAX, Frame, FrameReceiver, Kind, encode_frame
from common.messages import decode_error
from common.outbox import FilePayload, Outbox, Part
from common.serving import (
    ANSWER_QUEUE_SIZE_MAX,
    IN_HAND_COUNT_MAX,
    IN_HAND_SIZE_MAX,
    SEND_QUEUE_SIZE_MAX,
    Answer,
    Reply,
    Serving,
    buffers,
)

__all__ = ["Connection", "FilePayload", "Handler", "Reply", "buffers"]

WATCHDOG_INTERVAL_S = 0.25
"""Deadlines are kept to this precision: they guard against hangs, they time nothing."""
_FRAMES_PER_TURN = 32
_SIZE_PER_TURN = 4 * 1024 * 1024
"""A busy connection lets other tasks run after this many frames or bytes."""


class _Pending:
    """A request whose answer has not come."""

    __slots__ = ("cost", "deadline", "end", "into", "receiving", "size", "task")

    def __init__(self, deadline: float, into: memoryview | None, size: int, cost: int) -> None:
        self.deadline = deadline
        self.into = into
        self.size = size
        self.cost = cost
        self.end = 0
        """Where the request ends in the outbox."""
        self.receiving = False
        self.task: trio.lowlevel.Task | None = None
        """Set while the caller sleeps."""


class Connection:
    """One authenticated connection.  Made by `dial` and `serve`; `run` drives it."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        peer: str,
        role: str,
        incarnation: bytes,
        number: int,
        handler: Handler | None,
        receiver: FrameReceiver,
    ) -> None:
        self.peer = peer
        """The peer's name, for logs."""
        self.role = role
        self.incarnation = incarnation
        self.number = number
        self.state: Any = None
        """Whatever the server that owns this connection keeps about its peer."""
        self.closed = trio.Event()
        """It is of no use any more; its handlers are being cancelled."""
        self.ended = trio.Event()
        """`run` is over."""
        self._sock = sock
        self._receiver = receiver
        self._next_id = 1
        self._pending: dict[int, _Pending] = {}
        self._has_pending = trio.Event()
        self._in_flight_size = 0
        self._outbox = Outbox(sock)
        self._outbox_filled = trio.Event()
        self._room = trio.Event()
        self._gate = trio.Lock()
        """First come, first served among callers that wait for room; its holder waits."""
        self._serving = Serving(
            None if handler is None else partial(handler, self),
            self._outbox,
            self._send,
            closed=self.closed,
            peer=peer,
        )
        self._turn_size = 0
        self._error: KaError | None = None
        self._nursery: trio.Nursery | None = None
        self._on_close: list[Callable[[], None]] = []

    # ------------------------------------------------------------ for callers

    @property
    def is_open(self) -> bool:
        return self._error is None

    @property
    def is_local(self) -> bool:
        """Whether the peer is on this host for sure."""
        return self._sock.family == socket.AF_UNIX

    @property
    def in_flight_count(self) -> int:
        return len(self._pending)

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call *callback* when the connection and its handlers have ended; at once if so."""
        if self.ended.is_set():
            callback()
        else:
            self._on_close.append(callback)

    async def call(
        self,
        body: bytes,
        payload: Sequence[Buffer] = (),
        *,
        timeout: float,
        into: memoryview | None = None,
    ) -> tuple[bytes, int]:
        """Send a request; return the answer's body and the size of its payload.

        The payload buffers must not change until this returns.  An answer's payload is received
        into *into*, which must be large enough.  Raises the peer's KaError, TIMEOUT after
        *timeout* seconds, UNREACHABLE when the connection is lost: then nobody knows whether the
        request was carried out.  Cancellation tells the peer that the answer is not wanted.
        """
        deadline = trio.current_time() + timeout
        size = sum(map(len, payload))
        cost = size if into is None else size + min(len(into), PAYLOAD_SIZE_MAX)
        frame = encode_frame(Kind.REQUEST, self._next_id, body, size)
        request_id = self._next_id
        self._next_id += 1
        if self._gate.locked() or not self._has_room(cost):
            await self._wait_room(cost, deadline)
        if self._error is not None:
            raise self._lost()
        pending = self._pending[request_id] = _Pending(deadline, into, size, cost)
        self._in_flight_size += cost
        self._has_pending.set()
        self._send((frame, *payload))
        if self._error is not None:  # the send has failed, and nobody could wake us
            raise self._lost()
        pending.end = self._outbox.end
        pending.task = trio.lowlevel.current_task()

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            self._forget(request_id)
            self._send((encode_frame(Kind.CANCEL, request_id, b""),))
            return trio.lowlevel.Abort.SUCCEEDED

        answer: tuple[bytes, int] = await trio.lowlevel.wait_task_rescheduled(abort)
        return answer

    def notify(self, body: bytes) -> None:
        """Send a message that has no answer; lost if the connection is.

        A peer that does not read ends the connection: what waits here must have an end.
        """
        self._send((encode_frame(Kind.NOTIFY, 0, body),))
        if self._outbox.size > ANSWER_QUEUE_SIZE_MAX:
            self.close("the peer does not read")

    def close(self, reason: str = "closed") -> None:
        """End the connection; callers get UNREACHABLE, handlers are cancelled."""
        self._fail(KaError(Code.UNREACHABLE, reason, peer=self.peer))
        if self._nursery is None:  # it has never run
            self._sock.close()

    def _has_room(self, cost: int) -> bool:
        return (
            len(self._pending) < IN_HAND_COUNT_MAX
            and self._in_flight_size + cost <= IN_HAND_SIZE_MAX
            and self._outbox.size <= SEND_QUEUE_SIZE_MAX
        )

    async def _wait_room(self, cost: int, deadline: float) -> None:
        with trio.move_on_at(deadline) as scope:
            async with self._gate:
                while self._error is None and not self._has_room(cost):
                    self._room = trio.Event()
                    await self._room.wait()
        if scope.cancelled_caught:
            raise KaError(Code.TIMEOUT, "no room to send in time", peer=self.peer)

    # ------------------------------------------------------------ life

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the connection until it ends; never raises but for cancellation."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._writer)
                nursery.start_soon(self._watchdog)
                nursery.start_soon(self._closer)
                task_status.started()
                try:
                    await self._reader()
                except KaError as error:
                    self._fail(error)
                except OSError as error:
                    self._fail(KaError(Code.UNREACHABLE, str(error), peer=self.peer))
        finally:
            self._fail(KaError(Code.UNREACHABLE, "connection closed", peer=self.peer))
            self._sock.close()
            self.ended.set()
            for callback in self._on_close:
                callback()

    async def _closer(self) -> None:
        await self.closed.wait()
        assert self._nursery is not None
        self._nursery.cancel_scope.cancel()

    def _fail(self, error: KaError) -> None:
        if self._error is not None:
            return
        self._error = error
        self.closed.set()
        self._outbox.drop()
        try:
            # The peer hears now, not when the last handler has come to its end.
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has gone already
        self._serving.changed.set()
        for event in (self._outbox_filled, self._room, self._has_pending):
            event.set()
        for request_id in list(self._pending):
            self._finish(request_id, outcome.Error(self._lost()))

    def _lost(self) -> KaError:
        """Return what a caller hears: whatever the reason, the peer may be reached anew."""
        assert self._error is not None
        return KaError(Code.UNREACHABLE, self._error.message, **self._error.context)

    # ------------------------------------------------------------ sending

    def _send(self, parts: Sequence[Part]) -> None:
        """Queue a frame, or send it at once when nothing waits before it."""
        if self._error is not None:
            for part in parts:
                if isinstance(part, FilePayload):
                    part.release()
            return
        idle = not self._outbox
        self._outbox.put(parts)
        if idle:
            try:
                self._outbox.pump()
            except BlockingIOError:
                self._outbox_filled.set()
            except OSError as error:
                self._fail(KaError(Code.UNREACHABLE, str(error), peer=self.peer))

    async def _writer(self) -> None:
        while self._error is None:
            await self._outbox_filled.wait()
            self._outbox_filled = trio.Event()
            while self._outbox:
                await trio.lowlevel.wait_writable(self._sock)
                try:
                    self._outbox.pump()
                except BlockingIOError:
                    pass
                except OSError as error:
                    self._fail(KaError(Code.UNREACHABLE, str(error), peer=self.peer))
                self._room.set()
                self._serving.changed.set()

    # ------------------------------------------------------------ receiving

    async def _reader(self) -> None:
        receiver = self._receiver
        sock = self._sock
        frames = 0
        while self._error is None:
            frame = receiver.next_frame()
            if frame is not None:
                await self._take_frame(frame)
                frames += 1
                if frames % _FRAMES_PER_TURN == 0:
                    await trio.lowlevel.checkpoint()
                continue
            await self._receive(sock)

    async def _receive(self, sock: socket.socket) -> None:
        receiver = self._receiver
        try:
            count = sock.recv_into(receiver.want())
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)
            return
        if count == 0:
            raise KaError(Code.UNREACHABLE, "the peer closed the connection", peer=self.peer)
        receiver.got(count)
        self._turn_size += count
        if self._turn_size > _SIZE_PER_TURN:
            self._turn_size = 0
            await trio.lowlevel.checkpoint()

    async def _take_frame(self, frame: Frame) -> None:
        kind = frame.kind
        if kind is Kind.REQUEST or kind is Kind.NOTIFY:
            await self._take_request(frame)
        elif kind is Kind.REPLY:
            await self._take_reply(frame)
        elif kind is Kind.ERROR:
            error = decode_error(frame.body)
            if frame.request_id == 0:
                raise KaError(Code.UNREACHABLE, f"the peer gave up: {error}", peer=self.peer)
            self._finish(frame.request_id, outcome.Error(error))
        elif kind is Kind.CANCEL:
            self._serving.cancel(frame.request_id)
        else:
            raise KaError(Code.PROTOCOL, f"unexpected {kind.name} frame")

    async def _take_payload(self) -> None:
        while not self._receiver.payload_complete and self._error is None:
            await self._receive(self._sock)

    async def _take_reply(self, frame: Frame) -> None:
        pending = self._pending.get(frame.request_id)
        if frame.payload_size:
            into = pending.into if pending is not None else None
            if pending is None or into is None or len(into) < frame.payload_size:
                self._receiver.discard_payload()
                await self._take_payload()
                if pending is not None:
                    raise KaError(Code.PROTOCOL, "an answer with more payload than was asked for")
                return
            pending.receiving = True
            self._receiver.take_payload(into[: frame.payload_size])
            await self._take_payload()
        self._finish(frame.request_id, outcome.Value((frame.body, frame.payload_size)))

    def _finish(self, request_id: int, result: outcome.Outcome[tuple[bytes, int]]) -> None:
        pending = self._forget(request_id)
        if pending is not None and pending.task is not None:
            trio.lowlevel.reschedule(pending.task, result)

    def _forget(self, request_id: int) -> _Pending | None:
        """Drop a request; its buffers are not touched from here on."""
        pending = self._pending.pop(request_id, None)
        if pending is None:
            return None
        if pending.receiving and not self._receiver.payload_complete:
            self._receiver.discard_payload()
        if pending.size and self._outbox.end - self._outbox.size < pending.end:
            self._outbox.keep(pending.end, pending.size)
        self._in_flight_size -= pending.cost
        self._room.set()
        return pending

    async def _take_request(self, frame: Frame) -> None:
        self._serving.check(frame)
        await self._serving.wait_room(frame.payload_size)
        payload: memoryview | None = None
        if frame.payload_size:
            payload = buffers.take(frame.payload_size)
            self._receiver.take_payload(payload)
            await self._take_payload()
        if self._error is None:
            assert self._nursery is not None
            self._serving.start(frame, payload, self._nursery)

    async def _watchdog(self) -> None:
        while self._error is None:
            if not self._pending:
                self._has_pending = trio.Event()
                await self._has_pending.wait()
            await trio.sleep(WATCHDOG_INTERVAL_S)
            now = trio.current_time()
            for request_id, pending in list(self._pending.items()):
                if pending.deadline < now:
                    late = KaError(Code.TIMEOUT, "no answer in time", peer=self.peer)
                    self._finish(request_id, outcome.Error(late))
                    self._send((encode_frame(Kind.CANCEL, request_id, b""),))


Handler = Callable[[Connection, bytes, memoryview | None], Answer]
"""(connection, body, payload) -> Reply; None for a NOTIFY.  A handler that needs no waiting
returns its Reply at once and runs inside the reader; any other returns an awaitable, which gets
a task of its own.  The payload is lent until the reply has been made; a reply may contain it, but
nothing else, such as an abandoned thread, may still use it."""
