"""The client's side of the metadata protocol: a session, its slots, and repeatable requests.

Reads are repeated as they are.  A mutation takes a free slot and the slot's next number, so that
a repetition after a lost answer gets the first answer (docs/architecture.md#exactly-once).  On a
new connection the session is resumed with the list of what is open here.  If the mds has let the
session expire, a new one begins with that list, and `on_session_lost` is told which inodes must
not be used any more.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

from common import log
from common.errors import Code, KaError
from common.link import Link
from common.session import Identity
from common.transport import Connection
from nfsp import wire
from nfsp.config import MdsConfig
from nfsp.model import ClusterMap, Inode, Superblock

__all__ = ["MdsClient"]

SLOT_COUNT = 64
"""Mutations one mount may have under way."""
RESUME_TIMEOUT_S = 10.0

_log = log.get("nfsp.client")
_Reply = TypeVar("_Reply")


class MdsClient:
    """One session with one mds.  `run` must be running; `start` opens the session."""

    def __init__(
        self,
        config: MdsConfig,
        *,
        identity: Identity,
        key: bytes,
        patience_s: float,
        mountpoint: str = "",
        durable: bool = False,
        opens: Callable[[], list[list[object]]] = list,
        on_session_lost: Callable[[list[int]], None] = lambda stale: None,
        on_map: Callable[[ClusterMap], Awaitable[None]] | None = None,
    ) -> None:
        """`on_map` is given the cluster map with each connection, before any answer on it: a
        layout from this mds never names a chain that `on_map` has not seen."""
        self._link = Link(
            f"mds{config.id}",
            config.address,
            config.socket,
            identity=identity,
            key=key,
            patience_s=patience_s,
            on_connect=self._establish,
        )
        self._mountpoint = mountpoint
        self._durable = durable
        self._opens = opens
        self._on_session_lost = on_session_lost
        self._on_map = on_map
        self._session = 0
        self._is_lost = False
        """A session has run out, and the next one does not know our opens yet."""
        self._connection: Connection | None = None
        self._free_slots = list(range(SLOT_COUNT))
        self._sequences = [0] * SLOT_COUNT
        self._slot_freed = trio.Semaphore(SLOT_COUNT)
        self.lease_ttl_ms = 0
        self.superblock: Superblock
        self.cluster_map: ClusterMap

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Drive the connection and keep the session alive."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._link.run)
            nursery.start_soon(self._renew)
            task_status.started()

    async def start(self) -> None:
        """Open the session; raises what `Link.call` raises."""
        await self.request(wire.SessionRenew(), wire.SessionReply)

    async def stop(self) -> None:
        """End the session in peace, if the mds can be reached at once."""
        if self._session and self._link.connected:
            with trio.move_on_after(2):
                try:
                    await self._link.call(wire.MDS.encode(wire.SessionClose()), patience_s=0)
                except KaError as error:
                    _log.warning("session.close_failed", reason=str(error))
        self._link.close()

    async def request(self, message: Any, reply: type[_Reply]) -> _Reply:
        """Send a request that is harmless to repeat; return its answer."""
        body, _size = await self._link.call(wire.MDS.encode(message))
        return _decode(body, reply)

    async def mutate(self, make: Callable[[int, int], Any], reply: type[_Reply]) -> _Reply:
        """Send the mutation that *make* builds from a slot and a number; return its answer.

        After UNREACHABLE or TIMEOUT nobody knows whether it was carried out.
        """
        await self._slot_freed.acquire()
        slot = self._free_slots.pop()
        self._sequences[slot] += 1
        try:
            message = make(slot, self._sequences[slot])
            body, _size = await self._link.call(wire.MDS.encode(message))
        finally:
            self._free_slots.append(slot)
            self._slot_freed.release()
        return _decode(body, reply)

    async def fetch_map(self) -> ClusterMap:
        """Ask for the current cluster map."""
        reply = await self.request(wire.SessionRenew(), wire.SessionReply)
        self.cluster_map = ClusterMap.decode(reply.cluster_map)
        return self.cluster_map

    async def inode(self, message: Any) -> Inode:
        """Send a request that is answered by an inode."""
        return Inode.decode((await self.request(message, wire.InodeReply)).inode)

    async def mutate_inode(self, make: Callable[[int, int], Any]) -> Inode:
        """Send a mutation that is answered by an inode."""
        return Inode.decode((await self.mutate(make, wire.InodeReply)).inode)

    async def mutate_entry(self, make: Callable[[int, int], Any]) -> tuple[bytes, Inode | None]:
        """Send a mutation of an entry; return its inode's record and the directory."""
        reply = await self.mutate(make, wire.EntryReply)
        return reply.inode, Inode.decode(reply.directory) if reply.directory else None

    def closed(self, ino: int, count: int) -> None:
        """Tell the mds that *count* opens of an inode have ended.

        Sent at once and in order with later requests; lost with the connection, and then the
        list of opens that resumes the session says the same.
        """
        if self._connection is not None and self._connection.is_open:
            self._connection.notify(wire.MDS.encode(wire.Close(ino, count)))

    async def _establish(self, connection: Connection) -> None:
        """Resume or open the session on a new connection."""
        if self._session:
            try:
                await self._resume(connection)
                return
            except KaError as error:
                if error.code is not Code.SESSION_UNKNOWN:
                    raise
                _log.error("session.lost", session=self._session)
                self._is_lost = True
        # Slots go on counting: mutations that began in the old session end in the new one.
        hello = wire.SessionOpen(
            socket.gethostname(), os.getpid(), self._mountpoint, self._durable, SLOT_COUNT
        )
        await self._handshake(connection, hello)
        if self._is_lost:
            await self._resume(connection)

    async def _resume(self, connection: Connection) -> None:
        reply = await self._handshake(
            connection, wire.SessionResume(self._session, list(self._opens()))
        )
        if self._is_lost:
            # Only now: what was written until here may have been cut with the old session's.
            self._is_lost = False
            self._on_session_lost(reply.stale)

    async def _handshake(self, connection: Connection, message: Any) -> wire.SessionReply:
        body, _size = await connection.call(wire.MDS.encode(message), timeout=RESUME_TIMEOUT_S)
        reply = _decode(body, wire.SessionReply)
        self._session = reply.session
        self.lease_ttl_ms = reply.lease_ttl_ms
        self.superblock = Superblock.decode(reply.superblock)
        self.cluster_map = ClusterMap.decode(reply.cluster_map)
        if self._on_map is not None:
            await self._on_map(self.cluster_map)
        self._connection = connection
        return reply

    async def _renew(self) -> None:
        while True:
            await trio.sleep(max(0.5, self.lease_ttl_ms / 3000))
            if not self._session:
                continue
            try:
                await self.request(wire.SessionRenew(), wire.SessionReply)
            except KaError as error:
                _log.warning("session.renew_failed", reason=str(error))


def _decode(body: bytes, reply: type[_Reply]) -> _Reply:
    message = wire.MDS.decode(body)
    if not isinstance(message, reply):
        raise KaError(Code.PROTOCOL, f"expected {reply.__name__}, got {type(message).__name__}")
    return message
