"""The multicast pass: every chunk once to all nodes by UDP, and again what many lack.  Sans-I/O.

The `Sender` says which piece of which chunk goes next, and when; a `Receiver` collects pieces, and
says what it lacks (`Nack`).  What is still lacking when the pass is over is not their business:
hops bring it.  So the pass may end early, or fail altogether (no multicast between two switches):
it costs time, and nothing else.

Nacks go up the control tree over the sessions of hops, not into the group.  A node gathers what its
children lack with its own for `hold_s` and sends the union (aggregation); which pieces these are
is not said again for `repeat_s`, but how many receivers lack some is (suppression).

Invariants
  * what one receiver alone lacks is sent again when the others have had all, what fewer than
    `repair_share` lack is left to the hops, and what fewer than `loss_quorum` lose does not count
    as loss: one bad receiver costs the others nothing;
  * the source sends no more than its rate, which falls with loss and recovers slowly, and repeats
    no more than `repeat_share` of the data;
  * a receiver holds at most `partial_count_max` incomplete chunks; older ones are left to the hops.

The shell reads and sends pieces, copies what comes into place, checks the sums of whole chunks,
and calls `tick` at `wake_s`.  Not here: the bytes of datagrams (`datagram`).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

from common.broadcast import chunkset
from common.broadcast.datagram import (
    HEADER_SIZE,
    PAYLOAD_SIZE_MIN,
    Datagram,
    DatagramKind,
    piece_count,
)
from common.broadcast.manifest import Manifest
from common.broadcast.wire import Nack
from common.errors import Code, KaError

__all__ = [
    "Complete",
    "Discard",
    "MulticastOptions",
    "Outgoing",
    "Place",
    "Receiver",
    "SendNack",
    "Sender",
]

NACK_CHUNK_COUNT_MAX = 64
RATE_GROWTH = 1.05
"""At each step in which next to nothing was lost, once something has been."""
LOOK_COUNT_MAX = 1024
"""Lacking chunks that a receiver looks at in a tick; the others wait until these are settled."""
FRAME_OVERHEAD = HEADER_SIZE + 66
"""Bytes on the wire for each datagram besides its payload: Ethernet, its gap, IPv4 and UDP too."""


@dataclass(frozen=True, slots=True)
class MulticastOptions:
    """Times in seconds, rates in bytes a second on the wire."""

    payload_size: int = 1400
    rate_max: float = 100e6
    rate_start: float = 0.0
    """Where nobody knows what the network carries: doubled at each step until something is lost.
    0: `rate_max`."""
    rate_min: float = 1e6
    rate_step_s: float = 0.25
    """How often the rate is thought over."""
    loss_share: float = 0.05
    """Of what all receivers should have got: above this the rate falls; below half of it, it
    rises."""
    loss_quorum: float = 0.34
    """Of receivers: loss of a chunk counts if so many report it.  What is lost in the common part
    of the network, all lose."""
    burst_size: int = 256 * 1024
    """Bytes: a shell that was late may catch up so much.  Less than what networks queue."""
    hold_s: float = 0.05
    """How long gaps are gathered before they are reported."""
    repeat_s: float = 0.5
    """What was asked for is asked for again after this."""
    repair_share: float = 0.02
    """Of receivers: what fewer lack is left to the hops."""
    repeat_share: float = 1.0
    """Of the data: so much is sent again at most."""
    settle_s: float = 1.0
    """The pass is over when for this long nobody has asked for anything."""
    ask_count_max: int = 3
    """What was not repaired after so many requests, when all was sent, is left to the hops."""
    partial_count_max: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.rate_min <= self.rate_max:
            raise KaError(Code.USAGE, "multicast needs a rate")
        if not PAYLOAD_SIZE_MIN <= self.payload_size <= 65000:
            raise KaError(Code.USAGE, f"payloads are of {PAYLOAD_SIZE_MIN} to 65000 bytes")
        if not self.hold_s < self.repeat_s < self.settle_s:
            raise KaError(Code.USAGE, "need hold < repeat < settle")


class Outgoing(NamedTuple):
    """Send this datagram into the group: `size` bytes at `offset` of the chunk."""

    kind: DatagramKind
    chunk: int
    piece: int
    offset: int
    size: int


class Place(NamedTuple):
    """Copy the datagram's payload to `offset` in the chunk's buffer."""

    chunk: int
    offset: int


class Complete(NamedTuple):
    """All pieces are there: check the sum, then call `chunk_checked`."""

    chunk: int


class Discard(NamedTuple):
    """Free the chunk's buffer: the hops will see to it."""

    chunk: int


class SendNack(NamedTuple):
    """Send it to the parent in the control tree."""

    message: Nack


class _Gap(NamedTuple):
    """What is lacking of one chunk."""

    receivers: int
    """That lack something of it."""
    lost_count: int
    """Pieces that they report for the first time, added up."""
    pieces: int
    """A set: what at least one of them lacks."""

    def joined(self, other: _Gap) -> _Gap:
        return _Gap(
            self.receivers + other.receivers,
            self.lost_count + other.lost_count,
            self.pieces | other.pieces,
        )


_NO_GAP = _Gap(0, 0, 0)


class _Pieces:
    """How chunks are cut."""

    def __init__(self, manifest: Manifest, options: MulticastOptions) -> None:
        self._manifest = manifest
        self._chunk_count = manifest.chunk_count
        self._size = options.payload_size

    def count(self, chunk: int) -> int:
        return piece_count(self._manifest.extent(chunk)[1], self._size)

    def extent(self, chunk: int, piece: int) -> tuple[int, int]:
        """Return (offset in the chunk, size) of a piece."""
        offset = piece * self._size
        return offset, min(self._size, self._manifest.extent(chunk)[1] - offset)

    def gaps_of(self, message: Nack) -> list[tuple[int, _Gap]]:
        """Return the gaps in a message; raises KaError PROTOCOL."""
        found = []
        for item in message.gaps:
            match item:
                case [int(chunk), int(receivers), int(lost_count), bytes(pieces)]:
                    if not 0 <= chunk < self._chunk_count or min(receivers, lost_count) < 0:
                        raise KaError(Code.PROTOCOL, "a gap in what does not exist")
                    lacking = chunkset.decode(pieces, self.count(chunk))
                    found.append((chunk, _Gap(receivers, lost_count, lacking)))
                case _:
                    raise KaError(Code.PROTOCOL, "not a gap")
        return found


class Sender:
    """The source's side."""

    def __init__(
        self, manifest: Manifest, receiver_count: int, options: MulticastOptions, *, chunks: int
    ) -> None:
        """*chunks*: what at least one receiver lacks."""
        self._options = options
        self._pieces = _Pieces(manifest, options)
        self._fresh = chunkset.indexes(chunks)
        self._chunk, self._piece, self._piece_count = -1, 0, 0
        self._receiver_count = receiver_count
        self._votes: dict[int, tuple[float, _Gap]] = {}
        """Of chunks that too few lack as yet: since when, and what."""
        self._repairs: dict[int, int] = {}
        """Pieces to send again."""
        self._repaired_s: dict[int, float] = {}
        total = sum(self._pieces.count(chunk) for chunk in chunkset.indexes(chunks))
        self._repeats_left = int(options.repeat_share * total)
        self._all_sent = False
        self._quiet_since_s = 0.0
        self._over_count = 0
        self._sent_count = 0
        self._losses: dict[int, tuple[int, int]] = {}
        """By chunk, in this step: receivers that lack something of it, pieces that they lost."""
        self._step_s = 0.0
        self._growth = 2.0 if options.rate_start else RATE_GROWTH
        self.rate = min(options.rate_start or options.rate_max, options.rate_max)
        self.wake_s = 0.0
        """When `next_datagram` has something to send again."""
        self.finished = False
        self.repeat_count = 0

    def start(self, now: float) -> None:
        self.wake_s = now
        self._step_s = now + self._options.rate_step_s
        self._advance()

    def stop(self) -> None:
        """Send no more data: say that the pass is over, and be finished."""
        self._chunk = -1
        self._repairs.clear()
        self._repeats_left = 0
        self._all_sent, self._quiet_since_s = True, -math.inf

    def next_datagram(self, now: float) -> Outgoing | None:
        """Return what to send now; None before `wake_s`, and when the pass is over."""
        if now < self.wake_s or self.finished:
            return None
        self._adapt(now)
        found = self._next_repair(now) or self._next_fresh()
        if found is None:
            return self._next_sign(now)
        self._all_sent = False
        self._sent_count += 1
        late_s = min(now - self.wake_s, self._options.burst_size / self.rate)
        self.wake_s = now - late_s + (found.size + FRAME_OVERHEAD) / self.rate
        return found

    def nack_received(self, message: Nack, now: float) -> None:
        """Take note of what receivers lack; raises KaError PROTOCOL."""
        fresh_s = self._options.repeat_s / 2
        for chunk, gap in self._pieces.gaps_of(message):
            if gap.lost_count:
                receivers, lost_count = self._losses.get(chunk, (0, 0))
                self._losses[chunk] = receivers + gap.receivers, lost_count + gap.lost_count
            if now - self._repaired_s.get(chunk, -1e9) < fresh_s:
                continue  # it crossed the repair
            began_s, votes = self._votes.pop(chunk, (now, _NO_GAP))
            if now - began_s > fresh_s:  # the same few ask again
                began_s, votes = now, _NO_GAP
            votes = votes.joined(gap)
            if votes.receivers < self._votes_needed():
                self._votes[chunk] = began_s, votes
                continue
            pending = self._repairs.get(chunk, 0)
            more_count = (votes.pieces & ~pending).bit_count()
            if 0 < more_count <= self._repeats_left:
                self._repeats_left -= more_count
                self._repairs[chunk] = pending | votes.pieces
                if self._all_sent:
                    self.wake_s = min(self.wake_s, now)

    def _votes_needed(self) -> float:
        few = min(2, self._receiver_count) if self._chunk >= 0 else 1
        return max(few, self._options.repair_share * self._receiver_count)

    def _advance(self) -> None:
        """Go to the next chunk."""
        self._chunk, self._piece = next(self._fresh, -1), 0
        self._piece_count = self._pieces.count(self._chunk) if self._chunk >= 0 else 0

    def _next_repair(self, now: float) -> Outgoing | None:
        """Repairs come first: they free what receivers hold."""
        if not self._repairs:
            return None
        chunk, pieces = next(iter(self._repairs.items()))
        piece = chunkset.first(pieces)
        pieces &= pieces - 1
        if pieces:
            self._repairs[chunk] = pieces
        else:
            del self._repairs[chunk]
            self._repaired_s[chunk] = now
        self.repeat_count += 1
        return Outgoing(DatagramKind.DATA, chunk, piece, *self._pieces.extent(chunk, piece))

    def _next_fresh(self) -> Outgoing | None:
        if self._chunk < 0:
            return None
        chunk, piece = self._chunk, self._piece
        self._piece += 1
        if self._piece == self._piece_count:
            self._advance()
        return Outgoing(DatagramKind.DATA, chunk, piece, *self._pieces.extent(chunk, piece))

    def _next_sign(self, now: float) -> Outgoing:
        """Say that all has been sent; when nobody asks for more, that the pass is over."""
        if not self._all_sent:
            self._all_sent, self._quiet_since_s = True, now
        self.wake_s = now + self._options.hold_s
        if now - self._quiet_since_s < self._options.settle_s:
            return Outgoing(DatagramKind.SENT, 0, 0, 0, 0)
        self._over_count += 1
        self.finished = self._over_count >= 5
        return Outgoing(DatagramKind.OVER, 0, 0, 0, 0)

    def _adapt(self, now: float) -> None:
        options = self._options
        if now < self._step_s or not self._sent_count:
            return
        quorum = options.loss_quorum * self._receiver_count
        lost_count = sum(lost for receivers, lost in self._losses.values() if receivers >= quorum)
        loss = lost_count / self._sent_count / self._receiver_count
        if loss > options.loss_share:
            self._growth = RATE_GROWTH
            self.rate = max(options.rate_min, self.rate * (1 - min(loss, 0.5)))
        elif loss < options.loss_share / 2:
            self.rate = min(options.rate_max, self.rate * self._growth)
        self._sent_count = 0
        self._losses.clear()
        self._step_s = now + options.rate_step_s


class Receiver:
    """The side of every other node."""

    def __init__(self, manifest: Manifest, options: MulticastOptions, *, have: int) -> None:
        self.have = have
        """Chunks whose sums were found right."""
        self.over = False
        """The sender has said so."""
        self.wake_s = 0.0
        self.duplicate_count = 0
        self._transfer = manifest.transfer_id
        self._options = options
        self._pieces = _Pieces(manifest, options)
        self._chunk_count = manifest.chunk_count
        self._wanted = chunkset.full(manifest.chunk_count) & ~have
        self._partial: dict[int, int] = {}
        """Pieces of incomplete chunks that are there."""
        self._checking = 0
        """Chunks whose sums are being checked."""
        self._front = 0
        """Chunks before this one should be there, or their gaps are known."""
        self._all_sent = False
        self._first = -1
        """Chunks before this one were sent before this node listened: they are not asked for."""
        self._touched_s: dict[int, float] = {}
        """By chunk that is lacking: when a piece came, or it was found lacking."""
        self._asked: dict[int, tuple[float, int]] = {}
        """By chunk: when this node last asked, for itself or others, and for which pieces."""
        self._own_asked: dict[int, tuple[float, int]] = {}
        """By chunk: when this node last asked for itself, and how often."""
        self._below: dict[int, _Gap] = {}
        """Gaps of children that are not reported yet."""

    def start(self, now: float) -> None:
        self.wake_s = now + self._options.hold_s

    def datagram_received(self, datagram: Datagram, now: float) -> list[Place | Complete | Discard]:
        """Take in a datagram of this transfer."""
        chunk, piece = datagram.chunk, datagram.piece
        if datagram.kind is DatagramKind.OVER:
            self.over = True
        elif datagram.kind is DatagramKind.SENT:
            self._heard_of(self._chunk_count)
            if not self._all_sent:  # whoever lacked something alone is only heard now
                self._all_sent = True
                self._own_asked = {one: (at, 1) for one, (at, _) in self._own_asked.items()}
        elif chunk < self._chunk_count and piece < self._pieces.count(chunk):
            self._heard_of(chunk)
            return self._take(chunk, piece, len(datagram.payload), now)
        return []

    def _heard_of(self, chunk: int) -> None:
        if self._first < 0:
            self._first = chunk
        self._front = max(self._front, chunk)

    def chunk_checked(self, chunk: int, intact: bool, now: float) -> None:
        """The sum of a whole chunk was looked at; one that is wrong is collected anew."""
        self._checking &= ~(1 << chunk)
        if intact:
            self.have |= 1 << chunk
            self._wanted &= ~(1 << chunk)
            self._touched_s.pop(chunk, None)
            self._own_asked.pop(chunk, None)
        else:
            self._touched_s[chunk] = now

    def nack_received(self, message: Nack, now: float) -> None:
        """Take note of what a child and those below it lack; raises KaError PROTOCOL."""
        for chunk, gap in self._pieces.gaps_of(message):
            if chunk in self._below or len(self._below) < self._options.partial_count_max:
                self._below[chunk] = self._below.get(chunk, _NO_GAP).joined(gap)

    def tick(self, now: float) -> list[SendNack | Discard]:
        """Report gaps, gathered since the last tick."""
        self.wake_s = now + self._options.hold_s
        actions: list[SendNack | Discard] = []
        gaps = self._below
        for chunk in self._own_gaps(now, actions):
            pieces = chunkset.full(self._pieces.count(chunk)) & ~self._partial.get(chunk, 0)
            _, count = self._own_asked.get(chunk, (0.0, 0))
            self._own_asked[chunk] = now, count + 1
            own = _Gap(1, 0 if count else pieces.bit_count(), pieces)
            gaps[chunk] = gaps.get(chunk, _NO_GAP).joined(own)
        due: list[list[int | bytes]] = []
        for chunk in list(gaps)[:NACK_CHUNK_COUNT_MAX]:
            gap = gaps.pop(chunk)
            pieces = self._unasked(chunk, gap.pieces, now)
            due.append([chunk, gap.receivers, gap.lost_count, chunkset.encode(pieces)])
        self._below = gaps
        if due:
            actions.append(SendNack(Nack(self._transfer, due)))
        return actions

    def _take(
        self, chunk: int, piece: int, size: int, now: float
    ) -> list[Place | Complete | Discard]:
        offset, expected_size = self._pieces.extent(chunk, piece)
        pieces = self._partial.get(chunk, 0)
        needless = not self._wanted >> chunk & 1 or self._checking >> chunk & 1
        if needless or pieces >> piece & 1 or size != expected_size:
            self.duplicate_count += 1
            return []
        pieces |= 1 << piece
        self._touched_s[chunk] = now
        found: list[Place | Complete | Discard] = [Place(chunk, offset)]
        if pieces == chunkset.full(self._pieces.count(chunk)):
            self._partial.pop(chunk, None)
            self._checking |= 1 << chunk
            found.append(Complete(chunk))
            return found
        self._partial[chunk] = pieces
        if len(self._partial) > self._options.partial_count_max:
            found.append(self._give_up(min(self._partial)))
        return found

    def _give_up(self, chunk: int) -> Discard:
        self._partial.pop(chunk, None)
        self._touched_s.pop(chunk, None)
        self._wanted &= ~(1 << chunk)
        return Discard(chunk)

    def _own_gaps(self, now: float, actions: list[SendNack | Discard]) -> list[int]:
        """Return the chunks to ask for: lacking for a while, and not asked for lately."""
        options = self._options
        due = chunkset.full(self._front) & ~chunkset.full(max(0, self._first))
        lacking = self._wanted & ~self._checking & due
        found: list[int] = []
        for chunk in itertools.islice(chunkset.indexes(lacking), LOOK_COUNT_MAX):
            if now - self._touched_s.setdefault(chunk, now) < options.hold_s:
                continue
            asked_s, count = self._own_asked.get(chunk, (-1e9, 0))
            if now - asked_s < options.repeat_s:
                continue
            if self._all_sent and count >= options.ask_count_max:
                actions.append(self._give_up(chunk))
                continue
            found.append(chunk)
            if len(found) == NACK_CHUNK_COUNT_MAX:
                break
        return found

    def _unasked(self, chunk: int, pieces: int, now: float) -> int:
        """Return what of a gap was not asked for lately, and take it for asked."""
        asked_s, asked = self._asked.get(chunk, (-1e9, 0))
        if now - asked_s < self._options.repeat_s:
            self._asked[chunk] = asked_s, asked | pieces
            return pieces & ~asked
        self._asked[chunk] = now, pieces
        return pieces
