"""Where connections come from: `dial` makes one, `serve` accepts many.

A server usually listens on TCP and on a unix socket; a client takes the unix socket when the
server is on its own host (half the cost per byte).  Strangers are `greeting`'s business.

Fencing: a peer's connections are numbered.  A newer one ends the older, and is served only when
no handler of the older runs any more; a connection that is not newer is turned away.  Other
connections of the peer's identity thus never overlap.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence

import trio

from common import log
from common.errors import Code, KaError
from common.framing import FrameReceiver
from common.greeting import HANDSHAKE_TIMEOUT_S, accept_peers, introduce, refused
from common.metrics import counter
from common.session import Hello, Identity
from common.sockets import connect_tcp, connect_unix, listen, parse_address
from common.transport import Connection, Handler

__all__ = ["dial", "listen", "parse_address", "serve"]

_log = log.get("ka.endpoint")
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
    living: dict[_Who, tuple[Connection, trio.Event]] = {}

    async def drive(sock: socket.socket, hello: Hello, receiver: FrameReceiver) -> None:
        connection = Connection(
            sock,
            peer=hello.name,
            role=hello.role,
            incarnation=hello.incarnation,
            number=hello.connection,
            handler=handler,
            receiver=receiver,
        )
        _accepted.labels(connection.role).inc()
        try:
            await _serve_newest(connection, living, on_connection)
        except Exception as error:
            # One connection's trouble, whatever it is, must not end the daemon.
            _log.error("connection.failed", peer=connection.peer, exc_info=error)
            connection.close("internal error")

    await accept_peers(sockets, cluster_id=identity.cluster_id, key=key, peer=drive)


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
        refused.labels(Code.IOD_FENCED.name).inc()
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
            receiver = await introduce(sock, identity, key, connection_number)
            return Connection(
                sock,
                peer=where,
                role="server",
                incarnation=b"",
                number=connection_number,
                handler=handler,
                receiver=receiver,
            )
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
