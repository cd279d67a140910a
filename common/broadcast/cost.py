"""The cost model: how long a broadcast takes on a network, by shape and chunk size.  Pure.

The data are pipelined chunk by chunk.  Two things make up the time:

  fill    until the last node has its first chunk: along the worst path, for each edge, the
          turns of the children fed before it, a piece of the chunk, for it is passed on while
          it comes, and the latency; then the chunk itself;
  drain   from there on the most loaded resource sets the pace: a node's sending, receiving or
          handling of chunks, or a rack's uplink.  The first chunk is in `fill` already.

A sender needs `hop_overhead_s` for each chunk it sends, besides the time on the wire: this is
what makes small chunks dear, and repairs are what makes large ones dear: see `CHUNK_S`.  All links
are full duplex.  Unlike links, failures and slow disks are not modelled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.broadcast.topology import Kind, Topology, Tree
from common.errors import Code, KaError

__all__ = [
    "CHUNK_S",
    "CHUNK_SIZES",
    "Cost",
    "Network",
    "ideal_s",
    "piece_size",
    "predict",
    "shared_medium_s",
]

CHUNK_SIZES = tuple(1 << bits for bits in range(16, 23))
"""64 KiB ... 4 MiB: smaller ones cost more than they gain, larger ones make repairs dear."""
CHUNK_S = 0.05
"""What a chunk may take on its tree's share of the narrowest link, if it is not of the smallest
size: whoever is relied on, or judged, is so by windows of chunks, well within a second."""
LISTEN_S = 0.3
"""Until the source of a multicast pass knows who listens, and what they lack."""
PIECE_SIZES = tuple(1 << bits for bits in range(16, 19))
"""64 KiB ... 256 KiB: each costs every node a wake-up."""
PIECE_S = 0.001
"""What a piece takes on a link, if it can: who is woken more often does little else."""
FILL_SHARE = 0.005
"""What part of the time may go by because nodes wait for pieces."""


def piece_size(depth: int, size: int, rate: float) -> int:
    """Return how much of a chunk a node receives before it passes that much on.

    In a pipeline of *depth* edges the last node is as many pieces behind.  *rate*: of the links,
    in bytes a second, 0 if it is not known; *size*: of all that is sent.
    """
    wanted = max(FILL_SHARE * size / max(1, depth), PIECE_S * rate)
    return next((one for one in PIECE_SIZES if one >= wanted), PIECE_SIZES[-1])


@dataclass(frozen=True, slots=True)
class Network:
    """What a broadcast runs on; rates in bytes a second, 0 for "not a limit"."""

    up_rate: float
    """What a node can send."""
    down_rate: float
    latency_s: float = 0.0001
    hop_overhead_s: float = 0.0002
    """Spent by a sender on each chunk."""
    hop_cpu_rate: float = 2.5e9
    """Bytes a node can handle, received and sent ones alike."""
    uplink_rate: float = 0.0
    """Of each rack, each way."""
    multicast_loss: float = 0.01

    def __post_init__(self) -> None:
        if min(self.up_rate, self.down_rate, self.hop_cpu_rate) <= 0:
            raise KaError(Code.USAGE, "a link needs a rate")
        if min(self.latency_s, self.hop_overhead_s, self.uplink_rate) < 0:
            raise KaError(Code.USAGE, "times and rates cannot be negative")
        if not 0 <= self.multicast_loss < 1:
            raise KaError(Code.USAGE, "a loss is a fraction below 1")

    @property
    def rate(self) -> float:
        """Bytes a second between two nodes of a rack."""
        return min(self.up_rate, self.down_rate)


@dataclass(frozen=True, slots=True)
class Cost:
    """A prediction."""

    seconds: float
    fill_s: float
    bottleneck: str
    """What sets the pace, in words."""


def predict(topology: Topology, size: int, chunk_size: int, network: Network) -> Cost:
    """Return how long *size* bytes take, until the last node has the last of them."""
    chunk_size = max(1, min(chunk_size, size))
    chunk_count = max(1, -(-size // chunk_size))
    if topology.kind is Kind.MULTICAST:
        return _predict_multicast(topology, size, network)
    fill_s = max(_fill_s(tree, topology, size, chunk_size, network) for tree in topology.trees)
    drain_s, bottleneck = max(_loads(topology, size, chunk_count, network))
    return Cost(fill_s + drain_s * (1 - 1 / chunk_count), fill_s, bottleneck)


def ideal_s(racks: tuple[int, ...], size: int, network: Network) -> float:
    """Return the time that nothing can beat: the data once over the narrowest link."""
    rate = network.rate
    if network.uplink_rate and len(racks) > 1:
        rate = min(rate, network.uplink_rate)
    return size / rate + network.latency_s


def shared_medium_s(topology: Topology, size: int, network: Network) -> float:
    """Return the time where all nodes share one wire: each edge takes its turn on it."""
    if topology.kind is Kind.MULTICAST:
        return predict(topology, size, size, network).seconds
    return topology.shape.receiver_count * size / network.rate


def _predict_multicast(topology: Topology, size: int, network: Network) -> Cost:
    """Who listens, everything once, what was lost again, a round of complaints for each repair.

    With loss p and n nodes, after round r about n p**r of the nodes still miss a given chunk.
    """
    loss = network.multicast_loss
    rounds = 0
    if loss:
        rounds = math.ceil(math.log(max(2, topology.shape.receiver_count)) / -math.log(loss))
    round_s = 2 * topology.control.depth * (network.latency_s + network.hop_overhead_s)
    seconds = ideal_s(topology.shape.racks, size, network) / (1 - loss) + rounds * round_s
    seconds += LISTEN_S
    return Cost(seconds, network.latency_s, "the sender's link")


def _fill_s(tree: Tree, topology: Topology, size: int, chunk_size: int, network: Network) -> float:
    """Return when the last node of a tree has its first chunk."""
    piece = min(chunk_size, piece_size(tree.depth, size, network.rate))
    slow_rate = network.rate
    if network.uplink_rate:
        slow_rate = min(network.rate, network.uplink_rate)
    turn_s = network.hop_overhead_s + chunk_size / network.rate
    edge_s = network.hop_overhead_s + network.latency_s
    return max(
        turns * turn_s
        + quick * (edge_s + piece / network.rate)
        + slow * (edge_s + piece / slow_rate)
        + (chunk_size - piece) / (slow_rate if slow else network.rate)
        for turns, quick, slow in _paths(tree, topology.rack_of)
    )


def _paths(tree: Tree, rack_of: tuple[int, ...]) -> set[tuple[int, int, int]]:
    """Return (turns of others, edges within racks, over an uplink) of the paths to all leaves.

    A node is never the last one where it has children, so leaves will do; and most are alike.
    """
    found: set[tuple[int, int, int]] = set()
    waiting = [(0, 0, 0, 0)]
    while waiting:
        rank, turns, quick, slow = waiting.pop()
        for turn, child in enumerate(tree.children[rank]):
            crosses = rack_of[child] != rack_of[rank]
            waiting.append((child, turns + turn, quick + (not crosses), slow + crosses))
        if not tree.children[rank]:
            found.add((turns, quick, slow))
    return found


def _loads(
    topology: Topology, size: int, chunk_count: int, network: Network
) -> list[tuple[float, str]]:
    """Return how long each kind of resource is busy, where it is busiest."""
    share = 1 / len(topology.trees)
    sends = [0.0] * topology.rank_count
    for tree in topology.trees:
        for rank, children in enumerate(tree.children):
            sends[rank] += len(children) * share
    busiest = max(sends)
    relayed = max(sends[1:])
    handled = max(busiest, relayed + 1)
    who = "the source" if sends[0] == busiest and busiest > relayed else "a relay"
    overhead_s = chunk_count * network.hop_overhead_s
    loads = [
        (busiest * (size / network.up_rate + overhead_s), f"the link of {who}"),
        (size / network.down_rate + overhead_s, "the receivers' links"),
        (handled * size / network.hop_cpu_rate, f"the processor of {who}"),
    ]
    if network.uplink_rate:
        crossings = _crossings(topology) * share
        loads.append((crossings * size / network.uplink_rate, "a rack's uplink"))
    return loads


def _crossings(topology: Topology) -> int:
    """Return how many edges of all trees leave, or enter, the rack that has most of them."""
    rack_of = topology.rack_of
    count = len(topology.shape.racks)
    out, into = [0] * count, [0] * count
    for tree in topology.trees:
        for rank, parent in enumerate(tree.parents):
            if parent >= 0 and rack_of[rank] != rack_of[parent]:
                out[rack_of[parent]] += 1
                into[rack_of[rank]] += 1
    return max(out + into)
