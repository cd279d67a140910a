"""A simulator for broadcasts: hops by the thousand, in virtual time, from one event heap.  Pure.

It plays the shell and the machines: links with a rate and a latency, connections that are ordered
and break, sinks with a speed, processes that die, pause and come back.  A chunk is one event, not
its bytes.  Everything random comes from the rng: one seed, one run.

Checked: *safety*, no node says "verified" while its sink holds a wrong or missing chunk; then,
faults being over, *liveness*: the source ends the transfer, and every healthy node is among the
verified, unless it was given a deadline.  A breach raises `Breach`.

Links: a sender's connections take turns, a chunk each, at its rate; chunks come in one after the
other at the receiver's rate.  A slow receiver does not block its sender's other connections.
A node passes on what it does not have all of: the last byte leaves it a piece later.
What leaves a rack takes its turn on the uplink of that rack and of the other.
Messages take the latency, and stay behind what was sent before them.  A cut delays what is under
way until it is healed, as TCP would, if the connection lives that long.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from common.broadcast import chunkset
from common.broadcast.cost import piece_size
from common.broadcast.hop import Hop
from common.broadcast.machines import AS_IT_CAME, RIGHT, WRONG, Item, Link, Machine
from common.broadcast.manifest import Algorithm, Manifest
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
from common.broadcast.outcome import Summary, Verdict
from common.broadcast.scenario import Fault, FaultKind, Rng, Scenario
from common.broadcast.topology import SOURCE, build
from common.messages import Message

__all__ = ["Breach", "Outcome", "Simulation"]

SLOW_SHARE = 0.05
LIMIT_S = 400.0
"""Virtual time after which a run that has not ended has lost its liveness."""


class Breach(AssertionError):
    """Safety or liveness was broken."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to."""

    summary: Summary
    seconds: float
    """Until the last healthy node had verified."""
    ended_s: float
    """When the last node had ended; not before the scenario is calm."""
    chunks_sent: int
    duplicate_count: int
    damaged_count: int
    crossing_count: int
    """Chunks that went from one rack to another."""
    event_count: int
    longest_stall_s: float
    """The longest that a healthy node had to wait for its next chunk, the first one apart."""
    finished_s: dict[int, float]
    """By rank: when it had verified."""
    fed_counts: dict[int, int]
    """By healthy rank: how many healthy ones it fed at the end, all data trees together, without
    those at the end of a tree."""


class Simulation:
    """One run of one scenario."""

    def __init__(
        self, scenario: Scenario, rng: Rng, *, have: Mapping[int, int] | None = None
    ) -> None:
        """*have*: by rank, the chunks that its sink holds beforehand."""
        have = have or {}
        self.scenario = scenario
        self.now = 0.0
        self.event_count = 0
        self.chunks_sent = 0
        self.crossing_count = 0
        self.trace: Callable[[float, int, Action], None] | None = None
        self._rng = rng
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._topology = build(scenario.shape)
        size = scenario.chunk_count * scenario.chunk_size
        sums = bytes(8 * scenario.chunk_count)
        depth = max(tree.depth for tree in self._topology.trees)
        self._piece_size = piece_size(depth, size, scenario.link_rate)
        self._manifest = Manifest(
            bytes(16), "simulated", size, scenario.chunk_size, Algorithm.XXH3, sums
        )
        self._links: dict[tuple[int, int], Link] = {}
        self._uplinks_s: dict[tuple[int, bool], float] = {}
        """By rack, and whether outwards: when the uplink is free."""
        self._neighbours: list[set[int]] = [set() for _ in range(self._topology.rank_count)]
        self._summary: Summary | None = None
        self._machines = [
            Machine(
                Hop(
                    rank,
                    self._topology,
                    self._manifest,
                    scenario.options,
                    have=have.get(rank, 0),
                ),
                scenario.chunk_count,
                scenario.link_rate,
                scenario.disk_rate,
            )
            for rank in range(self._topology.rank_count)
        ]
        for rank, chunks in have.items():
            for chunk in chunkset.indexes(chunks):
                self._machines[rank].sink[chunk] = RIGHT

    def run(self) -> Outcome:
        """Run to the end; raises Breach."""
        for fault in self.scenario.faults:
            self._at(fault.at_s, self._begin, fault)
        self._machines[SOURCE].sink[:] = bytes([RIGHT]) * self.scenario.chunk_count
        for rank in range(len(self._machines)):
            self._at(0.0, self._start, rank, 0)
        while self._heap and not self._is_over():
            self.now, _, call, arguments = heapq.heappop(self._heap)
            if self.now > LIMIT_S:
                break
            call(*arguments)
        return self._judge()

    # ------------------------------------------------------------ events

    def _at(self, time_s: float, call: Callable[..., None], *arguments: Any) -> None:
        self.event_count += 1
        heapq.heappush(self._heap, (time_s, self.event_count, call, arguments))

    def _start(self, rank: int, life: int) -> None:
        self._on(rank, life, lambda hop: hop.start(self.now))
        self._tick(rank, life)

    def _tick(self, rank: int, life: int) -> None:
        machine = self._machines[rank]
        if machine.life != life or not machine.alive or machine.hop.finished:
            return
        if not machine.paused:
            for peer in {*machine.outgoing, *machine.under_way}:
                self._note_bytes(rank, peer)
            self._do(rank, machine.hop.tick(self.now))
        self._at(max(machine.hop.wake_s, self.now + 0.01), self._tick, rank, life)

    def _note_bytes(self, rank: int, peer: int) -> None:
        """Tell both ends of chunks that are on their way or have their turn soon."""
        link = self._link(rank, peer)
        sender, receiver = self._machines[rank], self._machines[peer]
        if sender.under_way.get(peer, 0.0) < self.now:
            sender.under_way.pop(peer, None)
            if peer not in sender.outgoing:
                return
        if link.cut or not receiver.alive:
            return
        self._on(rank, sender.life, lambda hop: hop.bytes_left(peer, self.now))
        self._on(peer, receiver.life, lambda hop: hop.bytes_arrived(rank, self.now))

    def _on(self, rank: int, life: int, event: Callable[[Hop], list[Action]]) -> None:
        """Let a process see an event, now or when it runs again."""
        machine = self._machines[rank]
        if machine.life != life or not machine.alive:
            return
        if machine.paused:
            machine.waiting.append(lambda: self._on(rank, life, event))
            return
        before = machine.hop.verdict
        self._do(rank, event(machine.hop))
        if before is not machine.hop.verdict is Verdict.VERIFIED:
            machine.verified_s = self.now
            if any(state != RIGHT for state in machine.sink):
                raise Breach(f"rank {rank} says verified, and has wrong bytes, at {self.now:.3f} s")

    # ------------------------------------------------------------ actions

    def _do(self, rank: int, actions: list[Action]) -> None:
        for action in actions:
            if self.trace is not None:
                self.trace(self.now, rank, action)
            match action:
                case SendChunk():
                    self._send_chunk(rank, action.peer, action.chunk)
                case Send():
                    self._send(rank, action.peer, action.message)
                case SendPast():
                    self._disconnect(rank, action.peer, action.message)
                case WriteChunk():
                    self._write(rank, action.chunk)
                case BreakOff():
                    self._break_off(rank, action.peer, action.chunk)
                case Disconnect():
                    self._disconnect(rank, action.peer)
                case VerifySink():
                    self._verify(rank)
                case Finished():
                    if rank == SOURCE:
                        self._summary = action.summary

    def _send(self, rank: int, peer: int, message: Message) -> None:
        assert peer != rank, message
        self._queue(rank, peer, Item(self.now + self.scenario.latency_s, message))

    def _queue(self, rank: int, peer: int, item: Item) -> None:
        link = self._link(rank, peer)
        queue = link.queues.setdefault((peer, link.generation), deque())
        queue.append(item)
        if len(queue) == 1:
            self._at(self._ready_s(rank, item), self._deliver, rank, peer, link.generation)

    def _ready_s(self, rank: int, item: Item) -> float:
        """Return when something is there; what its sender has not all of comes a piece later."""
        sender = self._machines[rank]
        if item.state != AS_IT_CAME or sender.hop.node.have >> item.chunk & 1:
            return item.ready_s
        piece_s = min(self._piece_size, self.scenario.chunk_size) / sender.rate
        came_s = sender.coming_s.get(item.chunk, 0.0)
        return max(item.ready_s, came_s + piece_s + self.scenario.latency_s)

    def _deliver(self, rank: int, peer: int, generation: int) -> None:
        """Let come what is there by now."""
        queues = self._link(rank, peer).queues
        while queue := queues.get((peer, generation)):
            ready_s = self._ready_s(rank, queue[0])
            if ready_s > self.now:
                self._at(ready_s, self._deliver, rank, peer, generation)
                return
            item = queue.popleft()
            if not queue:
                del queues[peer, generation]
            self._arrive(rank, peer, generation, item.message, item.chunk, item.state)

    def _send_chunk(self, rank: int, peer: int, chunk: int) -> None:
        self.chunks_sent += 1
        sender = self._machines[rank]
        sender.outgoing.setdefault(peer, deque()).append(chunk)
        if not sender.sending:
            self._send_next(rank, sender.life)

    def _send_next(self, rank: int, life: int) -> None:
        """Put the next chunk on the link; the connection that had a turn goes to the end."""
        sender = self._machines[rank]
        if sender.life != life or not sender.alive:
            return
        sender.sending = bool(sender.outgoing)
        if not sender.sending:
            return
        peer = next(iter(sender.outgoing))
        chunks = sender.outgoing.pop(peer)
        chunk = chunks.popleft()
        if chunks:
            sender.outgoing[peer] = chunks
        receiver = self._machines[peer]
        passed_on = not sender.hop.node.have >> chunk & 1
        took_s = self.scenario.chunk_size / sender.rate
        came_s = max(self.now, receiver.came_s) + self.scenario.chunk_size / receiver.rate
        receiver.came_s = came_s
        link = self._link(rank, peer)
        crossed_s = self._cross(rank, peer)
        arrival_s = max(self.now + took_s, came_s, crossed_s) + self.scenario.latency_s
        state = sender.sink[chunk] or RIGHT  # from memory, if it is not written yet
        if passed_on:
            state = AS_IT_CAME
        damaged = self._rng.random() < self.scenario.damaged_share
        if damaged or (peer, chunk) in sender.broken_off:
            state = WRONG
        sender.broken_off.discard((peer, chunk))
        item = Item(arrival_s, None, chunk, state)
        begins_s = max(self.now + self.scenario.latency_s, sender.under_way.get(peer, 0.0))
        arrival_s = sender.under_way[peer] = max(self._ready_s(rank, item), begins_s)
        self._at(begins_s, self._begins, rank, peer, link.generation, chunk, arrival_s)
        self._queue(rank, peer, item)
        self._at(self.now + took_s, self._send_next, rank, life)

    def _cross(self, rank: int, peer: int) -> float:
        """Take a chunk's turn on the uplinks between two racks; return when it is over."""
        racks = self._topology.rack_of[rank], self._topology.rack_of[peer]
        if racks[0] == racks[1]:
            return self.now
        self.crossing_count += 1
        if not self.scenario.uplink_rate:
            return self.now
        ends = (racks[0], True), (racks[1], False)
        free_s = max(self.now, *(self._uplinks_s.get(end, 0.0) for end in ends))
        free_s += self.scenario.chunk_size / self.scenario.uplink_rate
        self._uplinks_s.update(dict.fromkeys(ends, free_s))
        return free_s

    def _begins(self, rank: int, peer: int, generation: int, chunk: int, arrival_s: float) -> None:
        """The first bytes of a chunk reach *peer*'s machine; the last ones are expected."""
        link, receiver = self._link(rank, peer), self._machines[peer]
        if link.generation != generation or link.cut or receiver.paused:
            return
        receiver.coming_s[chunk] = arrival_s
        self._on(peer, receiver.life, lambda hop: hop.chunk_begins(rank, chunk, self.now))

    def _arrive(
        self, rank: int, peer: int, generation: int, message: Message, chunk: int, state: int
    ) -> None:
        """Something from *rank* reaches *peer*'s machine."""
        link = self._link(rank, peer)
        late = link.generation != generation or link.cut
        if late and chunk >= 0:
            life = self._machines[peer].life
            self._on(peer, life, lambda hop: hop.chunk_broke_off(chunk))
        if link.generation != generation:
            return
        if link.cut:
            link.held.append(lambda: self._arrive(rank, peer, generation, message, chunk, state))
            return
        receiver = self._machines[peer]
        if not receiver.alive:
            if receiver.waiting is not _POWERED_OFF:
                link.generation += 1
                self._tell_lost(rank, peer, "connection refused", 2 * self.scenario.latency_s)
            return
        if chunk < 0:
            self._on(peer, receiver.life, lambda hop: hop.message_received(rank, message, self.now))
            return
        if state == AS_IT_CAME:
            state = RIGHT if self._machines[rank].hop.node.have >> chunk & 1 else WRONG
        if state == RIGHT and not receiver.hop.node.have >> chunk & 1:
            if not receiver.paused and receiver.gained_s >= 0:
                receiver.stall_s = max(receiver.stall_s, self.now - receiver.gained_s)
            receiver.gained_s = self.now
        intact = state == RIGHT
        self._on(peer, receiver.life, lambda hop: hop.chunk_received(rank, chunk, intact, self.now))
        self._complete(peer, chunk)

    def _complete(self, rank: int, chunk: int) -> None:
        """Nobody need wait any longer for the rest of a chunk that another has brought first."""
        machine = self._machines[rank]
        soon_s = self.now + min(self._piece_size, self.scenario.chunk_size) / machine.rate
        for peer in machine.hop.downs[chunk % len(self._topology.trees)].children:
            link = self._link(rank, peer)
            queue = link.queues.get((peer, link.generation))
            if queue and queue[0].chunk == chunk and machine.under_way.get(peer, 0.0) > soon_s:
                machine.under_way[peer] = ready_s = max(soon_s, queue[0].ready_s)
                self._at(ready_s, self._deliver, rank, peer, link.generation)

    def _break_off(self, rank: int, peer: int, chunk: int) -> None:
        """Fill up what has left of a chunk, or will leave of it."""
        sender, link = self._machines[rank], self._link(rank, peer)
        if chunk in sender.outgoing.get(peer, ()):
            sender.broken_off.add((peer, chunk))
            return
        queue = link.queues.get((peer, link.generation), deque())
        for at, item in enumerate(queue):
            if item.chunk == chunk and item.state == AS_IT_CAME:
                filled_s = self.now + self.scenario.chunk_size / sender.rate
                ready_s = min(self._ready_s(rank, item), filled_s + self.scenario.latency_s)
                queue[at] = item._replace(ready_s=ready_s, state=WRONG)
                sender.under_way[peer] = min(sender.under_way.get(peer, ready_s), ready_s)
                if at == 0:
                    self._at(ready_s, self._deliver, rank, peer, link.generation)

    def _tell_lost(self, rank: int, peer: int, reason: str, after_s: float) -> None:
        life = self._machines[rank].life

        def tell() -> None:
            self._on(rank, life, lambda hop: hop.neighbour_lost(peer, reason, self.now))

        self._at(self.now + after_s, tell)

    def _disconnect(self, rank: int, peer: int, last: Message | None = None) -> None:
        """End a connection; *last* comes by a new one before the peer notices."""
        link = self._link(rank, peer)
        link.generation += 1
        link.held.clear()
        for one, other in ((rank, peer), (peer, rank)):
            self._machines[one].outgoing.pop(other, None)
            self._machines[one].under_way.pop(other, None)
            marks = self._machines[one].broken_off
            marks.difference_update([mark for mark in marks if mark[0] == other])
        if last is not None:
            self._send(rank, peer, last)
        if self._machines[peer].alive and not link.cut:
            self._tell_lost(peer, rank, "connection reset", self.scenario.latency_s)

    def _link(self, rank: int, peer: int) -> Link:
        key = (rank, peer) if rank < peer else (peer, rank)
        link = self._links.get(key)
        if link is None:
            link = self._links[key] = Link()
            self._neighbours[rank].add(peer)
            self._neighbours[peer].add(rank)
        return link

    # ------------------------------------------------------------ sinks

    def _write(self, rank: int, chunk: int) -> None:
        machine = self._machines[rank]
        if machine.sink_hangs:
            machine.blocked.append(lambda: self._write(rank, chunk))
            return
        begin_s = max(self.now, machine.written_s)
        machine.written_s = begin_s + self.scenario.chunk_size / machine.disk_rate
        spoilt = self._rng.random() < self.scenario.spoilt_share
        state = WRONG if spoilt else RIGHT
        self._at(machine.written_s, self._wrote, rank, machine.life, chunk, state)

    def _wrote(self, rank: int, life: int, chunk: int, state: int) -> None:
        machine = self._machines[rank]
        if machine.life != life or not machine.alive:
            return
        if machine.sink_full:
            self._on(rank, life, lambda hop: hop.sink_failed("no space left", self.now))
            return
        machine.sink[chunk] = state
        self._on(rank, life, lambda hop: hop.sink_wrote(chunk, self.now))

    def _verify(self, rank: int) -> None:
        machine = self._machines[rank]
        life = machine.life
        seconds = len(machine.sink) * self.scenario.chunk_size / machine.disk_rate

        def verified() -> None:
            bad = [chunk for chunk, state in enumerate(machine.sink) if state != RIGHT]
            self._on(rank, life, lambda hop: hop.sink_verified(bad, self.now))

        self._at(self.now + seconds / 4, verified)

    # ------------------------------------------------------------ faults

    def _begin(self, fault: Fault) -> None:
        machine = self._machines[fault.rank]
        match fault.kind:
            case FaultKind.KILL | FaultKind.POWER_OFF:
                self._crash(fault)
            case FaultKind.PAUSE:
                machine.paused = True
            case FaultKind.CUT:
                if fault.other != fault.rank:
                    self._link(fault.rank, fault.other).cut = True
            case FaultKind.SLOW:
                machine.rate = self.scenario.link_rate * SLOW_SHARE
            case FaultKind.SINK_FULL:
                machine.sink_full = True
            case FaultKind.SINK_HANGS:
                machine.sink_hangs = True
        if fault.until_s:
            self._at(fault.until_s, self._heal, fault)

    def _heal(self, fault: Fault) -> None:
        machine = self._machines[fault.rank]
        match fault.kind:
            case FaultKind.KILL | FaultKind.POWER_OFF:
                self._restart(fault.rank)
            case FaultKind.PAUSE:
                machine.paused = False
                waiting, machine.waiting = machine.waiting, []
                for call in waiting:
                    call()
            case FaultKind.CUT if fault.other != fault.rank:
                link = self._link(fault.rank, fault.other)
                link.cut = False
                held, link.held = link.held, []
                for call in held:
                    call()
            case FaultKind.SINK_HANGS:
                machine.sink_hangs = False
                blocked, machine.blocked = machine.blocked, []
                for call in blocked:
                    call()
            case _:
                pass

    def _crash(self, fault: Fault) -> None:
        machine = self._machines[fault.rank]
        if not machine.alive:
            return
        machine.alive = False
        machine.waiting = _POWERED_OFF if fault.kind is FaultKind.POWER_OFF else []
        machine.blocked = []
        machine.outgoing.clear()
        machine.under_way.clear()
        machine.sending = False
        for peer in self._neighbours[fault.rank]:
            link = self._link(fault.rank, peer)
            link.generation += 1
            link.held.clear()
            if fault.kind is FaultKind.KILL and not link.cut:
                self._tell_lost(peer, fault.rank, "connection reset", self.scenario.latency_s)

    def _restart(self, rank: int) -> None:
        """Start a new process, which finds what the old one has written."""
        machine = self._machines[rank]
        if machine.alive:
            return
        machine.life += 1
        machine.alive, machine.paused, machine.waiting = True, False, []
        have = chunkset.from_indexes(
            chunk for chunk, state in enumerate(machine.sink) if state == RIGHT
        )
        machine.gained_s = -1.0
        machine.verified_s = -1.0
        machine.hop = Hop(
            rank,
            self._topology,
            self._manifest,
            self.scenario.options,
            have=have,
            attempt=1000 * machine.life,
        )
        self._start(rank, machine.life)

    # ------------------------------------------------------------ the verdict

    def _is_over(self) -> bool:
        if self._summary is None or self.now < self.scenario.calm_s:
            return False
        return all(one.hop.finished or not one.alive for one in self._machines)

    def _judge(self) -> Outcome:
        summary = self._summary
        if summary is None:
            raise Breach(f"the source has not ended the transfer by {self.now:.1f} s")
        faulted = {fault.rank for fault in self.scenario.faults}
        receivers = list(enumerate(self._machines))[1:]
        for rank, machine in receivers:
            said = summary.verified >> rank & 1
            if said and any(state != RIGHT for state in machine.sink):
                raise Breach(f"rank {rank} is among the verified, and has wrong bytes")
            may_miss = machine.sink_full or self.scenario.options.deadline_s
            if machine.alive and not may_miss and not said:
                raise Breach(f"rank {rank} is healthy, and {summary.others[rank]}")
        healthy = [machine for rank, machine in receivers if rank not in faulted]
        return Outcome(
            summary=summary,
            seconds=max((machine.verified_s for machine in healthy), default=0.0),
            ended_s=self.now,
            chunks_sent=self.chunks_sent,
            duplicate_count=sum(machine.hop.duplicate_count for machine in self._machines),
            damaged_count=sum(machine.hop.damaged_count for machine in self._machines),
            crossing_count=self.crossing_count,
            event_count=self.event_count,
            longest_stall_s=max((machine.stall_s for machine in healthy), default=0.0),
            finished_s={
                rank: machine.verified_s for rank, machine in receivers if machine.verified_s >= 0
            },
            fed_counts={
                rank: sum(
                    not child.demoted and peer not in faulted
                    for down in machine.hop.downs[:-1]
                    for peer, child in down.children.items()
                )
                for rank, machine in enumerate(self._machines)
                if rank not in faulted
            },
        )


_POWERED_OFF: list[Callable[[], None]] = []
"""Marks a machine that is gone without a word (by identity)."""
