"""A link: one peer that is always meant to be reachable; it reconnects, callers need not care.

`call` sends on the current connection, makes one when there is none, and repeats a request whose
connection was lost or that the peer asks to repeat (`Code.retryable`) until a deadline.  So only
requests that are harmless to repeat may go through it: reads, idempotent writes, and mutations
that carry an exactly-once number.

Connections of one identity to one peer are numbered, and the peer serves a newer one only when
nothing of the older runs any more (`endpoint.serve`): a request that was given up cannot be carried
out behind its own repetition.  So there is one link from an identity to a peer.

Between attempts the link waits BACKOFF_S, doubled up to BACKOFF_MAX_S.  Callers that wait for a
connection share the attempts.  `on_connect` runs on each new connection before anything else uses
it (session resumption); if it raises, the connection is given up.
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
ATTEMPT_MIN_S = 1.0
"""What the last attempt gets, however little patience is left."""

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
        self._failure: tuple[int, KaError] | None = None
        """The last attempt that failed, by its number."""
        self._dialing = trio.Lock()
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the tasks of this link's connections; ends by cancellation."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    @property
    def connected(self) -> bool:
        return self._connection is not None and self._connection.is_open

    @property
    def is_local(self) -> bool:
        """Whether the peer is connected, and on this host."""
        return self._connection is not None and self._connection.is_local and self.connected

    async def connect(self) -> Connection:
        """Return the living connection, made now if need be; one attempt."""
        connection = self._connection
        if connection is not None and connection.is_open:
            return connection
        seen = self._number
        async with self._dialing:
            connection = self._connection
            if connection is not None and connection.is_open:
                return connection
            if self._failure is not None and self._failure[0] > seen:
                # Others waited with us and have just found out: a dead peer must not cost each
                # of us, one behind the other, the time of an attempt.
                error = self._failure[1]
                raise KaError(error.code, error.message, **error.context)
            self._number += 1
            try:
                self._connection = await self._establish()
            except KaError as error:
                self._failure = (self._number, error)
                raise
            return self._connection

    async def _establish(self) -> Connection:
        if self._nursery is None:
            raise KaError(Code.UNREACHABLE, f"the link to {self.name} is not running")
        connection = await dial(
            self._address,
            self._path,
            identity=self._identity,
            key=self._key,
            connection_number=self._number,
        )
        try:
            await self._nursery.start(connection.run)
            if self._on_connect is not None:
                await self._on_connect(connection)
        except BaseException:
            connection.close("given up")
            raise
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

        Raises the peer's error, or UNREACHABLE / TIMEOUT when *patience_s* (default: the link's),
        counted from the first failure, is over.  Raises at once what no repetition can mend (AUTH,
        WRONG_CLUSTER, ...).  A single attempt gets as long as the patience given here, or
        CALL_TIMEOUT_S but not more than the link's patience.
        """
        if patience_s is None:
            patience_s = self.patience_s
            attempt_s = min(CALL_TIMEOUT_S, patience_s)
        else:
            attempt_s = patience_s
        attempt_s = max(attempt_s, ATTEMPT_MIN_S)
        connection = self._connection
        if connection is not None and connection.is_open:
            try:
                return await connection.call(body, payload, into=into, timeout=attempt_s)
            except KaError as error:
                if not error.code.retryable:
                    raise
                self._suspect(connection, error)
        return await self._call_patiently(body, payload, into, patience_s, attempt_s)

    async def _call_patiently(
        self,
        body: bytes,
        payload: Sequence[Buffer],
        into: memoryview | None,
        patience_s: float,
        attempt_s: float,
    ) -> tuple[bytes, int]:
        deadline = trio.current_time() + patience_s
        backoff_s = BACKOFF_S
        while True:
            connection: Connection | None = None
            error = KaError(Code.TIMEOUT, "no connection in time")
            with trio.move_on_at(deadline + ATTEMPT_MIN_S):
                try:
                    connection = await self.connect()
                except KaError as failure:
                    error = failure
            if connection is not None:
                left_s = max(ATTEMPT_MIN_S, min(attempt_s, deadline - trio.current_time()))
                try:
                    return await connection.call(body, payload, into=into, timeout=left_s)
                except KaError as failure:
                    error = failure
            if not error.code.retryable:
                raise error
            if trio.current_time() + backoff_s > deadline:
                raise KaError(error.code, f"{self.name}: {error.message}", **error.context)
            if connection is not None:
                self._suspect(connection, error)
            _log.debug("call.repeated", peer=self.name, reason=error.message)
            await trio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    def _suspect(self, connection: Connection, error: KaError) -> None:
        """After a time-out the connection is given up: what hangs on it must not come late.

        A time-out that the peer met somewhere else says nothing about this connection.
        """
        if error.code is Code.TIMEOUT and not error.remote:
            connection.close("no answer in time")

    def close(self) -> None:
        """End the current connection, if any."""
        if self._connection is not None:
            self._connection.close()
