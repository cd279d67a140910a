"""Serving: what one side of a connection does with the requests of the other.

Position: `transport` reads frames and hands requests over; the daemon's handler answers; answers
leave through the connection's outbox.

Limits.  A caller (`transport`) waits while its connection has `IN_HAND_COUNT_MAX` requests or
`IN_HAND_SIZE_MAX` bytes of payload, asked for or sent, under way.  So its peer never has more in
hand than that, and the peer's reader need never stop: were it to stop behind a request, it could
not read the answer that this request's own handler waits for.  It stops all the same, and with it
the caller's sends, when a caller does not keep to the limits.

A request's payload is lent to its handler, and its buffer is reused when the answer is made.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import trio

from common import log
from common.buffers import BufferPool
from common.checksum import Buffer
from common.errors import Code, KaError
from common.framing import PAYLOAD_SIZE_MAX, Frame, Kind, encode_frame
from common.messages import encode_error
from common.outbox import FilePayload, Outbox, Part

__all__ = ["Answer", "Reply", "Serving", "buffers"]

IN_HAND_SIZE_MAX = 32 * 1024 * 1024
IN_HAND_COUNT_MAX = 256
SEND_QUEUE_SIZE_MAX = 8 * 1024 * 1024
"""Behind this much unsent, a caller waits: it would only fill memory."""
ANSWER_QUEUE_SIZE_MAX = IN_HAND_SIZE_MAX + SEND_QUEUE_SIZE_MAX + PAYLOAD_SIZE_MAX
"""More than a peer that keeps to the limits can make us queue, long message bodies aside."""
assert 2 * PAYLOAD_SIZE_MAX <= IN_HAND_SIZE_MAX, "the largest request must fit"

_log = log.get("ka.serving")
buffers = BufferPool()
"""Request payloads live here; whoever receives bulk data may borrow from it too."""


class Reply(NamedTuple):
    """What a handler answers."""

    body: bytes
    payload: Buffer | FilePayload | None = None


Answer = Reply | Awaitable[Reply | None] | None
"""What a handler returns: see `Handler` in `transport`."""


class Serving:
    """The peer's requests that are in hand."""

    def __init__(
        self,
        handler: Callable[[bytes, memoryview | None], Answer] | None,
        outbox: Outbox,
        send: Callable[[Sequence[Part]], None],
        *,
        closed: trio.Event,
        peer: str,
    ) -> None:
        self.changed = trio.Event()
        """Set when there may be room again, or nothing to wait for."""
        self._handler = handler
        self._outbox = outbox
        self._send = send
        self._closed = closed
        self._peer = peer
        self._size = 0
        self._count = 0
        self._handling: dict[int, trio.CancelScope] = {}
        """By request id; notifications are not among them."""

    def check(self, frame: Frame) -> None:
        """Raise KaError PROTOCOL for a request that cannot be one."""
        request_id = frame.request_id
        if self._handler is None:
            raise KaError(Code.PROTOCOL, "requests are not served on this connection")
        if (request_id == 0) is (frame.kind is Kind.REQUEST) or request_id in self._handling:
            raise KaError(Code.PROTOCOL, f"{frame.kind.name} frame with request id {request_id}")

    async def wait_room(self, payload_size: int) -> None:
        """Wait until a request may be taken in hand, or the connection is closed."""
        while self._is_crowded(payload_size):
            self.changed = trio.Event()
            await self.changed.wait()

    def start(self, frame: Frame, payload: memoryview | None, nursery: trio.Nursery) -> None:
        """Call the handler; what it leaves to be awaited gets a task in *nursery*."""
        assert self._handler is not None
        request_id = frame.request_id
        try:
            result = self._handler(frame.body, payload)
            if result is None or isinstance(result, Reply):
                self._answer(request_id, result, payload)
                return
        except Exception as error:
            self._answer_error(request_id, error, payload)
            return
        self._size += frame.payload_size
        self._count += 1
        scope = trio.CancelScope()
        if request_id:
            self._handling[request_id] = scope
        nursery.start_soon(self._handle, request_id, result, payload, scope)

    def cancel(self, request_id: int) -> None:
        """Stop a request whose answer is not wanted any more."""
        scope = self._handling.get(request_id)
        if scope is not None:
            scope.cancel()

    def _is_crowded(self, payload_size: int) -> bool:
        return not self._closed.is_set() and (
            self._count >= IN_HAND_COUNT_MAX
            or self._size + payload_size > IN_HAND_SIZE_MAX
            or self._outbox.size > ANSWER_QUEUE_SIZE_MAX
        )

    async def _handle(
        self,
        request_id: int,
        work: Awaitable[Reply | None],
        payload: memoryview | None,
        scope: trio.CancelScope,
    ) -> None:
        payload_size = 0 if payload is None else len(payload)
        try:
            with scope:
                self._answer(request_id, await work, payload)
            if scope.cancelled_caught:
                self._answer_error(request_id, KaError(Code.CANCELLED), payload)
        except Exception as error:
            self._answer_error(request_id, error, payload)
        finally:
            self._handling.pop(request_id, None)
            self._size -= payload_size
            self._count -= 1
            self.changed.set()

    def _answer(self, request_id: int, reply: Reply | None, request: memoryview | None) -> None:
        """Queue the answer and take the request's payload back."""
        payload = None if reply is None else reply.payload
        file = payload if isinstance(payload, FilePayload) else None
        try:
            if request_id == 0:
                reply = None
            elif reply is None:
                raise KaError(Code.INTERNAL, "the request has no answer")
            if reply is not None:
                size = 0 if payload is None else file.length if file else len(payload)
                frame = encode_frame(Kind.REPLY, request_id, reply.body, size)
                self._send((frame,) if payload is None else (frame, payload))
                file = None
        finally:
            if file is not None:
                file.release()
        # Part of the request may be on its way back; its buffer is then simply collected.
        if request is not None and getattr(payload, "obj", None) is not request.obj:
            buffers.give(request)

    def _answer_error(self, request_id: int, error: Exception, request: memoryview | None) -> None:
        if not isinstance(error, KaError):
            _log.error("request.failed", peer=self._peer, exc_info=error)
            error = KaError(Code.INTERNAL, f"{type(error).__name__}: {error}")
        if request_id:
            self._send((encode_frame(Kind.ERROR, request_id, encode_error(error)),))
        if request is not None:
            buffers.give(request)
