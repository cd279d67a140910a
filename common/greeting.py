"""Greeting: a fresh socket becomes an authenticated one, at either end.

`introduce` is the connecting side, `accept_peers` the listening one: it runs the handshake of
`session` with each newcomer and then the caller's task with the socket.

An unauthenticated peer gets HANDSHAKE_TIMEOUT_S, one small frame at a time, and one of
`STRANGERS_MAX` places.  When all are taken, a newcomer gets the place of the one that has had it
for longest: a handshake takes milliseconds, so those that idle cannot keep others out.  Strangers
are counted and otherwise ignored.  What one says in the handshake is not
believed beyond the few codes that a handshake can end with.

Not here: what is said after the handshake (`transport`, `common.broadcast.edge`).
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Awaitable, Callable, Sequence

import trio

from common import log
from common.errors import Code, KaError
from common.framing import (
    BODY_SIZE_MAX,
    PAYLOAD_SIZE_MAX,
    Frame,
    FrameReceiver,
    Kind,
    encode_frame,
)
from common.messages import decode_error, encode_error
from common.metrics import counter
from common.session import (
    HANDSHAKE_BODY_SIZE_MAX,
    NONCE_SIZE,
    ClientHandshake,
    Hello,
    Identity,
    ServerHandshake,
)
from common.sockets import prepare

__all__ = ["HANDSHAKE_TIMEOUT_S", "STRANGERS_MAX", "accept_peers", "introduce", "refused"]

HANDSHAKE_TIMEOUT_S = 5.0
STRANGERS_MAX = 128
_HANDSHAKE_CODES = (Code.AUTH, Code.WRONG_CLUSTER, Code.WRONG_VERSION, Code.PROTOCOL)

_log = log.get("ka.greeting")
refused = counter("ka_refused_total", "Connections refused before or in the handshake", "reason")

Peer = Callable[[socket.socket, Hello, FrameReceiver], Awaitable[None]]
"""Drives a connection whose peer has proved itself; owns the socket from then on."""


async def accept_peers(
    sockets: Sequence[socket.socket], *, cluster_id: str, key: bytes, peer: Peer
) -> None:
    """Accept connections for ever; each is authenticated and then driven in its own task."""
    strangers: dict[socket.socket, trio.CancelScope] = {}  # the oldest first
    async with trio.open_nursery() as nursery:

        async def welcome(sock: socket.socket, scope: trio.CancelScope) -> None:
            greeted: tuple[Hello, FrameReceiver] | None = None
            try:
                with scope:
                    greeted = await _receive_stranger(sock, cluster_id, key)
            except (KaError, OSError, trio.TooSlowError) as error:
                sock.close()
                _note_refusal(error)
                return
            except BaseException:
                sock.close()
                raise
            finally:
                strangers.pop(sock, None)
            if greeted is None:
                refused.labels("crowd").inc()
                sock.close()
                return
            await peer(sock, *greeted)

        async def accept(listener: socket.socket) -> None:
            while True:
                await trio.lowlevel.wait_readable(listener)
                try:
                    sock, _address = listener.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    continue
                except OSError as error:
                    _log.error("accept.failed", reason=str(error))
                    await trio.sleep(0.1)
                    continue
                if len(strangers) >= STRANGERS_MAX:
                    strangers.pop(next(iter(strangers))).cancel()
                strangers[sock] = trio.CancelScope()
                nursery.start_soon(welcome, sock, strangers[sock])

        for listener in sockets:
            nursery.start_soon(accept, listener)


def _note_refusal(error: KaError | OSError | trio.TooSlowError) -> None:
    code = error.code.name if isinstance(error, KaError) else type(error).__name__
    refused.labels(code).inc()
    reason = str(error) or "too slow"
    wrong = (Code.AUTH, Code.WRONG_CLUSTER, Code.WRONG_VERSION)
    if isinstance(error, KaError) and error.code in wrong:
        _log.warning("connection.refused", reason=reason)
    else:
        # Whoever scans ports must not fill the log; the counter tells.
        _log.debug("connection.refused", reason=reason)


async def _send_all(sock: socket.socket, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)


async def _next_frame(sock: socket.socket, receiver: FrameReceiver) -> Frame:
    while (frame := receiver.next_frame()) is None:
        try:
            count = sock.recv_into(receiver.want())
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)
            continue
        if count == 0:
            raise KaError(Code.UNREACHABLE, "the peer hung up in the handshake")
        receiver.got(count)
    if frame.kind is Kind.ERROR:
        error = decode_error(frame.body)
        if error.code not in _HANDSHAKE_CODES:
            # A stranger could otherwise make a caller believe in, say, ENOENT.
            error = KaError(Code.PROTOCOL, f"refused in the handshake: {error}")
        raise error
    if frame.kind is not Kind.HANDSHAKE:
        raise KaError(Code.PROTOCOL, f"{frame.kind.name} frame in the handshake")
    return frame


async def _receive_stranger(
    sock: socket.socket, cluster_id: str, key: bytes
) -> tuple[Hello, FrameReceiver]:
    prepare(sock)
    receiver = FrameReceiver(body_size_max=HANDSHAKE_BODY_SIZE_MAX, payload_size_max=0)
    handshake = ServerHandshake(cluster_id, key, nonce=secrets.token_bytes(NONCE_SIZE))
    with trio.fail_after(HANDSHAKE_TIMEOUT_S):
        while not handshake.done:
            frame = await _next_frame(sock, receiver)
            try:
                answer = handshake.receive(frame.body)
            except KaError as error:
                await _send_all(sock, encode_frame(Kind.ERROR, 0, encode_error(error)))
                raise
            await _send_all(sock, encode_frame(Kind.HANDSHAKE, 0, answer))
    assert handshake.hello is not None
    return handshake.hello, _trusting(receiver)


async def introduce(
    sock: socket.socket, identity: Identity, key: bytes, connection_number: int
) -> FrameReceiver:
    """Perform the connecting side's handshake; what the peer says next is in the receiver."""
    prepare(sock)
    receiver = FrameReceiver(body_size_max=HANDSHAKE_BODY_SIZE_MAX, payload_size_max=0)
    handshake = ClientHandshake(
        identity, key, connection=connection_number, nonce=secrets.token_bytes(NONCE_SIZE)
    )
    message: bytes | None = handshake.start()
    while message is not None:
        await _send_all(sock, encode_frame(Kind.HANDSHAKE, 0, message))
        message = handshake.receive((await _next_frame(sock, receiver)).body)
    return _trusting(receiver)


def _trusting(receiver: FrameReceiver) -> FrameReceiver:
    receiver.body_size_max = BODY_SIZE_MAX
    receiver.payload_size_max = PAYLOAD_SIZE_MAX
    return receiver
