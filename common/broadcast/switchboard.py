"""The switchboard: this node's connections, by rank of the neighbour.

Only who holds the token of the transfer is listened to, and only a rank of its plan.  Whoever has
something to say to a neighbour calls it if there is no connection yet.  Two neighbours may call
each other at once: each then sends on the connection that it made itself, so what it says stays in
order.  A connection of a peer's new life (a process that was started again) ends those of the old.

What is put is sent by `flush`, at the end of a turn: in one system call for each neighbour.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Sequence

import trio

from common import log
from common.broadcast.edge import Edge, Owner
from common.broadcast.job import Job
from common.errors import Code, KaError
from common.framing import FrameReceiver
from common.greeting import accept_peers, introduce
from common.outbox import Part
from common.session import Hello, Identity
from common.sockets import connect_tcp

__all__ = ["Release", "Switchboard"]

ROLE = "hop"
DIAL_TIMEOUT_S = 5.0

_log = log.get("ka.switchboard")

Release = Callable[[], None]


class _Dial:
    """A call under way, and what is to be said when it is answered."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.queue: list[tuple[Sequence[Part], Release | None]] = []


class Switchboard:
    """Connections of one node in one transfer."""

    def __init__(
        self, job: Job, rank: int, owner: Owner, unreachable: Callable[[int, str], None]
    ) -> None:
        """*unreachable* is called with (peer, reason) when a call has failed."""
        self._job = job
        self._rank = rank
        self._owner = owner
        self._unreachable = unreachable
        self._identity = Identity(job.transfer_id.hex(), ROLE, str(rank), secrets.token_bytes(16))
        self._edges: dict[int, list[Edge]] = {}
        """By peer, the one to send on first."""
        self._dialing: dict[int, _Dial] = {}
        self._dial_count = 0
        self._dirty: dict[Edge, None] = {}
        self._nursery: trio.Nursery | None = None

    async def serve(
        self,
        sockets: Sequence[socket.socket],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Take and make connections until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await accept_peers(
                    sockets,
                    cluster_id=self._identity.cluster_id,
                    key=self._job.token,
                    peer=self._welcome,
                )
        finally:
            for edge in self._all_edges():
                edge.close()

    # ------------------------------------------------------------ sending

    def put(self, peer: int, parts: Sequence[Part], release: Release | None = None) -> None:
        """Queue a frame for a peer, behind what is queued already; call it if need be."""
        dial = self._dialing.get(peer)
        edges = self._edges.get(peer)
        if dial is None and edges:
            edges[0].put(parts, release)
            self._dirty[edges[0]] = None
            return
        if dial is None:
            dial = self._dialing[peer] = _Dial()
            assert self._nursery is not None
            self._nursery.start_soon(self._dial, peer, dial)
        dial.queue.append((parts, release))

    def put_past(self, peer: int, parts: Sequence[Part]) -> None:
        """Send a frame by a new connection, and then give up the old ones with what waits there."""
        assert self._nursery is not None
        self._nursery.start_soon(self._put_past, peer, parts)

    def more_for(self, peer: int) -> None:
        """Something that was put for a peer has grown."""
        for edge in self._edges.get(peer, ()):
            self._dirty[edge] = None

    def flush(self) -> None:
        while self._dirty:
            self._dirty.popitem()[0].flush()

    def poke(self) -> None:
        """Take what has come of chunks that are not complete."""
        for edge in self._all_edges():
            edge.poke()

    def disconnect(self, peer: int) -> None:
        """Close all connections to a peer and take back what waits for it."""
        dial = self._dialing.pop(peer, None)
        if dial is not None:
            dial.scope.cancel()
        for edge in list(self._edges.get(peer, ())):
            edge.abort()
            self.drop(edge)

    async def finish(self) -> None:
        """Let what waits leave, and the neighbours hang up."""
        async with trio.open_nursery() as nursery:
            for edge in self._all_edges():
                nursery.start_soon(edge.finish)

    # ------------------------------------------------------------ connections

    async def edge_to(self, peer: int) -> Edge:
        """Return a connection to *peer*, made now if there is none.

        Raises KaError UNREACHABLE or TIMEOUT, or what the handshake ended with.
        """
        edges = self._edges.get(peer)
        return edges[0] if edges else await self._connect(peer)

    async def _connect(self, peer: int) -> Edge:
        address = self._job.addresses[peer]
        self._dial_count += 1
        sock: socket.socket | None = None
        try:
            with trio.fail_after(DIAL_TIMEOUT_S):
                sock = await connect_tcp(address)
                receiver = await introduce(sock, self._identity, self._job.token, self._dial_count)
        except trio.TooSlowError:
            reason = f"rank {peer} at {address} did not answer in time"
            raise KaError(Code.TIMEOUT, reason) from None
        except OSError as error:
            reason = f"rank {peer} at {address}: {error.strerror or error}"
            raise KaError(Code.UNREACHABLE, reason) from None
        else:
            edge = Edge(sock, receiver, self._owner, peer=peer, life=b"")
            sock = None
        finally:
            if sock is not None:
                sock.close()
        self._edges.setdefault(peer, []).insert(0, edge)
        assert self._nursery is not None
        self._nursery.start_soon(self._drive, edge)
        return edge

    async def _put_past(self, peer: int, parts: Sequence[Part]) -> None:
        old = list(self._edges.get(peer, ()))
        try:
            edge = await self._connect(peer)
        except KaError as error:
            _log.debug("past.impossible", peer=peer, reason=str(error))
            self.put(peer, parts)
            self.flush()
            return
        edge.put(parts)
        edge.flush()
        for one in old:
            one.abort()
            self.drop(one)

    def _all_edges(self) -> list[Edge]:
        return [edge for edges in self._edges.values() for edge in edges]

    async def _welcome(self, sock: socket.socket, hello: Hello, receiver: FrameReceiver) -> None:
        """Drive a connection that a peer has made."""
        digits = hello.name.isascii() and hello.name.isdigit() and len(hello.name) < 10
        rank = int(hello.name) if digits else -1
        known = 0 <= rank < len(self._job.addresses) and rank != self._rank
        if hello.role != ROLE or not known or not hello.incarnation:
            _log.warning("hop.refused", name=hello.name, role=hello.role)
            sock.close()
            return
        edge = Edge(sock, receiver, self._owner, peer=rank, life=hello.incarnation)
        for other in list(self._edges.get(rank, ())):
            if other.life not in (b"", edge.life):
                other.fail("it was started again")
        self._edges.setdefault(rank, []).append(edge)
        await self._drive(edge)

    async def _drive(self, edge: Edge) -> None:
        try:
            await edge.run()
        finally:
            self.drop(edge)

    def drop(self, edge: Edge) -> None:
        """Use a connection no more."""
        edges = self._edges.get(edge.peer, [])
        if edge in edges:
            edges.remove(edge)
            if not edges:
                del self._edges[edge.peer]
        self._dirty.pop(edge, None)

    async def _dial(self, peer: int, dial: _Dial) -> None:
        edge: Edge | None = None
        reason = "given up"
        with dial.scope:
            try:
                edge = await self.edge_to(peer)
            except KaError as error:
                reason = str(error)
                edge = next(iter(self._edges.get(peer, ())), None)  # it may have called us
        if self._dialing.get(peer) is dial:
            del self._dialing[peer]
        for parts, release in dial.queue:
            if edge is not None:
                edge.put(parts, release)
            elif release is not None:
                release()
        if edge is not None:
            edge.flush()
        elif not dial.scope.cancel_called:
            self._unreachable(peer, reason)
