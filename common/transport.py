"""Connections: authenticated, multiplexed requests over a TCP or unix socket.  The trio shell.

`dial` and `serve` perform the handshake of `session`; a `Connection` then carries requests in
both directions.  Sockets are used directly (non-blocking, waiting through trio) so that payloads
are received straight into the caller's buffer and sent by gathering writes or sendfile; a small
message usually costs one system call and no scheduling point.

Tasks of a connection: one reader (parses, starts handlers, wakes callers), one writer (only when
the socket is full), one watchdog (deadlines).  Invariants:
  * frames leave in the order in which they were queued, whole: a frame is queued by a
    synchronous call, so a cancelled caller can never cut one;
  * a caller's buffer is not touched after `call` has returned or raised;
  * bounded: queued bytes (`SEND_QUEUE_SIZE_MAX`), payload bytes of requests in hand
    (`IN_HAND_SIZE_MAX`), requests in hand (`IN_HAND_COUNT_MAX`): then the reader stops reading,
    and the peer's sends block.

Not here: retrying and reconnecting (`link`), what messages mean.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import outcome
import trio

from common import codec, log
from common.buffers import BufferPool
from common.checksum import Buffer
from common.errors import Code, KaError, from_number
from common.framing import Frame, FrameReceiver, Kind, encode_frame

__all__ = ["Connection", "FilePayload", "Handler", "Reply", "buffers"]

SEND_QUEUE_SIZE_MAX = 8 * 1024 * 1024
IN_HAND_SIZE_MAX = 32 * 1024 * 1024
IN_HAND_COUNT_MAX = 256
WATCHDOG_INTERVAL_S = 0.25
"""Deadlines are kept to this precision: they guard against hangs, they time nothing."""
SOCKET_BUFFER_SIZE = 4 * 1024 * 1024
"""Of unix sockets; TCP tunes itself."""
_GATHER_MAX = 512
_FRAMES_PER_TURN = 32
"""A busy connection lets other tasks run after this many frames."""

_log = log.get("ka.transport")
buffers = BufferPool()
"""Request payloads live here; whoever receives bulk data may borrow from it too."""


class FilePayload(NamedTuple):
    """A payload sent by the kernel from a file; `release` is called when it is on its way."""

    fd: int
    offset: int
    length: int
    release: Callable[[], None]


class Reply(NamedTuple):
    """What a handler answers."""

    body: bytes
    payload: Buffer | FilePayload | None = None


Handler = Callable[["Connection", bytes, memoryview | None], Reply | Awaitable[Reply | None] | None]
"""(connection, body, payload) -> Reply; None for a NOTIFY.  A handler that needs no waiting
returns its Reply at once and runs inside the reader; any other returns an awaitable, which gets
a task of its own.  The payload's buffer is taken back when the reply has been queued."""


class _Pending:
    """A request whose answer has not come."""

    __slots__ = ("deadline", "into", "receiving", "task")

    def __init__(self, deadline: float, into: memoryview | None) -> None:
        self.deadline = deadline
        self.into = into
        self.receiving = False
        self.task: trio.lowlevel.Task | None = None


def encode_error(error: KaError) -> bytes:
    """Return the body of an ERROR frame."""
    context = {key: str(value) for key, value in error.context.items()}
    return codec.encode((error.code.number, error.message, context))


def decode_error(body: bytes) -> KaError:
    """Return the error in the body of an ERROR frame."""
    try:
        number, message, context = codec.decode(body)
        return KaError(from_number(number), message, **context)
    except (ValueError, TypeError, KaError):
        return KaError(Code.PROTOCOL, "unreadable error frame")


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
        self._sock = sock
        self._handler = handler
        self._receiver = receiver
        self._next_id = 1
        self._pending: dict[int, _Pending] = {}
        self._has_pending = trio.Event()
        self._queue: deque[Buffer | FilePayload] = deque()
        self._queue_size = 0
        self._queue_filled = trio.Event()
        self._room = trio.Event()
        self._in_hand_size = 0
        self._handling: dict[int, trio.CancelScope] = {}
        self._in_hand_changed = trio.Event()
        self._error: KaError | None = None
        self._nursery: trio.Nursery | None = None
        self._on_close: list[Callable[[], None]] = []

    # ------------------------------------------------------------ for callers

    @property
    def is_open(self) -> bool:
        return self._error is None

    @property
    def in_flight_count(self) -> int:
        return len(self._pending)

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call *callback* when the connection ends; at once if it has ended."""
        if self._error is not None:
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
        while self._queue_size > SEND_QUEUE_SIZE_MAX:
            await self._wait_room()
        if self._error is not None:
            raise self._lost()
        request_id = self._next_id
        self._next_id += 1
        size = sum(map(len, payload))
        pending = _Pending(trio.current_time() + timeout, into)
        pending.task = trio.lowlevel.current_task()
        self._pending[request_id] = pending
        self._has_pending.set()
        self._send((encode_frame(Kind.REQUEST, request_id, body, size), *payload))

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            self._forget(request_id)
            self._send((encode_frame(Kind.CANCEL, request_id, b""),))
            return trio.lowlevel.Abort.SUCCEEDED

        answer: tuple[bytes, int] = await trio.lowlevel.wait_task_rescheduled(abort)
        return answer

    def notify(self, body: bytes) -> None:
        """Send a message that has no answer; lost if the connection is."""
        if self._error is None:
            self._send((encode_frame(Kind.NOTIFY, 0, body),))

    def close(self, reason: str = "closed") -> None:
        """End the connection; callers get UNREACHABLE, handlers are cancelled."""
        self._fail(KaError(Code.UNREACHABLE, reason, peer=self.peer))

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
            self._drop_queue()
            self._sock.close()

    async def _closer(self) -> None:
        await self.closed.wait()
        assert self._nursery is not None
        self._nursery.cancel_scope.cancel()

    def _fail(self, error: KaError) -> None:
        if self._error is not None:
            return
        self._error = error
        self.closed.set()
        for event in (self._queue_filled, self._room, self._in_hand_changed, self._has_pending):
            event.set()
        for request_id in list(self._pending):
            self._finish(request_id, outcome.Error(self._lost()))
        for callback in self._on_close:
            callback()
        self._on_close.clear()

    def _lost(self) -> KaError:
        assert self._error is not None
        if self._error.code in (Code.UNREACHABLE, Code.PROTOCOL):
            return KaError(Code.UNREACHABLE, self._error.message, **self._error.context)
        return KaError(self._error.code, self._error.message, **self._error.context)

    # ------------------------------------------------------------ sending

    def _send(self, parts: Sequence[Buffer | FilePayload]) -> None:
        """Queue a frame, or send it at once when nothing waits before it."""
        if self._error is not None:
            for part in parts:
                if isinstance(part, FilePayload):
                    part.release()
            return
        idle = not self._queue
        self._queue.extend(parts)
        self._queue_size += sum(
            part.length if isinstance(part, FilePayload) else len(part) for part in parts
        )
        if idle:
            try:
                self._pump()
            except BlockingIOError:
                self._queue_filled.set()
            except OSError as error:
                self._fail(KaError(Code.UNREACHABLE, str(error), peer=self.peer))

    def _pump(self) -> None:
        """Send until the queue is empty; raises BlockingIOError when the socket is full."""
        queue = self._queue
        while queue:
            first = queue[0]
            if isinstance(first, FilePayload):
                sent = os.sendfile(self._sock.fileno(), first.fd, first.offset, first.length)
                if sent == 0:
                    raise OSError("a file became shorter while it was sent")
                self._queue_size -= sent
                if sent == first.length:
                    queue.popleft()
                    first.release()
                else:
                    queue[0] = first._replace(
                        offset=first.offset + sent, length=first.length - sent
                    )
                continue
            if len(queue) == 1:
                sent = self._sock.send(first)
            else:
                gather: list[Buffer] = []
                for part in queue:
                    if isinstance(part, FilePayload) or len(gather) == _GATHER_MAX:
                        break
                    gather.append(part)
                sent = self._sock.sendmsg(gather)
            self._queue_size -= sent
            while sent:
                part = queue[0]
                assert not isinstance(part, FilePayload)
                if sent < len(part):
                    queue[0] = memoryview(part)[sent:]
                    break
                sent -= len(part)
                queue.popleft()

    async def _writer(self) -> None:
        while True:
            await self._queue_filled.wait()
            self._queue_filled = trio.Event()
            while self._queue and self._error is None:
                await trio.lowlevel.wait_writable(self._sock)
                try:
                    self._pump()
                except BlockingIOError:
                    pass
                except OSError as error:
                    self._fail(KaError(Code.UNREACHABLE, str(error), peer=self.peer))
                if self._queue_size <= SEND_QUEUE_SIZE_MAX:
                    self._room.set()
            if self._error is not None:
                return

    async def _wait_room(self) -> None:
        self._room = trio.Event()
        if self._queue_size > SEND_QUEUE_SIZE_MAX and self._error is None:
            await self._room.wait()

    def _drop_queue(self) -> None:
        for part in self._queue:
            if isinstance(part, FilePayload):
                part.release()
        self._queue.clear()

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

    async def _take_frame(self, frame: Frame) -> None:
        kind = frame.kind
        if kind is Kind.REQUEST or kind is Kind.NOTIFY:
            await self._take_request(frame)
        elif kind is Kind.REPLY:
            await self._take_reply(frame)
        elif kind is Kind.ERROR:
            if frame.payload_size:
                raise KaError(Code.PROTOCOL, "an error frame with a payload")
            error = decode_error(frame.body)
            if frame.request_id == 0:
                raise error
            self._finish(frame.request_id, outcome.Error(error))
        elif kind is Kind.CANCEL:
            scope = self._handling.get(frame.request_id)
            if scope is not None:
                scope.cancel()
        else:
            raise KaError(Code.PROTOCOL, f"unexpected {kind.name} frame")

    async def _take_payload(self) -> None:
        while not self._receiver.payload_complete:
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
        """Drop a request; its buffer is not touched from here on."""
        pending = self._pending.pop(request_id, None)
        if pending is not None and pending.receiving and not self._receiver.payload_complete:
            self._receiver.discard_payload()
        return pending

    async def _take_request(self, frame: Frame) -> None:
        if self._handler is None:
            raise KaError(Code.PROTOCOL, "requests are not served on this connection")
        while (
            self._in_hand_size + frame.payload_size > IN_HAND_SIZE_MAX
            or len(self._handling) >= IN_HAND_COUNT_MAX
            or self._queue_size > SEND_QUEUE_SIZE_MAX
        ):
            if self._queue_size > SEND_QUEUE_SIZE_MAX:
                await self._wait_room()
                continue
            self._in_hand_changed = trio.Event()
            await self._in_hand_changed.wait()
            if self._error is not None:
                return
        payload: memoryview | None = None
        if frame.payload_size:
            payload = buffers.take(frame.payload_size)
            self._receiver.take_payload(payload)
            await self._take_payload()
        try:
            result = self._handler(self, frame.body, payload)
        except BaseException as error:
            self._answer_error(frame.request_id, error)
            self._give_back(payload)
            return
        if result is None or isinstance(result, Reply):
            self._answer(frame.request_id, result)
            self._give_back(payload)
        else:
            assert self._nursery is not None
            self._in_hand_size += frame.payload_size
            scope = self._handling[frame.request_id] = trio.CancelScope()
            self._nursery.start_soon(self._handle, frame.request_id, result, payload, scope)

    async def _handle(
        self,
        request_id: int,
        work: Awaitable[Reply | None],
        payload: memoryview | None,
        scope: trio.CancelScope,
    ) -> None:
        try:
            with scope:
                self._answer(request_id, await work)
            if scope.cancelled_caught:
                self._answer_error(request_id, KaError(Code.CANCELLED))
        except Exception as error:
            self._answer_error(request_id, error)
        finally:
            self._handling.pop(request_id, None)
            if payload is not None:
                self._in_hand_size -= len(payload)
            self._give_back(payload)
            self._in_hand_changed.set()

    def _give_back(self, payload: memoryview | None) -> None:
        if payload is not None:
            buffers.give(payload)

    def _answer(self, request_id: int, reply: Reply | None) -> None:
        if reply is None or request_id == 0:
            return
        payload = reply.payload
        if payload is None:
            self._send((encode_frame(Kind.REPLY, request_id, reply.body),))
        elif isinstance(payload, FilePayload):
            frame = encode_frame(Kind.REPLY, request_id, reply.body, payload.length)
            self._send((frame, payload))
        else:
            frame = encode_frame(Kind.REPLY, request_id, reply.body, len(payload))
            self._send((frame, payload))

    def _answer_error(self, request_id: int, error: BaseException) -> None:
        if not isinstance(error, KaError):
            if not isinstance(error, Exception):
                raise error
            _log.error("request.failed", peer=self.peer, exc_info=error)
            error = KaError(Code.INTERNAL, f"{type(error).__name__}: {error}")
        if request_id:
            self._send((encode_frame(Kind.ERROR, request_id, encode_error(error)),))

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


