"""A link: one peer that is always meant to be reachable; it reconnects, callers need not care.

`call` sends on the current connection, makes one when there is none, and repeats a request whose
connection was lost or that the peer asks to repeat (`Code.retryable`) until a deadline.  So only
requests that are harmless to repeat may go through it: reads, idempotent writes, and mutations
that carry an exactly-once number.

Connections of one process to one peer are numbered; a peer drops what an older connection still
has to say once it has seen a newer one.  Between attempts the link waits BACKOFF_S, doubled up to
BACKOFF_MAX_S.  `on_connect` runs on each new connection before anything else uses it (session
resumption); if it raises, the connection is given up.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from common import log
from common.checksum import Buffer
from common.endpoint import dial
from common.errors import Code, KaError
from common.session import Identity
from common.transport import Connection

__all__ = ["Link"]

BACKOFF_S = 0.05
BACKOFF_MAX_S = 1.0
CALL_TIMEOUT_S = 30.0
"""A single attempt; the peer is then taken for hung and the connection is made anew."""

_log = log.get("ka.link")


class Link:
    """A reconnecting path to one peer.  `run` must be running for the others to work."""

    def __init__(
        self,
        name: str,
        address: str,
        path: str,
        *,
        identity: Identity,
        key: bytes,
        patience_s: float,
        on_connect: Callable[[Connection], Awaitable[None]] | None = None,
    ) -> None:
        self.name = name
        self.patience_s = patience_s
        """How long `call` goes on trying when the peer cannot be reached."""
        self._address = address
        self._path = path
        self._identity = identity
        self._key = key
        self._on_connect = on_connect
        self._connection: Connection | None = None
        self._number = 0
        self._dialing = trio.Lock()
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the tasks of this link's connections; ends by cancellation."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    @property
    def connected(self) -> bool:
        return self._connection is not None and self._connection.is_open

    async def connect(self) -> Connection:
        """Return the living connection, made now if need be; one attempt."""
        connection = self._connection
        if connection is not None and connection.is_open:
            return connection
        async with self._dialing:
            connection = self._connection
            if connection is not None and connection.is_open:
                return connection
            assert self._nursery is not None, "the link is not running"
            self._number += 1
            connection = await dial(
                self._address,
                self._path,
                identity=self._identity,
                key=self._key,
                connection_number=self._number,
            )
            await self._nursery.start(connection.run)
            try:
                if self._on_connect is not None:
                    await self._on_connect(connection)
            except BaseException:
                connection.close("given up")
                raise
            self._connection = connection
            return connection

    async def call(
        self,
        body: bytes,
        payload: Sequence[Buffer] = (),
        *,
        into: memoryview | None = None,
        patience_s: float | None = None,
    ) -> tuple[bytes, int]:
        """Send a repeatable request; see `Connection.call`.

        Raises the peer's error, or UNREACHABLE / TIMEOUT when *patience_s* (default: the link's)
        is over.  Raises at once what no repetition can mend (AUTH, WRONG_CLUSTER, ...).
        """
        connection = self._connection
        if connection is not None and connection.is_open:
            try:
                return await connection.call(body, payload, into=into, timeout=CALL_TIMEOUT_S)
            except KaError as error:
                if not error.code.retryable:
                    raise
                self._suspect(connection, error)
        return await self._call_patiently(
            body, payload, into, self.patience_s if patience_s is None else patience_s
        )

    async def _call_patiently(
        self,
        body: bytes,
        payload: Sequence[Buffer],
        into: memoryview | None,
        patience_s: float,
    ) -> tuple[bytes, int]:
        deadline = trio.current_time() + patience_s
        backoff_s = BACKOFF_S
        while True:
            connection: Connection | None = None
            try:
                connection = await self.connect()
                left_s = max(1.0, min(CALL_TIMEOUT_S, deadline - trio.current_time()))
                return await connection.call(body, payload, into=into, timeout=left_s)
            except KaError as error:
                if not error.code.retryable:
                    raise
                if trio.current_time() + backoff_s > deadline:
                    raise KaError(
                        error.code, f"{self.name}: {error.message}", **error.context
                    ) from None
                if connection is not None:
                    self._suspect(connection, error)
                _log.debug("call.repeated", peer=self.name, reason=error.message)
            await trio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    def _suspect(self, connection: Connection, error: KaError) -> None:
        """After a time-out the connection is given up: what hangs on it must not come late."""
        if error.code is Code.TIMEOUT:
            connection.close("no answer in time")

    def close(self) -> None:
        """End the current connection, if any."""
        if self._connection is not None:
            self._connection.close()
