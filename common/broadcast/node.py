"""What the parts of one hop share: who it is, what it has, what it wants done.  Sans-I/O.

`Node` is state and small rules; the parts that decide are `upstream` (who feeds this node),
`downstream` (whom it feeds) and `hop` (chunks, the sink, the end).  Actions are appended here by
all of them; the shell carries them out in order.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from common.broadcast import chunkset
from common.broadcast.outcome import Ledger, Summary
from common.broadcast.topology import SOURCE, Topology, Tree
from common.broadcast.wire import Ack
from common.errors import Code, KaError
from common.messages import Message

__all__ = [
    "END",
    "Action",
    "BreakOff",
    "Disconnect",
    "Finished",
    "HopOptions",
    "Node",
    "Send",
    "SendChunk",
    "SendPast",
    "VerifySink",
    "WriteChunk",
]


END = -1
"""The place behind all others in a tree, of those that feed nobody there: anybody may feed them."""


class Send(NamedTuple):
    """Send a message, on a connection that is made now if there is none."""

    peer: int
    message: Message


class SendChunk(NamedTuple):
    """Send a `Chunk` message with the chunk as its payload, from memory or read from the sink.

    Of a chunk that is still coming what there is, and the rest as it comes.
    """

    peer: int
    chunk: int


class SendPast(NamedTuple):
    """Send a message ahead of all that is under way to a peer, which is taken back."""

    peer: int
    message: Message


class BreakOff(NamedTuple):
    """Let a peer wait no longer for the rest of a chunk that this node has not all of itself.

    What is sent behind it gets through; the chunk will be found damaged.
    """

    peer: int
    chunk: int


class Disconnect(NamedTuple):
    """Close the connection and forget what is under way on it."""

    peer: int
    reason: str


class WriteChunk(NamedTuple):
    """Hand the chunk that has just come to the sink; then call `sink_wrote`."""

    chunk: int


class VerifySink(NamedTuple):
    """Flush the sink, read it back, compare every sum; then call `sink_verified`."""


class Finished(NamedTuple):
    """The transfer is over for this hop.

    At the source the summary is of all nodes, elsewhere of this one; `complaint` says why the
    hop ends without having been told by the source.
    """

    summary: Summary
    complaint: str


Action = Send | SendPast | SendChunk | BreakOff | Disconnect | WriteChunk | VerifySink | Finished


@dataclass(frozen=True, slots=True)
class HopOptions:
    """Times in seconds, rates in bytes a second, 0 for "no limit"."""

    window_count: int = 8
    """Chunks sent to a child and not acknowledged; also what a node holds that is not written."""
    tick_s: float = 0.05
    """How often a hop looks at its clocks."""
    alive_s: float = 0.25
    """Said at least this often to each neighbour."""
    silence_s: float = 0.8
    """A neighbour that says nothing for this long is lost; with a tick less than a second."""
    attach_s: float = 0.4
    """A living node answers an `Attach` well within this."""
    stall_s: float = 0.9
    """A neighbour that talks, but makes no progress for this long, is not relied on."""
    slow_s: float = 1.0
    """Rates are compared over this time."""
    slow_fraction: float = 0.5
    """A relay slower than this part of what its place needs is made a leaf."""
    join_s: float = 1.0
    """From the start, or from an `Adopt`, until a child must have attached."""
    avoid_s: float = 5.0
    """For this long a parent that was left is not asked again, if there is another."""
    spare_child_count: int = 2
    """Orphans that a node takes on beyond its planned children before it sends them elsewhere."""
    move_count_max: int = 3
    """How often a node leaves a parent that lives because it is slow."""
    expected_rate: float = 0.0
    """Of the plan; tells the source that its only child is slow, when it has none to compare."""
    expected_uplink_rate: float = 0.0
    """Of the plan; without it nobody in another rack is found slow: it may be the uplink."""
    rate_limit: float = 0.0
    """Of what a node sends."""
    verify_count_max: int = 3
    """Times that the sink is read back before it is given up."""
    lost_grace_s: float = 2.0
    """How long the source waits for lost nodes to come back when all others are done."""
    late_grace_s: float = 0.0
    """And how much longer for those that have never joined: they may be summing what they hold."""
    quiet_s: float = 10.0
    """The source ends the transfer when for this long nobody has made progress."""
    deadline_s: float = 0.0
    """The source ends the transfer then, whatever happens."""
    orphan_s: float = 60.0
    """A node that has no control parent for this long ends by itself."""

    def __post_init__(self) -> None:
        if self.window_count < 1 or min(self.tick_s, self.alive_s, self.attach_s) <= 0:
            raise KaError(Code.USAGE, "windows and intervals must be positive")
        if not 2 * self.alive_s < self.silence_s <= self.stall_s or self.tick_s > self.alive_s:
            raise KaError(Code.USAGE, "need tick <= alive < silence / 2 and silence <= stall")


@functools.lru_cache(maxsize=64)
def _masks(chunk_count: int, tree_count: int) -> tuple[int, ...]:
    """Return the chunks that go down each data tree."""
    return tuple(
        chunkset.from_indexes(range(tree, chunk_count, tree_count)) for tree in range(tree_count)
    )


class Node:
    """The state that the parts of a hop share."""

    def __init__(
        self,
        rank: int,
        topology: Topology,
        *,
        transfer: bytes,
        chunk_count: int,
        chunk_size: int,
        options: HopOptions,
        have: int,
        attempt: int,
    ) -> None:
        self.rank = rank
        self.topology = topology
        self.transfer = transfer
        self.options = options
        self.chunk_count = chunk_count
        self.chunk_size = chunk_size
        self.masks = _masks(chunk_count, len(topology.trees))
        self.control_index = len(topology.trees)
        self.everything = chunkset.full(chunk_count)
        self.have = self.everything if rank == SOURCE else have
        """Chunks received and verified: they can be sent on."""
        self.coming = 0
        """Chunks on their way in, to be passed on meanwhile."""
        self.attempt = attempt
        self.relays = True
        """False: slow, or failed; it feeds nobody."""
        self.ledger = Ledger(topology.shape.receiver_count, chunk_count)
        self.actions: list[Action] = []
        self.places = [rank] * (self.control_index + 1)
        """By tree: the rank whose place this node has, or `END`."""
        self.parents = [-1] * (self.control_index + 1)
        """By tree: who feeds this node, or has been asked to."""
        self.fed: list[Collection[int]] = [()] * (self.control_index + 1)
        """By tree: the ranks that this node feeds."""
        self.heard_s: dict[int, float] = {}
        """By neighbour: when it last said anything, or bytes of it came."""
        self.renewed_s: dict[int, float] = {}
        """By neighbour: when it last attached anew, for it may be another process since, or was
        hung up on: what it was asked before may be lost."""

    def check(self, peer: int, message: Message) -> None:
        """Raise KaError PROTOCOL for what is not of this transfer, or names what is not there."""
        if message.transfer != self.transfer:
            raise KaError(Code.PROTOCOL, "a message of another transfer", peer=peer)
        if not 0 <= peer < self.topology.rank_count or peer == self.rank:
            raise KaError(Code.PROTOCOL, "a neighbour that is not in the plan", peer=peer)
        tree = getattr(message, "tree", 0)
        if not 0 <= tree <= self.control_index:
            raise KaError(Code.PROTOCOL, "a message for a tree that is not in the plan", tree=tree)
        if getattr(message, "instead", 0) >= self.topology.rank_count:
            raise KaError(Code.PROTOCOL, "a referral to nobody", peer=peer)
        if not END <= getattr(message, "place", 0) < self.topology.rank_count:
            raise KaError(Code.PROTOCOL, "a place that is not in the plan", peer=peer)
        if type(message) is Ack:
            self.check_chunk(message.chunk)

    def check_chunk(self, chunk: int) -> None:
        """Raise KaError PROTOCOL for a chunk that does not exist."""
        if not 0 <= chunk < self.chunk_count:
            raise KaError(Code.PROTOCOL, "a chunk that does not exist", chunk=chunk)

    def tree(self, index: int) -> Tree:
        trees = self.topology.trees
        return trees[index] if index < len(trees) else self.topology.control

    def mask(self, index: int) -> int:
        """Return the chunks of a tree; none for the control tree."""
        return self.masks[index] if index < len(self.masks) else 0

    def tree_of(self, chunk: int) -> int:
        return chunk % len(self.topology.trees)

    def have_count(self, index: int) -> int:
        return (self.have & self.mask(index)).bit_count()

    def position(self, index: int, place: int) -> int:
        """Return where a place is in a tree: whoever is ahead may feed who is behind."""
        return self.topology.rank_count if place == END else self.tree(index).positions[place]

    def own_position(self, index: int) -> int:
        return self.position(index, self.places[index])

    def is_in_rack(self, other: int) -> bool:
        rack_of = self.topology.rack_of
        return rack_of[other] == rack_of[self.rank]

    def send(self, peer: int, message: Message) -> None:
        self.actions.append(Send(peer, message))

    def send_chunk(self, peer: int, chunk: int) -> None:
        self.actions.append(SendChunk(peer, chunk))
