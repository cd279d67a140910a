"""Where connections come from: `dial` makes one, `serve` accepts many.

Addresses: `host:port` for TCP, a path for a unix socket.  A server usually listens on both; a
client takes the unix socket when it exists on its own host (half the cost per byte).

An unauthenticated peer gets HANDSHAKE_TIMEOUT_S, one small frame at a time, and one of
`STRANGERS_MAX` places; it is counted and otherwise ignored.  What it says in the handshake is not
believed beyond the few codes that a handshake can end with.

Fencing: a peer's connections are numbered.  A newer one ends the older, and is served only when
no handler of the older runs any more; a connection that is not newer is turned away.  Other
connections of the peer's identity thus never overlap.
"""

from __future__ import annotations

import os
import secrets
import socket
import stat
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
from common.transport import SOCKET_BUFFER_SIZE, Connection, Handler

__all__ = ["dial", "listen", "parse_address", "serve"]

HANDSHAKE_TIMEOUT_S = 5.0
STRANGERS_MAX = 128
BACKLOG = 1024
KEEPALIVE_IDLE_S = 30
KEEPALIVE_INTERVAL_S = 10
KEEPALIVE_COUNT = 3
"""A vanished host is noticed after a minute, not after the kernel's two hours."""

_HANDSHAKE_CODES = (Code.AUTH, Code.WRONG_CLUSTER, Code.WRONG_VERSION, Code.PROTOCOL)

_log = log.get("ka.endpoint")
_refused = counter("ka_refused_total", "Connections refused before or in the handshake", "reason")
_accepted = counter("ka_accepted_total", "Connections accepted", "role")


def parse_address(text: str) -> tuple[str, int]:
    """Return (host, port) of `host:port` or `[v6]:port`; raises KaError USAGE."""
    host, colon, port = text.rpartition(":")
    digits = port.isascii() and port.isdigit() and len(port) <= 5
    if not colon or not host or not digits or int(port) > 65535:
        raise KaError(Code.USAGE, f"not an address (host:port): {text!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def listen(address: str, path: str = "") -> list[socket.socket]:
    """Return listening sockets for a TCP address and, if *path* is given, a unix socket.

    A stale unix socket is replaced.  The unix socket is open to every local user: the handshake
    is what protects it.  Raises KaError BUSY when an address is in use.
    """
    sockets: list[socket.socket] = []
    where = address
    try:
        if address:
            host, port = parse_address(address)
            info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            sock = socket.socket(info[0], socket.SOCK_STREAM)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(info[4])
        where = path
        if path:
            sockets.append(_bind_unix(path))
        for sock in sockets:
            where = str(sock.getsockname())
            sock.listen(BACKLOG)
            sock.setblocking(False)
    except OSError as error:
        for sock in sockets:
            sock.close()
        reason = error.strerror or str(error)
        raise KaError(Code.BUSY, f"cannot listen on {where}: {reason}") from None
    return sockets


def _bind_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_stale(path):
            os.unlink(path)
        sock.bind(path)
        os.chmod(path, 0o666)
    except OSError:
        sock.close()
        raise
    return sock


def _is_stale(path: str) -> bool:
    """Whether *path* is a unix socket that nobody listens on."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False  # somebody's file: bind will refuse
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            probe.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


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
    living: dict[_Who, tuple[Connection, trio.Event]] = {}
    async with trio.open_nursery() as nursery:

        async def welcome(sock: socket.socket) -> None:
            try:
                connection = await _receive_peer(sock, identity, key, handler)
            except (KaError, OSError, trio.TooSlowError) as error:
                sock.close()
                _note_refusal(error)
                return
            except BaseException:
                sock.close()
                raise
            finally:
                strangers.release_on_behalf_of(sock)
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
                try:
                    strangers.acquire_on_behalf_of_nowait(sock)
                except trio.WouldBlock:
                    _refused.labels("crowd").inc()
                    sock.close()
                    continue
                nursery.start_soon(welcome, sock)

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
    if isinstance(error, KaError) and error.code in _HANDSHAKE_CODES and not error.remote:
        _log.warning("connection.refused", reason=reason)
    else:
        _log.debug("connection.refused", reason=reason)


def _prepare(sock: socket.socket) -> None:
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_SIZE)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)
        gone_ms = 1000 * (KEEPALIVE_IDLE_S + KEEPALIVE_COUNT * KEEPALIVE_INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, gone_ms)


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
    """Connect, by the unix socket if somebody listens on *path*, and authenticate.

    Returns a Connection that the caller must `run`.  Raises KaError UNREACHABLE, TIMEOUT, AUTH,
    WRONG_CLUSTER, WRONG_VERSION or PROTOCOL.
    """
    where = address or path
    sock: socket.socket | None = None
    try:
        with trio.fail_after(timeout):
            sock = await _connect_unix(path) if path else None
            if sock is None:
                sock = await _connect_tcp(address) if address else None
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
        reason = error.strerror or str(error)
        raise KaError(Code.UNREACHABLE, f"cannot reach {where}: {reason}") from None
    except BaseException:
        _close(sock)
        raise


def _close(sock: socket.socket | None) -> None:
    if sock is not None:
        sock.close()


async def _connect_unix(path: str) -> socket.socket | None:
    """Return a connected socket, or None where TCP should be tried.

    The path may be left over, or be another host's on a shared file system.
    """
    try:
        return await _connect(socket.AF_UNIX, path)
    except (FileNotFoundError, ConnectionRefusedError, PermissionError):
        return None


async def _connect_tcp(address: str) -> socket.socket:
    host, port = parse_address(address)
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for info in found[:-1]:  # a name may have addresses that nobody listens on
        try:
            return await _connect(info[0], info[4])
        except OSError:
            continue
    return await _connect(found[-1][0], found[-1][4])


async def _connect(family: int, target: object) -> socket.socket:
    trio_socket = trio.socket.socket(family, socket.SOCK_STREAM)
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
