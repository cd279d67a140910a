"""Where connections come from: `dial` makes one, `serve` accepts many.

A server usually listens on TCP and on a unix socket; a client takes the unix socket when the
server is on its own host (half the cost per byte).

An unauthenticated peer gets HANDSHAKE_TIMEOUT_S, one small frame at a time, and one of
`STRANGERS_MAX` places.  When all are taken, a newcomer gets the place of the one that has had it
for longest: a handshake takes milliseconds, so those that idle cannot keep others out.  Strangers
are counted and otherwise ignored.  What one says in the handshake is not
believed beyond the few codes that a handshake can end with.

Fencing: a peer's connections are numbered.  A newer one ends the older, and is served only when
no handler of the older runs any more; a connection that is not newer is turned away.  Other
connections of the peer's identity thus never overlap.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Sequence

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
    Identity,
    ServerHandshake,
)
from common.sockets import connect_tcp, connect_unix, listen, parse_address, prepare
from common.transport import Connection, Handler

__all__ = ["dial", "listen", "parse_address", "serve"]

HANDSHAKE_TIMEOUT_S = 5.0
STRANGERS_MAX = 128
_HANDSHAKE_CODES = (Code.AUTH, Code.WRONG_CLUSTER, Code.WRONG_VERSION, Code.PROTOCOL)

_log = log.get("ka.endpoint")
_refused = counter("ka_refused_total", "Connections refused before or in the handshake", "reason")
_accepted = counter("ka_accepted_total", "Connections accepted", "role")


async def serve(
    sockets: Sequence[socket.socket],
    *,
    identity: Identity,
    key: bytes,
    handler: Handler,
    on_connection: Callable[[Connection], object] | None = None,
) -> None:
    """Accept connections for ever; each is authenticated and then driven in its own task.

    *on_connection* is called with each authenticated connection before its first request.
    """
    strangers: dict[socket.socket, trio.CancelScope] = {}  # the oldest first
    living: dict[_Who, tuple[Connection, trio.Event]] = {}
    async with trio.open_nursery() as nursery:

        async def welcome(sock: socket.socket, scope: trio.CancelScope) -> None:
            connection: Connection | None = None
            try:
                with scope:
                    connection = await _receive_peer(sock, identity, key, handler)
            except (KaError, OSError, trio.TooSlowError) as error:
                sock.close()
                _note_refusal(error)
                return
            except BaseException:
                sock.close()
                raise
            finally:
                strangers.pop(sock, None)
            if connection is None:
                _refused.labels("crowd").inc()
                sock.close()
                return
            _accepted.labels(connection.role).inc()
            try:
                await _serve_newest(connection, living, on_connection)
            except Exception as error:
                # One connection's trouble, whatever it is, must not end the daemon.
                _log.error("connection.failed", peer=connection.peer, exc_info=error)
                connection.close("internal error")

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


_Who = tuple[str, str, bytes]
"""Role, name and incarnation: whose connections are counted together."""


async def _serve_newest(
    connection: Connection,
    living: dict[_Who, tuple[Connection, trio.Event]],
    on_connection: Callable[[Connection], object] | None,
) -> None:
    """Run a connection after the peer's older one has ended, unless it is itself the older."""
    who = (connection.role, connection.peer, connection.incarnation)
    before = living.get(who)
    if before is not None and before[0].number >= connection.number:
        _refused.labels(Code.IOD_FENCED.name).inc()
        _log.warning("connection.fenced", peer=connection.peer, number=connection.number)
        connection.close("a newer connection took over")
        return
    ended = trio.Event()
    living[who] = (connection, ended)
    try:
        if before is not None:
            before[0].close("a newer connection took over")
            # Its handlers may sit in a disk operation that nobody can interrupt.
            await before[1].wait()
        if on_connection is not None and connection.is_open:
            on_connection(connection)
        await connection.run()
    finally:
        connection.close()
        ended.set()
        if living[who][0] is connection:
            del living[who]


def _note_refusal(error: KaError | OSError | trio.TooSlowError) -> None:
    code = error.code.name if isinstance(error, KaError) else type(error).__name__
    _refused.labels(code).inc()
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


async def _receive_peer(
    sock: socket.socket, identity: Identity, key: bytes, handler: Handler
) -> Connection:
    prepare(sock)
    receiver = FrameReceiver(body_size_max=HANDSHAKE_BODY_SIZE_MAX, payload_size_max=0)
    handshake = ServerHandshake(identity.cluster_id, key, nonce=secrets.token_bytes(NONCE_SIZE))
    with trio.fail_after(HANDSHAKE_TIMEOUT_S):
        while not handshake.done:
            frame = await _next_frame(sock, receiver)
            try:
                answer = handshake.receive(frame.body)
            except KaError as error:
                await _send_all(sock, encode_frame(Kind.ERROR, 0, encode_error(error)))
                raise
            await _send_all(sock, encode_frame(Kind.HANDSHAKE, 0, answer))
    hello = handshake.hello
    assert hello is not None
    return _connection(
        sock, receiver, handler, hello.name, hello.role, hello.incarnation, hello.connection
    )


async def dial(
    address: str,
    path: str,
    *,
    identity: Identity,
    key: bytes,
    connection_number: int = 1,
    handler: Handler | None = None,
    timeout: float = HANDSHAKE_TIMEOUT_S,
) -> Connection:
    """Connect, by the unix socket if somebody listens on *path*, and authenticate.

    Returns a Connection that the caller must `run`.  Raises KaError UNREACHABLE, TIMEOUT, AUTH,
    WRONG_CLUSTER, WRONG_VERSION or PROTOCOL.
    """
    where = address or path
    sock: socket.socket | None = None
    try:
        with trio.fail_after(timeout):
            sock = await connect_unix(path) if path else None
            if sock is None:
                sock = await connect_tcp(address) if address else None
            else:
                where = path
            if sock is None:
                raise KaError(Code.UNREACHABLE, f"nobody listens on {path}")
            return await _introduce(sock, where, identity, key, connection_number, handler)
    except trio.TooSlowError:
        _close(sock)
        raise KaError(Code.TIMEOUT, f"{where} did not answer in time") from None
    except OSError as error:
        _close(sock)
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise KaError(Code.UNREACHABLE, f"cannot reach {where}: {reason}") from None
    except BaseException:
        _close(sock)
        raise


def _close(sock: socket.socket | None) -> None:
    if sock is not None:
        sock.close()


async def _introduce(
    sock: socket.socket,
    where: str,
    identity: Identity,
    key: bytes,
    connection_number: int,
    handler: Handler | None,
) -> Connection:
    prepare(sock)
    receiver = FrameReceiver(body_size_max=HANDSHAKE_BODY_SIZE_MAX, payload_size_max=0)
    handshake = ClientHandshake(
        identity, key, connection=connection_number, nonce=secrets.token_bytes(NONCE_SIZE)
    )
    message: bytes | None = handshake.start()
    while message is not None:
        await _send_all(sock, encode_frame(Kind.HANDSHAKE, 0, message))
        message = handshake.receive((await _next_frame(sock, receiver)).body)
    return _connection(sock, receiver, handler, where, "server", b"", connection_number)


def _connection(
    sock: socket.socket,
    receiver: FrameReceiver,
    handler: Handler | None,
    peer: str,
    role: str,
    incarnation: bytes,
    number: int,
) -> Connection:
    receiver.body_size_max = BODY_SIZE_MAX
    receiver.payload_size_max = PAYLOAD_SIZE_MAX
    return Connection(
        sock,
        peer=peer,
        role=role,
        incarnation=incarnation,
        number=number,
        handler=handler,
        receiver=receiver,
    )
