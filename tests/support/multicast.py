"""A simulated multicast pass: one sender, receivers that lose datagrams, real bytes.

Datagrams pass through the codec; each receiver loses a share of them by itself; some lose what
goes beyond a rate.  Nacks take a millisecond.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from common.broadcast.datagram import Datagram, DatagramCodec, DatagramKind
from common.broadcast.manifest import Algorithm, Manifest
from common.broadcast.multicast import (
    Complete,
    Discard,
    MulticastOptions,
    Place,
    Receiver,
    Sender,
    SendNack,
)
from common.broadcast.topology import SOURCE, Kind, Shape, build

__all__ = ["Group", "image"]

TOKEN = b"t" * 32
NACK_S = 0.001


def image(size: int, chunk_size: int) -> tuple[bytes, Manifest]:
    """Return some bytes and their manifest."""
    data = random.Random(size).randbytes(size)
    chunks = [data[start : start + chunk_size] for start in range(0, size, chunk_size)]
    sums = b"".join(map(Algorithm.XXH3.sum_of, chunks))
    return data, Manifest(bytes(16), "image", size, chunk_size, Algorithm.XXH3, sums)


@dataclass
class Group:
    """One pass."""

    data: bytes
    manifest: Manifest
    receiver_count: int
    options: MulticastOptions
    loss: Callable[[int], float] = lambda rank: 0.0
    """By rank: the share of datagrams that is lost on the way to it."""
    capacity: float = 1e12
    """Bytes a second; what is sent beyond is lost for all."""
    damage: float = 0.0
    """Share of pieces that a receiver's memory spoils, so that sums are wrong."""
    seed: int = 1
    have: dict[int, int] = field(default_factory=dict)
    receivers: list[Receiver] = field(default_factory=list)
    seconds: float = 0.0
    datagram_count: int = 0
    complete_s: dict[int, float] = field(default_factory=dict)
    """By rank: when it had everything."""
    nack_count: int = 0
    """That reached the source."""

    def run(self) -> Group:
        """Run the pass; afterwards `receivers` have what they have."""
        rng = random.Random(self.seed)
        parents = build(Shape(Kind.MULTICAST, (self.receiver_count,))).control.parents
        everything = (1 << self.manifest.chunk_count) - 1
        common = everything
        for rank in range(1, self.receiver_count + 1):
            common &= self.have.get(rank, 0)
        chunks = everything & ~common
        sender = Sender(self.manifest, self.receiver_count, self.options, chunks=chunks)
        self.sender = sender
        self.receivers = [
            Receiver(self.manifest, self.options, have=self.have.get(rank, 0))
            for rank in range(1, self.receiver_count + 1)
        ]
        self._buffers: list[dict[int, bytearray]] = [{} for _ in self.receivers]
        codec = DatagramCodec(self.manifest.transfer_id, TOKEN)
        nacks: list[tuple[float, int, SendNack]] = []
        now, budget = 0.0, 0.0
        sender.start(now)
        for receiver in self.receivers:
            receiver.start(now)
        while not sender.finished:
            found = sender.next_datagram(now)
            if found is not None:
                self.datagram_count += found.kind is DatagramKind.DATA
                start = self.manifest.extent(found.chunk)[0] + found.offset if found.size else 0
                payload = self.data[start : start + found.size]
                whole = codec.header(found.kind, found.chunk, found.piece, payload) + payload
                budget -= len(whole)
                if budget > -8 * len(whole):
                    datagram = codec.decode(memoryview(whole))
                    assert datagram is not None
                    for rank in range(1, self.receiver_count + 1):
                        if rng.random() >= self.loss(rank):
                            self._arrive(rank, datagram, now, rng)
                else:
                    budget += len(whole)
            for rank, receiver in enumerate(self.receivers, 1):
                if now >= receiver.wake_s and not receiver.over:
                    for action in receiver.tick(now):
                        if isinstance(action, SendNack):
                            nacks.append((now + NACK_S, parents[rank], action))
                        else:
                            self._buffers[rank - 1].pop(action.chunk, None)
            while nacks and nacks[0][0] <= now:
                _, peer, nack = nacks.pop(0)
                if peer == SOURCE:
                    self.nack_count += 1
                    sender.nack_received(nack.message, now)
                else:
                    self.receivers[peer - 1].nack_received(nack.message, now)
            times = [receiver.wake_s for receiver in self.receivers if not receiver.over]
            times += [nack[0] for nack in nacks[:1]]
            times += [sender.wake_s] if not sender.finished else []
            later = max(now, min(times, default=now))
            budget = min(0.0, budget + (later - now) * self.capacity)
            now = later
            assert now < 1000, "the pass does not end"
        self.seconds = now
        self._check()
        return self

    def _arrive(self, rank: int, datagram: Datagram, now: float, rng: random.Random) -> None:
        receiver, buffers = self.receivers[rank - 1], self._buffers[rank - 1]
        for action in receiver.datagram_received(datagram, now):
            match action:
                case Place():
                    size = self.manifest.extent(action.chunk)[1]
                    buffer = buffers.setdefault(action.chunk, bytearray(size))
                    payload = bytes(datagram.payload)
                    if rng.random() < self.damage:
                        payload = bytes(len(payload))
                    buffer[action.offset : action.offset + len(payload)] = payload
                case Complete():
                    intact = self.manifest.verify(action.chunk, buffers.pop(action.chunk))
                    receiver.chunk_checked(action.chunk, intact, now)
                    if receiver.have.bit_count() == self.manifest.chunk_count:
                        self.complete_s[rank] = now
                case Discard():
                    buffers.pop(action.chunk, None)

    def _check(self) -> None:
        """A receiver holds no more buffers than it may, and none that it has forgotten."""
        for buffers in self._buffers:
            assert len(buffers) <= self.options.partial_count_max

    @property
    def lacking(self) -> list[int]:
        """By receiver: how many chunks are left to the hops."""
        return [self.manifest.chunk_count - one.have.bit_count() for one in self.receivers]
