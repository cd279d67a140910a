"""Casting: the shell of a multicast pass, beside that of the hop (`relay`).

The source waits until all nodes listen, or for a while no more have begun to, and sends what at
least one of them lacks.  A node collects chunks, and hands what is right to its hop.  Both end with
the hop's pass; a pass that cannot be begun, or that nobody hears, is ended at once or soon: hops
bring everything then.
"""

from __future__ import annotations

import errno
import math
import socket
from collections.abc import Callable

import trio

from common import log
from common.broadcast.datagram import HEADER_SIZE, DatagramCodec
from common.broadcast.depot import Depot
from common.broadcast.hop import Hop
from common.broadcast.manifest import Manifest
from common.broadcast.multicast import (
    Complete,
    Discard,
    MulticastOptions,
    Outgoing,
    Place,
    Receiver,
    Sender,
)
from common.broadcast.node import Action, Send
from common.broadcast.store import Store
from common.broadcast.upstream import UpstreamState
from common.broadcast.wire import Nack
from common.errors import KaError

__all__ = ["Casting", "Hearing"]

LOOK_S = 0.05
"""How often the source looks who listens."""
QUIET_S = 1.5
"""When for so long, or for half the time that it took so far, nobody new listens, it begins."""
DEAF_S = 3.0
"""When for so long no node has got anything of what is sent, the pass is ended."""
LINK_SHARE = 0.95
"""Of the rate of links, for the pass: acknowledgements and reports need something too."""
RATE_START, RATE_MIN = 4e6, 0.5e6
"""Bytes a second, where nothing is known of the links."""
NAP_S = 0.001
"""A sender that sleeps less than that wakes up too often; it catches up."""
TURN_COUNT = 64
"""Datagrams after which others may run."""
KEPT_COUNT = 8
"""Chunks that the source keeps, for what is sent again at once."""
PARTIAL_SIZE_MAX = 64 << 20
"""Bytes of chunks that a node collects at a time."""
BEHIND_S = 0.01
"""How often a node looks whether its sink has caught up."""

_log = log.get("ka.casting")

Perform = Callable[[list[Action]], None]


class Casting:
    """The pass of the source."""

    def __init__(
        self,
        sock: socket.socket | None,
        codec: DatagramCodec,
        manifest: Manifest,
        store: Store,
        hop: Hop,
        depot: Depot,
        perform: Perform,
    ) -> None:
        """Take over the socket; None: there can be no pass."""
        self._sock = sock
        self._codec = codec
        self._manifest = manifest
        self._store = store
        self._hop = hop
        self._depot = depot
        self._perform = perform
        self._sender: Sender | None = None
        self._kept: dict[int, bytes] = {}
        self._total_count = -1
        self._total_s = 0.0

    async def run(self) -> None:
        """Send what is lacking; then let hops go on."""
        if self._sock is not None:
            with self._sock:
                await self._wait_for_listeners()
                if self._hop.node.ledger.lacking:
                    await self._send(self._sock)
        self._perform(self._hop.pass_over(trio.current_time()))

    def nack_received(self, message: Nack) -> None:
        """Take note of what nodes lack; raises KaError PROTOCOL."""
        if self._sender is not None:
            self._sender.nack_received(message, trio.current_time())

    async def _wait_for_listeners(self) -> None:
        ledger = self._hop.node.ledger
        began_s = news_s = trio.current_time()
        count = 0
        while ledger.open_ranks() & ~ledger.ready:
            now = trio.current_time()
            if ledger.ready.bit_count() != count:
                count, news_s = ledger.ready.bit_count(), now
            if count and now - news_s > max(QUIET_S, (news_s - began_s) / 2):
                return
            await trio.sleep(LOOK_S)

    async def _send(self, sock: socket.socket) -> None:
        ledger = self._hop.node.ledger
        count = max(1, (ledger.ready & ledger.open_ranks()).bit_count())
        sender = Sender(self._manifest, count, self._options(), chunks=ledger.lacking)
        self._sender = sender
        self._total_s = trio.current_time()
        sender.start(self._total_s)
        sent_count = 0
        while not sender.finished:
            now = trio.current_time()
            found = sender.next_datagram(now)
            if found is None:
                self._check_heard(sender, now)
                await trio.sleep(max(NAP_S, sender.wake_s - now))
                continue
            try:
                await self._send_one(sock, found)
            except (OSError, KaError) as error:
                # Unreadable, or unreachable: hops will find out, and tell.
                _log.warning("multicast.stopped", reason=str(error))
                return
            sent_count += 1
            if sent_count % TURN_COUNT == 0:
                await trio.lowlevel.checkpoint()

    def _options(self) -> MulticastOptions:
        """Go by what the links are known for; else begin slowly."""
        options = self._hop.node.options
        rate = min(options.rate_limit or math.inf, LINK_SHARE * options.expected_rate or math.inf)
        if math.isfinite(rate):
            return MulticastOptions(rate_max=rate, rate_min=min(rate, RATE_MIN))
        return MulticastOptions(rate_start=RATE_START, rate_min=RATE_MIN)

    async def _send_one(self, sock: socket.socket, found: Outgoing) -> None:
        data = memoryview(await self._chunk(found.chunk) if found.size else b"")
        piece = data[found.offset : found.offset + found.size]
        header = self._codec.header(found.kind, found.chunk, found.piece, piece)
        while True:
            try:
                sock.sendmsg((header, piece))
            except BlockingIOError:
                await trio.lowlevel.wait_writable(sock)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                await trio.sleep(NAP_S)
            else:
                self._depot.sent_size += len(piece)
                return

    async def _chunk(self, chunk: int) -> bytes:
        found = self._kept.get(chunk)
        if found is None:
            found = await trio.to_thread.run_sync(self._store.read, chunk)
            self._kept[chunk] = found
            if len(self._kept) > KEPT_COUNT:
                del self._kept[next(iter(self._kept))]
        return found

    def _check_heard(self, sender: Sender, now: float) -> None:
        total_count = self._hop.downs[-1].total()
        if total_count != self._total_count:
            self._total_count, self._total_s = total_count, now
        elif now - self._total_s > DEAF_S:
            _log.warning("multicast.unheard", seconds=DEAF_S)
            sender.stop()


class Hearing:
    """The pass of any other node."""

    def __init__(
        self,
        sock: socket.socket | None,
        codec: DatagramCodec,
        manifest: Manifest,
        hop: Hop,
        depot: Depot,
        perform: Perform,
    ) -> None:
        """Take over the socket; None: nothing is heard."""
        count = min(256, max(8, PARTIAL_SIZE_MAX // manifest.chunk_size))
        options = MulticastOptions(partial_count_max=count)
        self._sock = sock
        self._codec = codec
        self._manifest = manifest
        self._hop = hop
        self._depot = depot
        self._perform = perform
        self._receiver = Receiver(manifest, options, have=hop.node.have)
        self._buffer = memoryview(bytearray(HEADER_SIZE + options.payload_size + 1))
        self._chunks: dict[int, memoryview] = {}
        """What has come of chunks that are not whole."""

    async def run(self) -> None:
        """Collect chunks until the pass is over."""
        if self._sock is None:
            return
        with self._sock:
            self._receiver.start(trio.current_time())
            while self._hop.passing.is_on and not self._hop.finished:
                if self._depot.is_behind:
                    await trio.sleep(BEHIND_S)
                else:
                    with trio.move_on_at(self._receiver.wake_s):
                        await trio.lowlevel.wait_readable(self._sock)
                    self._drain(self._sock)
                now = trio.current_time()
                if now >= self._receiver.wake_s:
                    self._tick(now)
                if self._receiver.over:
                    self._perform(self._hop.pass_over(now))
        for chunk, data in self._chunks.items():
            self._depot.give_back(chunk, data)

    def nack_received(self, message: Nack) -> None:
        """Take note of what a child lacks; raises KaError PROTOCOL."""
        self._receiver.nack_received(message, trio.current_time())

    def _drain(self, sock: socket.socket) -> None:
        now = trio.current_time()
        for _ in range(TURN_COUNT):
            try:
                size = sock.recv_into(self._buffer)
            except OSError:
                return
            datagram = self._codec.decode(self._buffer[:size])
            if datagram is not None:
                for action in self._receiver.datagram_received(datagram, now):
                    self._take(action, datagram.payload)

    def _take(self, action: Place | Complete | Discard, payload: memoryview) -> None:
        match action:
            case Place(chunk, offset):
                data = self._chunks.get(chunk)
                if data is None:
                    data = self._depot.lend(self._manifest.extent(chunk)[1])
                    self._chunks[chunk] = data
                data[offset : offset + len(payload)] = payload
            case Complete(chunk):
                self._complete(chunk)
            case Discard(chunk):
                self._discard(chunk)

    def _complete(self, chunk: int) -> None:
        intact, looked_at = self._depot.hold(chunk, self._chunks.pop(chunk))
        now = trio.current_time()
        try:
            self._receiver.chunk_checked(chunk, intact, now)
            if intact:
                self._perform(self._hop.chunk_heard(chunk, now))
        finally:
            looked_at()

    def _discard(self, chunk: int) -> None:
        data = self._chunks.pop(chunk, None)
        if data is not None:
            self._depot.give_back(chunk, data)

    def _tick(self, now: float) -> None:
        parent = self._hop.ups[-1]
        for action in self._receiver.tick(now):
            if isinstance(action, Discard):
                self._discard(action.chunk)
            elif parent.state is UpstreamState.ATTACHED:
                self._perform([Send(parent.parent, action.message)])
