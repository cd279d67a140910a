"""The HTTP server: boot firmware in, scripts and files out.

Protocol by h11, sockets by trio, files by sendfile: a kernel goes from the page cache to the
network without being copied through Python, which is what counts when a hundred machines load it at
once.  It speaks plain HTTP/1.1 on purpose: that is what firmware speaks.

Invariants
  * a client holds at most one request's worth of memory, and must make progress: a stalled one is
    dropped after `STALL_TIMEOUT_S`;
  * at most `CONNECTIONS_MAX` are open; beyond, new ones wait in the kernel's queue;
  * bodies of requests are read and dropped, up to a limit.

Tasks: one per connection.  `sendfile` reads from the page cache, or blocks the loop for the time of
one disk read: `readahead` ahead of it keeps that rare.  Opening goes through a thread, since images
may lie on a network file system.

Not here: what a URL means (requests.py) and what is answered (service.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from email.utils import formatdate

import h11
import trio

from common import log
from kaboot.requests import BadRequest, parse_range

__all__ = ["FileBody", "Incoming", "Reply", "serve_http"]

CONNECTIONS_MAX = 1024
HEADER_SIZE_MAX = 16 * 1024
REQUEST_BODY_SIZE_MAX = 64 * 1024
IDLE_TIMEOUT_S = 60.0
STALL_TIMEOUT_S = 60.0
LINGER_S = 1.0
RECEIVE_SIZE = 16 * 1024
SEND_SIZE = 512 * 1024
READAHEAD_SIZE = 4 << 20

_log = log.get("kaboot.http")


@dataclass(frozen=True, slots=True)
class Incoming:
    """A request: what the handler needs of it."""

    method: bytes
    target: bytes
    peer: str
    range: bytes | None = None
    if_range: bytes | None = None
    if_none_match: bytes | None = None


@dataclass(slots=True)
class FileBody:
    """An open file to be sent; the server closes it and says at the end how much was sent."""

    fd: int
    done: Callable[[int, int], Awaitable[None]]
    """Called with the bytes sent and the bytes that were to be sent."""


@dataclass(slots=True)
class Reply:
    """An answer: text, or a file."""

    status: int
    text: str = ""
    file: FileBody | None = None
    headers: list[tuple[str, str]] = field(default_factory=list)


Handler = Callable[[Incoming], Awaitable[Reply]]


async def serve_http(listener: trio.SocketListener, handler: Handler) -> None:
    """Serve until cancelled.  `handler` may raise BadRequest; any other error answers 500."""
    limit = trio.CapacityLimiter(CONNECTIONS_MAX)
    async with trio.open_nursery() as nursery:
        while True:
            # Acquired before accepting: the kernel's queue holds those who must wait.
            token = object()
            await limit.acquire_on_behalf_of(token)
            try:
                stream = await listener.accept()
            except OSError as error:
                limit.release_on_behalf_of(token)
                _log.warning("accept.failed", error=error)
                await trio.sleep(0.1)
                continue
            except BaseException:
                limit.release_on_behalf_of(token)
                raise
            nursery.start_soon(_guarded, stream, handler, limit, token)


async def _guarded(
    stream: trio.SocketStream, handler: Handler, limit: trio.CapacityLimiter, token: object
) -> None:
    try:
        await _Connection(stream, handler).run()
    except (h11.ProtocolError, trio.BrokenResourceError, trio.TooSlowError, OSError) as error:
        _log.debug("connection.failed", error=type(error).__name__)
    finally:
        limit.release_on_behalf_of(token)
        with contextlib.suppress(OSError):
            stream.socket.close()


class _Connection:
    """One client; several requests in turn."""

    def __init__(self, stream: trio.SocketStream, handler: Handler) -> None:
        self._stream = stream
        self._handler = handler
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEADER_SIZE_MAX)
        self._peer = stream.socket.getpeername()[0]

    async def run(self) -> None:
        while True:
            try:
                request = await self._receive()
            except h11.RemoteProtocolError as error:
                await self._refuse(error)
                return
            if request is None:
                return
            await self._answer(request)
            if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                return
            self._http.start_next_cycle()

    async def _receive(self) -> h11.Request | None:
        """Return the next request, its body dropped; None when the client is gone."""
        request: h11.Request | None = None
        body_size = 0
        with trio.fail_after(IDLE_TIMEOUT_S):
            while True:
                event = self._http.next_event()
                if event is h11.NEED_DATA:
                    if self._http.they_are_waiting_for_100_continue:
                        await self._send(h11.InformationalResponse(status_code=100, headers=[]))
                    self._http.receive_data(await self._stream.receive_some(RECEIVE_SIZE))
                elif isinstance(event, h11.Request):
                    request = event
                elif isinstance(event, h11.Data):
                    body_size += len(event.data)
                    if body_size > REQUEST_BODY_SIZE_MAX:
                        raise h11.RemoteProtocolError("body too large", error_status_hint=413)
                elif isinstance(event, h11.EndOfMessage):
                    return request
                else:  # the connection was closed, or is paused, which cannot be here
                    return None

    async def _refuse(self, error: h11.RemoteProtocolError) -> None:
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            reply = Reply(error.error_status_hint, "not understood\n")
            await self._send_reply(reply, head_only=False)
            # What was sent and not read would make the kernel reset the connection, and the
            # answer with it.
            with trio.move_on_after(LINGER_S):
                await self._stream.send_eof()
                while await self._stream.receive_some(RECEIVE_SIZE):
                    pass

    async def _answer(self, request: h11.Request) -> None:
        headers = dict(request.headers)
        incoming = Incoming(
            method=request.method,
            target=request.target,
            peer=self._peer,
            range=headers.get(b"range"),
            if_range=headers.get(b"if-range"),
            if_none_match=headers.get(b"if-none-match"),
        )
        try:
            reply = await self._handler(incoming)
            if reply.file is not None:
                await self._send_file(incoming, reply)
                return
        except BadRequest as refusal:
            reply = Reply(refusal.status, f"{refusal.reason}\n")
        except (OSError, trio.BrokenResourceError, trio.TooSlowError):
            raise
        except Exception:
            _log.error("request.failed", target=request.target, exc_info=True)
            reply = Reply(500, "a bug in kaboot; its log has the details\n")
        if self._http.our_state is h11.SEND_RESPONSE:
            await self._send_reply(reply, head_only=request.method == b"HEAD")

    async def _send_reply(self, reply: Reply, *, head_only: bool) -> None:
        body = reply.text.encode("ascii", "replace")
        headers = [
            ("Content-Type", "text/plain; charset=us-ascii"),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            *reply.headers,
        ]
        await self._send(h11.Response(status_code=reply.status, headers=headers))
        if not head_only:
            await self._send(h11.Data(data=body))
        await self._send(h11.EndOfMessage())

    async def _send_file(self, incoming: Incoming, reply: Reply) -> None:
        body = reply.file
        assert body is not None
        wanted = 0
        sent: list[int] = []
        try:
            status = os.fstat(body.fd)
            tag = f'"{status.st_size:x}-{status.st_mtime_ns:x}"'
            fresh = incoming.if_range in (None, tag.encode())
            span = parse_range(incoming.range if fresh else None, status.st_size)
            headers = [
                ("Content-Type", "application/octet-stream"),
                ("Accept-Ranges", "bytes"),
                ("ETag", tag),
                ("Last-Modified", formatdate(status.st_mtime, usegmt=True)),
            ]
            if incoming.if_none_match == tag.encode():
                await self._send(h11.Response(status_code=304, headers=headers))
                await self._send(h11.EndOfMessage())
                return
            code, (offset, length) = (206, span) if span else (200, (0, status.st_size))
            if span:
                last = offset + length - 1
                headers.append(("Content-Range", f"bytes {offset}-{last}/{status.st_size}"))
            headers.append(("Content-Length", str(length)))
            await self._send(h11.Response(status_code=code, headers=headers))
            if incoming.method != b"HEAD":
                wanted = length
                await self._pump(body.fd, offset, length, sent.append)
            await self._send(h11.EndOfMessage())
        finally:
            os.close(body.fd)
            if wanted:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
                    await body.done(sum(sent), wanted)

    async def _pump(self, fd: int, offset: int, length: int, sent: Callable[[int], None]) -> None:
        """Send a part of a file; raises OSError if it ends too early, which closes the connection.

        h11 counts the bytes by a placeholder and never sees them.
        """
        self._http.send_with_data_passthrough(h11.Data(data=_Placeholder(length)))
        socket = self._stream.socket
        end = offset + length
        while offset < end:
            os.posix_fadvise(fd, offset, READAHEAD_SIZE, os.POSIX_FADV_WILLNEED)
            try:
                count = os.sendfile(socket.fileno(), fd, offset, min(SEND_SIZE, end - offset))
            except BlockingIOError:
                with trio.fail_after(STALL_TIMEOUT_S):
                    await trio.lowlevel.wait_writable(socket)
                continue
            if count == 0:
                raise OSError("the file became shorter while it was sent")
            offset += count
            sent(count)
            # Fairness: one fast client must not keep the others from their turn.
            await trio.lowlevel.checkpoint()

    async def _send(self, event: h11.Event) -> None:
        data = self._http.send(event)
        if data:
            with trio.fail_after(STALL_TIMEOUT_S):
                await self._stream.send_all(data)


class _Placeholder(bytes):
    """Bytes that h11 only counts; `length` of them, without their memory."""

    length: int

    def __new__(cls, length: int) -> _Placeholder:
        made = super().__new__(cls)
        made.length = length
        return made

    def __len__(self) -> int:
        return self.length
