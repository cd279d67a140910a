"""The relay: the shell around a hop.  It owns connections, buffers and worker threads.

`serve` takes connections for as long as the transfer lasts; `fetch_plan` asks for the plan;
`run` drives the hop until it has finished.  Events go into the hop, its actions are carried out in
order, and what they queue is sent at their end, in one system call for each neighbour if it can be.

A chunk is received into a buffer from a pool, summed there, and sent on from there while it is
being written; later it is sent from the sink's file by the kernel.  Writes happen in one worker
thread, all that wait in one call, so that a disk that blocks delays nothing but its own acks.

Only who holds the token of the transfer is listened to, and only a rank of its plan.  Two
neighbours may call each other at once: each then sends on the connection that it made.  A
connection of a peer's new life (a process that was started again) ends those of the old one.
"""

from __future__ import annotations

import secrets
import socket
from collections import deque
from collections.abc import Callable, Sequence

import trio

from common import log
from common.broadcast import chunkset
from common.broadcast.briefing import Briefing, Plan, decode_plan
from common.broadcast.edge import Edge, chunk_header
from common.broadcast.hop import Hop
from common.broadcast.job import Job
from common.broadcast.node import (
    Action,
    Disconnect,
    Finished,
    Send,
    SendChunk,
    VerifySink,
    WriteChunk,
)
from common.broadcast.store import Sink, Store
from common.broadcast.topology import SOURCE
from common.broadcast.wire import HOP, Want
from common.buffers import BufferPool
from common.errors import Code, KaError
from common.framing import FrameReceiver, Kind, encode_frame
from common.greeting import accept_peers, introduce
from common.messages import Message
from common.outbox import FilePayload, Part
from common.session import Hello, Identity
from common.sockets import connect_tcp

__all__ = ["Relay"]

ROLE = "hop"
DIAL_TIMEOUT_S = 5.0
LINGER_S = 1.0
"""At the end: for the last messages to leave, and for the neighbours to hang up."""
RETRY_S = 0.1
ROUNDS_FOR_EACH = 4
"""So often the nearest ancestors that live are asked for the plan before the next one is."""
EARLY_COUNT_MAX = 4096
"""Messages kept from neighbours that knew the plan before this node did."""

_log = log.get("ka.relay")


class _Held:
    """A chunk in memory: while it is being written or sent."""

    __slots__ = ("count", "data")

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.count = 0


class _Dial:
    """A call under way, and what is to be said when it is answered."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.queue: list[tuple[Sequence[Part], Callable[[], None] | None]] = []


class Relay:
    """One node's part in one transfer."""

    def __init__(self, job: Job, rank: int) -> None:
        self.rank = rank
        self.hop: Hop | None = None
        self.sent_size = 0
        """Bytes of chunks handed to connections."""
        self._job = job
        self._topology = job.topology
        self._identity = Identity(job.transfer_id.hex(), ROLE, str(rank), secrets.token_bytes(16))
        self._briefing = Briefing()
        self._plan: Plan | None = None
        self._edges: dict[int, list[Edge]] = {}
        """By peer, the one to send on first."""
        self._dialing: dict[int, _Dial] = {}
        self._dial_count = 0
        self._dirty: dict[Edge, None] = {}
        self._early: list[tuple[int, Message]] = []
        self._store: Store | None = None
        self._sink: Sink | None = None
        self._pool = BufferPool()
        self._held: dict[int, _Held] = {}
        self._writes: deque[int] = deque()
        self._write_wanted = trio.Event()
        self._nursery: trio.Nursery | None = None
        """For connections."""
        self._work: trio.Nursery | None = None
        """For what must end before the store is closed."""
        self._finished = trio.Event()
        self._outcome: Finished | None = None
        self._error: KaError | None = None

    # ------------------------------------------------------------ what the transfer calls

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

    def know(self, plan: Plan) -> None:
        """Answer whoever asks for the plan."""
        self._plan = plan
        self._briefing.know(plan.encoded)

    async def fetch_plan(self) -> Plan:
        """Return the plan; raises KaError UNREACHABLE when no ancestor was heard for long."""
        heard_s = trio.current_time()
        reason = "none of those who could tell was reached"
        round_count = 0
        while trio.current_time() - heard_s < self._job.options.orphan_s:
            began_s = trio.current_time()
            for index, peer in enumerate(self._topology.control.ancestors(self.rank)):
                if heard_s > began_s and index > round_count // ROUNDS_FOR_EACH:
                    break  # somebody near lives, and will know in time
                try:
                    encoded = await self._briefing.fetch(await self._edge_to(peer))
                except KaError as error:
                    if error.code not in (Code.UNREACHABLE, Code.TIMEOUT):
                        raise
                    reason = str(error)
                    continue
                if encoded is None:
                    heard_s = trio.current_time()
                    continue
                plan = decode_plan(encoded, self._job.token, self._job.transfer_id)
                self.know(plan)
                return plan
            round_count += 1
            await trio.sleep(RETRY_S)
        raise KaError(Code.UNREACHABLE, f"what is to be sent could not be learnt: {reason}")

    async def run(
        self,
        store: Store,
        *,
        sink: Sink | None = None,
        have: int,
        attempt: int,
        failure: str = "",
        on_tick: Callable[[], None],
    ) -> Finished:
        """Drive the hop to its end; `serve` must be running, and the plan be known.

        *failure*: why the sink cannot be used at all; then it is not.
        """
        if failure:
            sink = None
        assert self._plan is not None
        self._store, self._sink = store, sink
        self.hop = Hop(
            self.rank,
            self._topology,
            self._plan.manifest,
            self._job.options,
            have=have,
            attempt=attempt,
        )
        async with trio.open_nursery() as nursery:
            self._work = nursery
            try:
                self._perform(self.hop.start(trio.current_time()))
                if failure:
                    self._perform(self.hop.sink_failed(failure, trio.current_time()))
                self._deliver_early()
                nursery.start_soon(self._tick, on_tick)
                if sink is not None:
                    nursery.start_soon(self._write, sink)
                await self._finished.wait()
            finally:
                if sink is not None:
                    sink.abort()  # or a thread might never come back
            nursery.cancel_scope.cancel()
        if self._error is not None:
            raise self._error
        with trio.move_on_after(LINGER_S):
            async with trio.open_nursery() as nursery:
                for edge in self._all_edges():
                    nursery.start_soon(edge.finish)
        assert self._outcome is not None
        return self._outcome

    def _deliver_early(self) -> None:
        early, self._early = self._early, []
        for peer, message in early:
            try:
                self._deliver(peer, message)
            except KaError as error:
                _log.warning("message.refused", peer=peer, reason=str(error))

    # ------------------------------------------------------------ connections

    def _all_edges(self) -> list[Edge]:
        return [edge for edges in self._edges.values() for edge in edges]

    async def _welcome(self, sock: socket.socket, hello: Hello, receiver: FrameReceiver) -> None:
        """Drive a connection that a peer has made."""
        digits = hello.name.isascii() and hello.name.isdigit() and len(hello.name) < 10
        rank = int(hello.name) if digits else -1
        known = 0 <= rank < self._topology.rank_count and rank != self.rank
        if hello.role != ROLE or not known or not hello.incarnation:
            _log.warning("hop.refused", name=hello.name, role=hello.role)
            sock.close()
            return
        edge = Edge(sock, receiver, self, peer=rank, life=hello.incarnation)
        for other in list(self._edges.get(rank, ())):
            if other.life not in (b"", edge.life):
                other.fail("it was started again")
        self._edges.setdefault(rank, []).append(edge)
        await self._drive(edge)

    async def _drive(self, edge: Edge) -> None:
        try:
            await edge.run()
        finally:
            self._drop(edge)

    def _drop(self, edge: Edge) -> None:
        edges = self._edges.get(edge.peer, [])
        if edge in edges:
            edges.remove(edge)
        if not edges:
            self._edges.pop(edge.peer, None)
        self._dirty.pop(edge, None)

    async def _edge_to(self, peer: int) -> Edge:
        """Return a connection to *peer*, made now if there is none."""
        edges = self._edges.get(peer)
        if edges:
            return edges[0]
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
            edge = Edge(sock, receiver, self, peer=peer, life=b"")
            sock = None
        finally:
            if sock is not None:
                sock.close()
        self._edges.setdefault(peer, []).insert(0, edge)
        assert self._nursery is not None
        self._nursery.start_soon(self._drive, edge)
        return edge

    async def _dial(self, peer: int, dial: _Dial) -> None:
        edge: Edge | None = None
        reason = "given up"
        with dial.scope:
            try:
                edge = await self._edge_to(peer)
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
            self._lost(peer, reason)

    def _lost(self, peer: int, reason: str) -> None:
        if self.hop is not None:
            self._perform(self.hop.neighbour_lost(peer, reason, trio.current_time()))

    # ------------------------------------------------------------ the hop's actions

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send():
                    frame = encode_frame(Kind.NOTIFY, 0, HOP.encode(action.message))
                    self._put(action.peer, (frame,))
                case SendChunk():
                    self._send_chunk(action.peer, action.chunk)
                case WriteChunk():
                    self._held[action.chunk].count += 1
                    self._writes.append(action.chunk)
                    self._write_wanted.set()
                case Disconnect():
                    self._disconnect(action.peer)
                case VerifySink():
                    assert self._work is not None
                    self._work.start_soon(self._verify, self._sink)
                case Finished():
                    self._outcome = action
                    self._finished.set()
        self._flush()

    def _flush(self) -> None:
        while self._dirty:
            self._dirty.popitem()[0].flush()

    def _put(
        self, peer: int, parts: Sequence[Part], release: Callable[[], None] | None = None
    ) -> None:
        """Queue a frame for a peer, behind what is queued already, and call it if need be."""
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

    def _send_chunk(self, peer: int, chunk: int) -> None:
        assert self._plan is not None
        assert self._store is not None
        manifest = self._plan.manifest
        size = manifest.extent(chunk)[1]
        header = chunk_header(manifest.transfer_id, chunk, size)
        self.sent_size += size
        held = self._held.get(chunk)
        if held is not None:
            held.count += 1
            self._put(peer, (header, held.data), lambda: self._let_go(held))
        elif (place := self._store.locate(chunk)) is not None:
            self._put(peer, (header, FilePayload(*place, size, _nothing)))
        else:
            assert self._work is not None
            self._work.start_soon(self._send_from_store, peer, header, chunk, size)

    async def _send_from_store(self, peer: int, header: bytes, chunk: int, size: int) -> None:
        assert self._store is not None
        try:
            data = await trio.to_thread.run_sync(self._store.read, chunk)
        except (OSError, KaError) as error:
            _log.error("chunk.unreadable", chunk=chunk, reason=str(error))
            data = b""
        # What cannot be read goes out as zeros: the receiver's check tells, and the edge goes on.
        self._put(peer, (header, data[:size].ljust(size, b"\0")))
        self._flush()

    def _let_go(self, held: _Held) -> None:
        held.count -= 1
        if not held.count:
            self._pool.give(held.data)

    def _disconnect(self, peer: int) -> None:
        dial = self._dialing.pop(peer, None)
        if dial is not None:
            dial.scope.cancel()
        for edge in list(self._edges.get(peer, ())):
            edge.close()
            self._drop(edge)

    # ------------------------------------------------------------ what edges tell (Owner)

    def chunk_begins(self, edge: Edge, chunk: int, size: int) -> memoryview:
        if self._plan is None or self.hop is None:
            raise KaError(Code.PROTOCOL, "a chunk before the plan is known")
        manifest = self._plan.manifest
        if not 0 <= chunk < manifest.chunk_count or size != manifest.extent(chunk)[1]:
            raise KaError(Code.PROTOCOL, "a chunk that does not exist", chunk=chunk, size=size)
        return self._pool.take(size)

    def chunk_came(self, edge: Edge, chunk: int, data: memoryview) -> None:
        assert self._plan is not None
        assert self.hop is not None
        intact = self._plan.manifest.verify(chunk, data)
        held = _Held(data)
        held.count = 1
        if intact and chunk not in self._held:
            self._held[chunk] = held
        actions = self.hop.chunk_received(edge.peer, chunk, intact, trio.current_time())
        self._perform(actions)
        if self._held.get(chunk) is held and not any(type(a) is WriteChunk for a in actions):
            del self._held[chunk]  # the hop has it already, or wants it no more
        self._let_go(held)

    def chunk_lost(self, data: memoryview) -> None:
        self._pool.give(data)

    def message_came(self, edge: Edge, message: Message) -> None:
        if self.hop is not None:
            self._deliver(edge.peer, message)
        elif len(self._early) < EARLY_COUNT_MAX:
            self._early.append((edge.peer, message))

    def _deliver(self, peer: int, message: Message) -> None:
        assert self.hop is not None
        self._perform(self.hop.message_received(peer, message, trio.current_time()))
        if self.rank == SOURCE and type(message) is Want and self._work is not None:
            self._work.start_soon(self._check_source, message)

    def request_came(self, edge: Edge, request_id: int, body: bytes) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._answer, edge, request_id, body)

    async def _answer(self, edge: Edge, request_id: int, body: bytes) -> None:
        try:
            edge.put(await self._briefing.answer(body, request_id))
            edge.flush()
        except KaError as error:
            edge.fail(str(error))

    def answer_came(self, edge: Edge, request_id: int, body: bytes, payload: bytes) -> None:
        self._briefing.answered(request_id, body, payload)

    def bytes_came(self, edge: Edge) -> None:
        if self.hop is not None:
            self._perform(self.hop.bytes_arrived(edge.peer, trio.current_time()))

    def bytes_left(self, edge: Edge) -> None:
        if self.hop is not None:
            self._perform(self.hop.bytes_left(edge.peer, trio.current_time()))

    def edge_broke(self, edge: Edge, reason: str) -> None:
        _log.debug("edge.broke", peer=edge.peer, reason=reason)
        self._briefing.broken()
        self._disconnect(edge.peer)
        self._lost(edge.peer, reason)

    # ------------------------------------------------------------ the sink, the source, the clock

    async def _write(self, sink: Sink) -> None:
        """Write what waits; tell the hop what is written."""
        assert self.hop is not None
        while True:
            await self._write_wanted.wait()
            self._write_wanted = trio.Event()
            batch = list(self._writes)
            self._writes.clear()
            items = [(chunk, self._held[chunk].data) for chunk in batch]
            done: list[int] = []
            reason = ""
            try:
                done = await trio.to_thread.run_sync(sink.write, items)
            except (OSError, KaError) as error:
                reason = _line(error)
            for chunk in batch:
                self._let_go(self._held.pop(chunk))
            now = trio.current_time()
            actions = [action for chunk in done for action in self.hop.sink_wrote(chunk, now)]
            if reason:
                actions += self.hop.sink_failed(reason, now)
            self._perform(actions)

    async def _verify(self, sink: Sink | None) -> None:
        assert self.hop is not None
        if sink is None:
            return  # of the empty image that cannot be written either
        try:
            bad = await trio.to_thread.run_sync(sink.verify)
        except (OSError, KaError) as error:
            self._perform(self.hop.sink_failed(_line(error), trio.current_time()))
        else:
            self._perform(self.hop.sink_verified(bad, trio.current_time()))

    async def _check_source(self, want: Want) -> None:
        """A child complains: if the source has changed since it was summed, nothing can help."""
        assert self._plan is not None
        assert self._store is not None
        manifest = self._plan.manifest
        for chunk in chunkset.indexes(chunkset.decode(want.chunks, manifest.chunk_count)):
            try:
                data = await trio.to_thread.run_sync(self._store.read, chunk)
                right = manifest.verify(chunk, data)
            except (OSError, KaError):
                right = False
            if not right:
                reason = "the source was changed, or cannot be read, while it was being sent"
                self._error = KaError(Code.EIO, reason, chunk=chunk)
                self._finished.set()

    async def _tick(self, on_tick: Callable[[], None]) -> None:
        assert self.hop is not None
        while True:
            await trio.sleep_until(self.hop.wake_s)
            for edge in self._all_edges():
                edge.poke()
            self._perform(self.hop.tick(trio.current_time()))
            on_tick()


def _nothing() -> None:
    pass


def _line(error: OSError | KaError) -> str:
    if isinstance(error, KaError):
        return str(error)
    return error.strerror or str(error)
