"""Where connections come from: `dial` makes one, `serve` accepts many.

Addresses: `host:port` for TCP, a path for a unix socket.  A server usually listens on both; a
client takes the unix socket when it exists on its own host (half the cost per byte).

An unauthenticated peer gets HANDSHAKE_TIMEOUT_S, one small frame at a time, and one of
`STRANGERS_MAX` places; it is counted and otherwise ignored.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

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
from common.metrics import counter
from common.session import (
    HANDSHAKE_BODY_SIZE_MAX,
    NONCE_SIZE,
    ClientHandshake,
    Identity,
    ServerHandshake,
)
from common.transport import (
    SOCKET_BUFFER_SIZE,
    Connection,
    Handler,
    decode_error,
    encode_error,
)

__all__ = ["dial", "listen", "parse_address", "serve"]

HANDSHAKE_TIMEOUT_S = 5.0
STRANGERS_MAX = 128
BACKLOG = 1024

_log = log.get("ka.endpoint")
_refused = counter("ka_refused_total", "Connections refused before or in the handshake", "reason")
_accepted = counter("ka_accepted_total", "Connections accepted", "role")


def parse_address(text: str) -> tuple[str, int]:
    """Return (host, port) of `host:port` or `[v6]:port`; raises KaError USAGE."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise KaError(Code.USAGE, f"not an address (host:port): {text!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def listen(address: str, path: str = "") -> list[socket.socket]:
    """Return listening sockets for a TCP address and, if *path* is given, a unix socket.

    A stale unix socket is replaced.  The unix socket is open to every local user: the handshake
    is what protects it.  Raises KaError BUSY when an address is in use.
    """
    sockets: list[socket.socket] = []
    try:
        if address:
            host, port = parse_address(address)
            info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            sock = socket.socket(info[0], socket.SOCK_STREAM)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(info[4])
        if path:
            sockets.append(_bind_unix(path))
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise KaError(Code.BUSY, f"cannot listen on {address or path}: {error.strerror}") from None
    for sock in sockets:
        sock.listen(BACKLOG)
        sock.setblocking(False)
    return sockets


def _bind_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            try:
                probe.connect(path)
            except (ConnectionRefusedError, FileNotFoundError):
                Path(path).unlink(missing_ok=True)
        sock.bind(path)
        os.chmod(path, 0o666)
    except OSError:
        sock.close()
        raise
    return sock


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
    strangers = trio.CapacityLimiter(STRANGERS_MAX)
    async with trio.open_nursery() as nursery:

        async def welcome(sock: socket.socket) -> None:
            try:
                connection = await _receive_peer(sock, identity, key, handler)
            except (KaError, OSError, trio.TooSlowError) as error:
                code = error.code.name if isinstance(error, KaError) else type(error).__name__
                _refused.labels(code).inc()
                _log.warning("connection.refused", reason=str(error) or "too slow")
                sock.close()
                return
            finally:
                strangers.release_on_behalf_of(sock)
            _accepted.labels(connection.role).inc()
            if on_connection is not None:
                on_connection(connection)
            await connection.run()

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
                try:
                    strangers.acquire_on_behalf_of_nowait(sock)
                except trio.WouldBlock:
                    _refused.labels("crowd").inc()
                    sock.close()
                    continue
                nursery.start_soon(welcome, sock)

        for listener in sockets:
            nursery.start_soon(accept, listener)


def _prepare(sock: socket.socket) -> None:
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_SIZE)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


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
        raise decode_error(frame.body)
    if frame.kind is not Kind.HANDSHAKE:
        raise KaError(Code.PROTOCOL, f"{frame.kind.name} frame in the handshake")
    return frame


async def _receive_peer(
    sock: socket.socket, identity: Identity, key: bytes, handler: Handler
) -> Connection:
    _prepare(sock)
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
    """Connect, prefer the unix socket if *path* exists, and authenticate.

    Returns a Connection that the caller must `run`.  Raises KaError UNREACHABLE, TIMEOUT, AUTH,
    WRONG_CLUSTER, WRONG_VERSION or PROTOCOL.
    """
    where = path if path and _exists(path) else address
    sock: socket.socket | None = None
    try:
        with trio.fail_after(timeout):
            sock = await _connect(where, unix=where == path)
            return await _introduce(sock, where, identity, key, connection_number, handler)
    except trio.TooSlowError:
        _close(sock)
        raise KaError(Code.TIMEOUT, f"{where} did not answer in time") from None
    except OSError as error:
        _close(sock)
        reason = error.strerror or str(error)
        raise KaError(Code.UNREACHABLE, f"cannot reach {where}: {reason}") from None
    except BaseException:
        _close(sock)
        raise


def _exists(path: str) -> bool:
    return os.path.exists(path)


def _close(sock: socket.socket | None) -> None:
    if sock is not None:
        sock.close()


async def _connect(where: str, *, unix: bool) -> socket.socket:
    if unix:
        trio_socket = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        target: object = where
    else:
        host, port = parse_address(where)
        info = (await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
        trio_socket = trio.socket.socket(info[0], socket.SOCK_STREAM)
        target = info[4]
    try:
        await trio_socket.connect(target)
    except BaseException:
        trio_socket.close()
        raise
    return socket.socket(
        trio_socket.family, trio_socket.type, trio_socket.proto, trio_socket.detach()
    )


async def _introduce(
    sock: socket.socket,
    where: str,
    identity: Identity,
    key: bytes,
    connection_number: int,
    handler: Handler | None,
) -> Connection:
    _prepare(sock)
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


