"""The depot: chunks in memory, on their way from a connection to the sink and to other nodes.

A chunk is received into a pooled buffer.  What has come of it is written into the page cache,
summed and sent on at once, a piece at a time, while the processor's cache still holds it; what is
written the kernel sends on without another copy.  When a write has blocked, as behind a disk that
cannot follow, writing moves to a worker thread for a while, all that waits in one call, and chunks
are sent on from memory: so the disk delays nothing but its own node's acks.  A sink that may wait
for others is never written to but by the thread (`Sink.is_prompt`).

When the rest of a chunk does not come, or not soon, the frames that have begun are filled up with
whatever is there: the receivers' checks tell.

A buffer goes back to the pool when it is written and all connections are done with it.
"""

from __future__ import annotations

import resource
from collections.abc import Callable

import trio

from common import log
from common.broadcast.edge import chunk_header
from common.broadcast.manifest import Manifest
from common.broadcast.store import Sink, Store
from common.broadcast.switchboard import Switchboard
from common.buffers import BufferPool
from common.checksum import Summing
from common.errors import KaError
from common.outbox import FilePayload, Growing, GrowingPayload

__all__ = ["Depot", "reason_of"]

PROMPT_S = 0.01
"""A write that takes longer has blocked."""
WARY_S = 1.0
"""For this long writing is then left to the thread."""
BEHIND_COUNT = 16
"""Chunks that wait for the sink."""
PAUSE_MAX_S = 0.25
"""A chunk of which nothing comes for longer holds up those it is passed on to no more.

Meanwhile they hear nothing: together with a tick it must be well below `silence_s`."""

_log = log.get("ka.depot")


class _Held:
    """A chunk in memory, or what has come of it, and how many still need it."""

    __slots__ = ("count", "data", "growing", "grown_s", "summed_size", "summing", "takers")

    def __init__(self, data: memoryview, summing: Summing, now: float) -> None:
        self.data = data
        self.count = 1
        self.growing = Growing(data)
        self.grown_s = now
        self.takers: list[tuple[int, GrowingPayload]] = []
        """To whom it is sent on while it comes."""
        self.summing = summing
        self.summed_size = 0

    @property
    def is_written(self) -> bool:
        return self.growing.stored_size == len(self.data)


class Depot:
    """One node's chunks."""

    def __init__(
        self,
        manifest: Manifest,
        store: Store,
        sink: Sink | None,
        board: Switchboard,
        work: trio.Nursery,
    ) -> None:
        self.sent_size = 0
        """Bytes of chunks handed to connections, or to a multicast group."""
        self._manifest = manifest
        self._store = store
        self._sink = sink
        self._board = board
        self._work = work
        self._pool = BufferPool()
        self._coming: dict[int, _Held] = {}
        self._held: dict[int, _Held] = {}
        self._waiting: list[int] = []
        """Chunks to be written."""
        self._wanted = trio.Event()
        self._wary_until_s = 0.0
        self._done: list[int] = []
        self._failure = ""

    # ------------------------------------------------------------ coming

    def lend(self, size: int) -> memoryview:
        return self._pool.take(size)

    def came(self, chunk: int, data: memoryview, size: int, now: float) -> bool:
        """Note that *size* bytes have come; return whether the chunk is new here."""
        is_new = chunk not in self._coming
        if is_new:
            self._coming[chunk] = self._new(data, now)
        self._overtake(chunk, data, size, now)
        return is_new

    def _overtake(self, chunk: int, data: memoryview, size: int, now: float) -> None:
        """Let what is passed on grow by whoever is ahead: a new parent is quicker than a slow one.

        Should one of them be damaged, those it is passed on to find out, and so does this node.
        """
        held = self._coming.get(chunk)
        if held is None or size <= held.summed_size:
            return
        held.grown_s = now
        if held.data is not data:
            held.data[held.summed_size : size] = data[held.summed_size : size]
        if chunk not in self._held:
            self._put(chunk, held, size, now)
        self._take_in(held, size)

    def _new(self, data: memoryview, now: float) -> _Held:
        return _Held(data, self._manifest.algorithm.begin(), now)

    def _take_in(self, held: _Held, size: int) -> None:
        """Send on, and sum, what has come."""
        held.growing.grow(size)
        self._tell_peers(held)
        held.summing.update(held.data[held.summed_size : size])
        held.summed_size = size

    def give_back(self, chunk: int, data: memoryview) -> None:
        """The rest does not come."""
        held = self._take_coming(chunk, data)
        held.growing.give_up()
        self._tell_peers(held)
        self._let_go(held)

    def paused(self) -> list[int]:
        """Return the chunks that have stopped coming; they hold up nobody any more."""
        late_s = trio.current_time() - PAUSE_MAX_S
        found = [chunk for chunk, held in self._coming.items() if held.grown_s < late_s]
        for chunk in found:
            self._coming[chunk].growing.give_up()
            self._tell_peers(self._coming[chunk])
        return found

    def _take_coming(self, chunk: int, data: memoryview) -> _Held:
        held = self._coming.get(chunk)
        if held is None or held.data is not data:
            return self._new(data, trio.current_time())
        return self._coming.pop(chunk)

    def _tell_peers(self, held: _Held) -> None:
        for peer, _payload in held.takers:
            self._board.more_for(peer)

    def hold(self, chunk: int, data: memoryview) -> tuple[bool, Callable[[], None]]:
        """Keep a chunk that is complete while the hop looks at it.

        Return whether it is right, and what is to be called then.
        """
        self._overtake(chunk, data, len(data), trio.current_time())
        held = self._take_coming(chunk, data)
        self._take_in(held, len(data))
        is_right = held.summing.digest() == self._manifest.sum_at(chunk)
        is_first = chunk not in self._held
        if is_first:
            self._held[chunk] = held

        def looked_at() -> None:
            if is_first and chunk not in self._waiting:
                del self._held[chunk]  # the hop has it already, or wants it no more
            self._let_go(held)

        return is_right, looked_at

    def write(self, chunk: int) -> None:
        """Hand a chunk that is held to the sink; see `take_written`."""
        assert self._sink is not None
        held = self._held[chunk]
        self._put(chunk, held, len(held.data), trio.current_time())
        if held.is_written:
            self._done.append(chunk)
        elif not self._failure:
            held.count += 1
            self._waiting.append(chunk)
            self._wanted.set()

    def _put(self, chunk: int, held: _Held, size: int, now: float) -> None:
        """Write what is new of a chunk, if that takes no time."""
        sink = self._sink
        if sink is None or self._failure or now < self._wary_until_s:
            return
        if self._waiting or not sink.is_prompt:
            return
        growing = held.growing
        if growing.stored_size == size:
            return
        waits = _wait_count()
        try:
            sink.put(chunk, growing.stored_size, held.data[growing.stored_size : size])
        except (OSError, KaError) as error:
            self._failure = reason_of(error)
            return
        growing.stored_size = size
        # On a busy machine it may take long without having waited for anything.
        ended_s = trio.current_time()
        if ended_s - now > PROMPT_S and _wait_count() != waits:
            self._wary_until_s = ended_s + WARY_S

    @property
    def is_behind(self) -> bool:
        """Whether the sink has much to write: more need not be taken in now."""
        return len(self._held) >= BEHIND_COUNT

    def take_written(self) -> tuple[list[int], str]:
        """Return the chunks that the sink has taken since, and why it has failed, if it has."""
        found = self._done, self._failure
        self._done, self._failure = [], ""
        return found

    def _let_go(self, held: _Held) -> None:
        held.count -= 1
        if not held.count:
            self._pool.give(held.data)

    # ------------------------------------------------------------ going

    def send(self, peer: int, chunk: int) -> None:
        """Send a chunk that this node has, from wherever that is cheapest."""
        held = self._held.get(chunk)
        size = self._manifest.extent(chunk)[1]
        self.sent_size += size
        coming = self._coming.get(chunk)
        if held is None and coming is not None:
            coming.takers.append((peer, self._send_held(peer, chunk, coming)))
        elif held is not None and not held.is_written:
            self._send_held(peer, chunk, held)
        elif (place := self._store.locate(chunk)) is not None:
            frame = (self._header(chunk, size), FilePayload(*place, size, _nothing))
            self._board.put(peer, frame)
        elif held is not None:
            self._send_held(peer, chunk, held)
        else:
            self._work.start_soon(self._send_read, peer, chunk)

    def _header(self, chunk: int, size: int) -> bytes:
        return chunk_header(self._manifest.transfer_id, chunk, size)

    def _send_held(self, peer: int, chunk: int, held: _Held) -> GrowingPayload:
        held.count += 1
        held.growing.place = self._store.locate(chunk)
        payload = GrowingPayload(held.growing)
        frame = (self._header(chunk, len(held.data)), payload)
        self._board.put(peer, frame, lambda: self._let_go(held))
        return payload

    def break_off(self, peer: int, chunk: int) -> None:
        """Let a peer wait no longer for the rest of a chunk that is coming."""
        held = self._coming.get(chunk)
        for taker, payload in held.takers if held is not None else ():
            if taker == peer:
                payload.given_up = True
                self._board.more_for(peer)

    async def _send_read(self, peer: int, chunk: int) -> None:
        size = self._manifest.extent(chunk)[1]
        try:
            data = await trio.to_thread.run_sync(self._store.read, chunk)
        except (OSError, KaError) as error:
            _log.error("chunk.unreadable", chunk=chunk, reason=reason_of(error))
            data = b""
        # What cannot be read goes out as zeros: the receiver's check tells, and the edge goes on.
        frame = (self._header(chunk, size), data[:size].ljust(size, b"\0"))
        self._board.put(peer, frame)
        self._board.flush()

    async def is_right(self, chunk: int) -> bool:
        """Return whether the store still has what the manifest says."""
        try:
            data = await trio.to_thread.run_sync(self._store.read, chunk)
        except (OSError, KaError):
            return False
        return self._manifest.verify(chunk, data)

    # ------------------------------------------------------------ writing in the thread

    async def run(self, written: Callable[[], None]) -> None:
        """Write what waits, for ever; *written* is called when there is something to take."""
        assert self._sink is not None
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            batch, self._waiting = self._waiting, []
            items = [(chunk, self._held[chunk].data) for chunk in batch]
            began_s = trio.current_time()
            try:
                self._done += await trio.to_thread.run_sync(self._sink.write, items)
            except (OSError, KaError) as error:
                self._failure = reason_of(error)
            if trio.current_time() - began_s > PROMPT_S * len(items):
                self._wary_until_s = trio.current_time() + WARY_S
            for chunk in batch:
                self._let_go(self._held.pop(chunk))
            written()


def _wait_count() -> int:
    """Return how often this thread has given up the processor because it had to wait."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def reason_of(error: OSError | KaError) -> str:
    """Return one line."""
    if isinstance(error, KaError):
        return str(error)
    return error.strerror or str(error)


def _nothing() -> None:
    pass
