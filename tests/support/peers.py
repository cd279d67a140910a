"""Real peers for transport tests: a server on a unix socket or loopback, clients, raw strangers.

`Peers` owns a nursery; everything in it ends with the test.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from common.endpoint import dial, listen, serve
from common.errors import KaError
from common.framing import (
    BODY_SIZE_MAX,
    PAYLOAD_SIZE_MAX,
    Frame,
    FrameReceiver,
    Kind,
    encode_frame,
)
from common.session import ClientHandshake, Identity
from common.transport import Connection, Handler, Reply

__all__ = ["CLUSTER", "KEY", "Peers", "Raw", "echo", "failure", "identity", "opened", "pair"]

KEY = bytes(range(32))
CLUSTER = "lab"
_count = iter(range(1, 1 << 60))


async def failure(call: Callable[[], object]) -> KaError:
    """Return the error that awaiting *call* raises."""
    with pytest.raises(KaError) as caught:
        await call()  # type: ignore[misc]
    return caught.value


def identity(role: str = "client", name: str = "tester") -> Identity:
    """Return an identity that nobody else has."""
    return Identity(CLUSTER, role, name, next(_count).to_bytes(16, "big"))


def echo(_connection: Connection, body: bytes, payload: memoryview | None) -> Reply:
    """Answer with what was sent."""
    return Reply(body, payload)


class Peers:
    """One server and any number of clients."""

    def __init__(self, nursery: trio.Nursery, path: Path, *, tcp: bool) -> None:
        self.nursery = nursery
        self.path = "" if tcp else str(path)
        self.address = ""
        self.connections: list[Connection] = []
        """The server's ends, in the order of their coming."""
        self._arrived = trio.Event()
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()
        self._sockets: list[socket.socket] = []
        self._strangers: list[socket.socket] = []

    def start(self, handler: Handler) -> None:
        """Start the server; connections can be made at once."""
        self._sockets = listen("" if self.path else self.address or "127.0.0.1:0", self.path)
        if not self.path:
            host, port = self._sockets[0].getsockname()
            self.address = f"{host}:{port}"
        self._scope, self._stopped = trio.CancelScope(), trio.Event()
        self.nursery.start_soon(self._serve, handler, self._scope, self._stopped)

    async def stop(self) -> None:
        """End the server with all its connections."""
        self._scope.cancel()
        await self._stopped.wait()

    async def _serve(self, handler: Handler, scope: trio.CancelScope, stopped: trio.Event) -> None:
        sockets = self._sockets
        try:
            with scope:
                await serve(
                    sockets,
                    identity=identity("server", "server"),
                    key=KEY,
                    handler=handler,
                    on_connection=self._on_connection,
                )
        finally:
            for sock in sockets:
                sock.close()
            stopped.set()

    def _on_connection(self, connection: Connection) -> None:
        self.connections.append(connection)
        self._arrived.set()
        self._arrived = trio.Event()

    async def server_end(self, count: int = 1) -> Connection:
        """Return the server's end of the *count*th connection, when it is there."""
        while len(self.connections) < count:
            await self._arrived.wait()
        return self.connections[count - 1]

    async def client(
        self, handler: Handler | None = None, who: Identity | None = None, number: int = 1
    ) -> Connection:
        """Return a running connection to the server."""
        connection = await dial(
            self.address,
            self.path,
            identity=who or identity(),
            key=KEY,
            handler=handler,
            connection_number=number,
        )
        await self.nursery.start(connection.run)
        return connection

    async def connect_raw(self) -> socket.socket:
        """Return a plain connected socket."""
        family = socket.AF_UNIX if self.path else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        self._strangers.append(sock)
        sock.settimeout(10)
        host, _, port = self.address.partition(":")
        target = self.path or (host, int(port))
        await trio.to_thread.run_sync(sock.connect, target)
        return sock

    def close_strangers(self) -> None:
        for sock in self._strangers:
            sock.close()

    async def raw(self) -> Raw:
        """Return an authenticated peer that may then misbehave."""
        raw = Raw(await self.connect_raw())
        await raw.introduce()
        return raw


@asynccontextmanager
async def opened(path: Path, handler: Handler = echo, *, tcp: bool = False) -> AsyncIterator[Peers]:
    """Run a server, and end everything afterwards."""
    async with trio.open_nursery() as nursery:
        peers = Peers(nursery, path, tcp=tcp)
        peers.start(handler)
        try:
            yield peers
        finally:
            peers.close_strangers()
        nursery.cancel_scope.cancel()


class Raw:
    """A hand-driven peer: it sends any bytes and reads frames only when it is told to."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._receiver = FrameReceiver(
            body_size_max=BODY_SIZE_MAX, payload_size_max=PAYLOAD_SIZE_MAX
        )

    async def introduce(self, key: bytes = KEY) -> None:
        handshake = ClientHandshake(identity(), key, connection=1, nonce=b"n" * 32)
        message: bytes | None = handshake.start()
        while message is not None:
            await self.send(encode_frame(Kind.HANDSHAKE, 0, message))
            message = handshake.receive((await self.frame()).body)

    async def send(self, data: bytes) -> None:
        await trio.to_thread.run_sync(self.sock.sendall, data)

    async def request(self, request_id: int, body: bytes = b"", payload: bytes = b"") -> None:
        await self.send(encode_frame(Kind.REQUEST, request_id, body, len(payload)) + payload)

    async def frame(self) -> Frame:
        """Return the next frame; raises EOFError at the end."""
        return (await self.message())[0]

    async def message(self) -> tuple[Frame, bytes]:
        """Return the next frame and its payload; raises EOFError at the end."""
        while (frame := self._receiver.next_frame()) is None:
            await self._receive()
        payload = bytearray(frame.payload_size)
        if frame.payload_size:
            self._receiver.take_payload(memoryview(payload))
        while not self._receiver.payload_complete:
            await self._receive()
        return frame, bytes(payload)

    async def _receive(self) -> None:
        count = await trio.to_thread.run_sync(self.sock.recv_into, self._receiver.want())
        if not count:
            raise EOFError
        self._receiver.got(count)

    async def answer(self, frame: Frame, body: bytes = b"", payload: bytes = b"") -> None:
        head = encode_frame(Kind.REPLY, frame.request_id, body, len(payload))
        await self.send(head + payload)

    async def ended(self) -> bool:
        """Whether the peer hangs up; waits for it."""
        try:
            while True:
                await self.frame()
        except (EOFError, ConnectionError):
            return True

    def close(self) -> None:
        self.sock.close()


def pair(handler: Handler | None = None) -> tuple[Connection, Raw]:
    """Return a connection that has yet to run, and its hand-driven peer."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.settimeout(10)
    connection = Connection(
        ours,
        peer="raw",
        role="test",
        incarnation=b"",
        number=1,
        handler=handler,
        receiver=FrameReceiver(body_size_max=BODY_SIZE_MAX, payload_size_max=PAYLOAD_SIZE_MAX),
    )
    return connection, Raw(theirs)
