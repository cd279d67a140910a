"""The relay: the shell around a hop.  Events go into the hop, its actions are carried out.

`serve` takes connections for as long as the transfer lasts; `fetch_plan` asks for the plan;
`run` drives the hop until it has finished.  Actions are carried out in order; what they queue is
sent at their end.

Parts: `switchboard` (connections, each an `edge`), `depot` (chunks in memory, the sink's thread),
`briefing` (how the plan reaches everybody), `casting` (the multicast pass).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

import trio

from common import log
from common.broadcast import chunkset, group
from common.broadcast.briefing import Briefing, Plan, decode_plan
from common.broadcast.casting import Casting, Hearing
from common.broadcast.cost import piece_size
from common.broadcast.datagram import DatagramCodec
from common.broadcast.depot import Depot, reason_of
from common.broadcast.edge import Edge
from common.broadcast.hop import Hop
from common.broadcast.job import Job
from common.broadcast.node import (
    Action,
    BreakOff,
    Disconnect,
    Finished,
    Send,
    SendChunk,
    SendPast,
    VerifySink,
    WriteChunk,
)
from common.broadcast.store import Sink, Store
from common.broadcast.switchboard import Switchboard
from common.broadcast.topology import SOURCE
from common.broadcast.topology import Kind as ShapeKind
from common.broadcast.wire import HOP, Nack, Want
from common.errors import Code, KaError
from common.framing import Kind, encode_frame
from common.messages import Message

__all__ = ["Relay"]

LINGER_S = 1.0
"""At the end: for the last messages to leave, and for the neighbours to hang up."""
RETRY_S = 0.1
ROUNDS_FOR_EACH = 4
"""So often the nearest ancestors that live are asked for the plan before the next one is."""
EARLY_COUNT_MAX = 4096
"""Messages kept from neighbours that knew the plan before this node did."""

_log = log.get("ka.relay")


class Relay:
    """One node's part in one transfer."""

    def __init__(self, job: Job, rank: int) -> None:
        self.rank = rank
        self.hop: Hop | None = None
        self.depot: Depot | None = None
        self._job = job
        self._topology = job.topology
        self._cast: Casting | Hearing | None = None
        self._board = Switchboard(job, rank, self, self._lost)
        self._briefing = Briefing()
        self._plan: Plan | None = None
        self._piece_size = 0
        self._early: list[tuple[int, Message]] = []
        self._serving: trio.Nursery | None = None
        self._work: trio.Nursery | None = None
        """For what must end before the store is closed."""
        self._sink: Sink | None = None
        self._finished = trio.Event()
        self._is_checking = False
        """The source reads again what a child complains about."""
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
        async with trio.open_nursery() as nursery:
            self._serving = nursery
            await self._board.serve(sockets, task_status=task_status)

    def know(self, plan: Plan) -> None:
        """Answer whoever asks for the plan."""
        self._plan = plan
        depth = max(tree.depth for tree in self._topology.trees)
        self._piece_size = piece_size(depth, plan.manifest.size, self._job.options.expected_rate)
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
                    encoded = await self._briefing.fetch(await self._board.edge_to(peer))
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
        assert self._plan is not None
        manifest = self._plan.manifest
        self._sink = None if failure else sink
        passing = self._topology.kind is ShapeKind.MULTICAST
        hop = Hop(
            self.rank,
            self._topology,
            manifest,
            self._job.options,
            have=have,
            attempt=attempt,
            passing=passing,
        )
        sock = await trio.to_thread.run_sync(self._open_group) if passing else None
        async with trio.open_nursery() as nursery:
            self._work = nursery
            self.depot = Depot(manifest, store, self._sink, self._board, nursery)
            self.hop = hop
            try:
                if passing:
                    self._cast = self._make_cast(sock, store, hop, self.depot)
                    nursery.start_soon(self._cast.run)
                self._perform(hop.start(trio.current_time()))
                if failure:
                    self._perform(hop.sink_failed(failure, trio.current_time()))
                self._deliver_early()
                nursery.start_soon(self._tick, on_tick)
                if self._sink is not None:
                    nursery.start_soon(self.depot.run, self._thread_wrote)
                await self._finished.wait()
                on_tick()  # how far it came at last: it may have ended before the first tick
            finally:
                if self._sink is not None:
                    self._sink.abort()  # or a thread might never come back
            nursery.cancel_scope.cancel()
        self._work = None
        if self._error is not None:
            raise self._error
        with trio.move_on_after(LINGER_S):
            await self._board.finish()
        assert self._outcome is not None
        return self._outcome

    def _open_group(self) -> socket.socket | None:
        """Return the socket of the multicast pass; None: this node takes no part in it."""
        job = self._job
        try:
            if self.rank == SOURCE:
                return group.open_sender(job.transfer_id, job.addresses[1])
            return group.open_listener(job.transfer_id, job.addresses[SOURCE])
        except KaError as error:
            _log.warning("multicast.impossible", reason=str(error))
        return None

    def _make_cast(
        self, sock: socket.socket | None, store: Store, hop: Hop, depot: Depot
    ) -> Casting | Hearing:
        assert self._plan is not None
        manifest, perform = self._plan.manifest, self._perform
        codec = DatagramCodec(manifest.transfer_id, self._job.token)
        if self.rank != SOURCE:
            return Hearing(sock, codec, manifest, hop, depot, perform)
        return Casting(sock, codec, manifest, store, hop, depot, perform)

    # ------------------------------------------------------------ the hop's actions

    def _perform(self, actions: list[Action]) -> None:
        self._carry_out(actions)
        self._written()
        self._board.flush()

    def _carry_out(self, actions: list[Action]) -> None:
        assert self.depot is not None
        for action in actions:
            match action:
                case Send():
                    frame = encode_frame(Kind.NOTIFY, 0, HOP.encode(action.message))
                    self._board.put(action.peer, (frame,))
                case SendPast():
                    frame = encode_frame(Kind.NOTIFY, 0, HOP.encode(action.message))
                    self._board.put_past(action.peer, (frame,))
                case SendChunk():
                    self.depot.send(action.peer, action.chunk)
                case WriteChunk():
                    self.depot.write(action.chunk)
                case BreakOff():
                    self.depot.break_off(action.peer, action.chunk)
                case Disconnect():
                    self._board.disconnect(action.peer)
                case VerifySink():
                    assert self._work is not None
                    self._work.start_soon(self._verify)
                case Finished():
                    self._outcome = action
                    self._finished.set()

    def _lost(self, peer: int, reason: str) -> None:
        if self.hop is not None:
            self._perform(self.hop.neighbour_lost(peer, reason, trio.current_time()))

    # ------------------------------------------------------------ what edges tell (Owner)

    def chunk_begins(self, edge: Edge, chunk: int, size: int) -> memoryview:
        if self._plan is None or self.depot is None:
            raise KaError(Code.PROTOCOL, "a chunk before the plan is known")
        manifest = self._plan.manifest
        if not 0 <= chunk < manifest.chunk_count or size != manifest.extent(chunk)[1]:
            raise KaError(Code.PROTOCOL, "a chunk that does not exist", chunk=chunk, size=size)
        edge.piece_size = self._piece_size
        return self.depot.lend(size)

    def chunk_came(self, edge: Edge, chunk: int, data: memoryview) -> None:
        assert self.depot is not None
        assert self.hop is not None
        now = trio.current_time()
        if not self.hop.node.have >> chunk & 1:
            self.depot.came(chunk, data, len(data), now)
        intact, looked_at = self.depot.hold(chunk, data)
        try:
            self._perform(self.hop.chunk_received(edge.peer, chunk, intact, now))
        finally:
            looked_at()

    def chunk_lost(self, chunk: int, data: memoryview) -> None:
        assert self.depot is not None
        assert self.hop is not None
        self.depot.give_back(chunk, data)
        self._carry_out(self.hop.chunk_broke_off(chunk))

    def message_came(self, edge: Edge, message: Message) -> None:
        if self.hop is not None:
            self._deliver(edge.peer, message)
        elif len(self._early) < EARLY_COUNT_MAX:
            self._early.append((edge.peer, message))

    def request_came(self, edge: Edge, request_id: int, body: bytes) -> None:
        assert self._serving is not None
        self._serving.start_soon(self._answer, edge, request_id, body)

    def answer_came(self, edge: Edge, request_id: int, body: bytes, payload: bytes) -> None:
        self._briefing.answered(request_id, body, payload)

    def bytes_came(self, edge: Edge, chunk: int, data: memoryview, size: int) -> None:
        assert self.depot is not None
        assert self.hop is not None
        now = trio.current_time()
        has = self.hop.node.have >> chunk & 1
        if not has and self.depot.came(chunk, data, size, now):
            self._perform(self.hop.chunk_begins(edge.peer, chunk, now))
        else:
            self._board.flush()

    def bytes_heard(self, edge: Edge) -> None:
        if self.hop is not None:
            self._perform(self.hop.bytes_arrived(edge.peer, trio.current_time()))

    def bytes_left(self, edge: Edge) -> None:
        if self.hop is not None:
            self._perform(self.hop.bytes_left(edge.peer, trio.current_time()))

    def edge_broke(self, edge: Edge, reason: str) -> None:
        _log.debug("edge.broke", peer=edge.peer, reason=reason)
        self._briefing.broken()
        self._board.drop(edge)
        self._lost(edge.peer, reason)

    def _deliver(self, peer: int, message: Message) -> None:
        assert self.hop is not None
        self._perform(self.hop.message_received(peer, message, trio.current_time()))
        if type(message) is Nack and self._cast is not None:
            self._cast.nack_received(message)
        complaint = self.rank == SOURCE and type(message) is Want
        if complaint and self._work is not None and not self._is_checking:
            self._is_checking = True  # who goes on complaining is heard later
            self._work.start_soon(self._check_source, message)

    def _deliver_early(self) -> None:
        early, self._early = self._early, []
        for peer, message in early:
            try:
                self._deliver(peer, message)
            except KaError as error:
                _log.warning("message.refused", peer=peer, reason=str(error))

    async def _answer(self, edge: Edge, request_id: int, body: bytes) -> None:
        try:
            edge.put(await self._briefing.answer(body, request_id))
            edge.flush()
        except KaError as error:
            edge.fail(str(error))

    # ------------------------------------------------------------ the sink, the source, the clock

    def _written(self) -> None:
        """Tell the hop what the sink has taken, until there is no more news."""
        assert self.hop is not None
        assert self.depot is not None
        while True:
            chunks, failure = self.depot.take_written()
            if not chunks and not failure:
                return
            now = trio.current_time()
            actions = [action for chunk in chunks for action in self.hop.sink_wrote(chunk, now)]
            if failure:
                actions += self.hop.sink_failed(failure, now)
            self._carry_out(actions)

    def _thread_wrote(self) -> None:
        self._written()
        self._board.flush()

    async def _verify(self) -> None:
        assert self.hop is not None
        if self._sink is None:
            return  # it has failed already, and there was nothing to receive
        try:
            bad = await trio.to_thread.run_sync(self._sink.verify)
        except (OSError, KaError) as error:
            self._perform(self.hop.sink_failed(reason_of(error), trio.current_time()))
        else:
            self._perform(self.hop.sink_verified(bad, trio.current_time()))

    async def _check_source(self, want: Want) -> None:
        """A child complains: if the source has changed since it was summed, nothing can help."""
        assert self._plan is not None
        assert self.depot is not None
        manifest = self._plan.manifest
        for chunk in chunkset.indexes(chunkset.decode(want.chunks, manifest.chunk_count)):
            if not await self.depot.is_right(chunk):
                reason = "the source was changed, or cannot be read, while it was being sent"
                self._error = KaError(Code.EIO, reason, chunk=chunk)
                self._finished.set()
                return
        self._is_checking = False

    async def _tick(self, on_tick: Callable[[], None]) -> None:
        assert self.depot is not None
        assert self.hop is not None
        while True:
            await trio.sleep_until(self.hop.wake_s)
            self._board.poke()
            for chunk in self.depot.paused():
                self._carry_out(self.hop.chunk_broke_off(chunk))
            self._perform(self.hop.tick(trio.current_time()))
            on_tick()
