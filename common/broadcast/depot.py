"""The depot: chunks in memory, on their way from a connection to the sink and to other nodes.

A chunk is received into a pooled buffer.  One worker thread writes what waits, all of it in one
call.  A chunk that is to be sent on is best sent by the kernel from the sink's file, which saves
copying it once more; so it waits for its write, unless writing has become slow: then it is sent
from memory, and a disk that blocks delays nothing but its own node's acks.

A buffer goes back to the pool when it is written and all connections are done with it.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from common import log
from common.broadcast.edge import chunk_header
from common.broadcast.manifest import Manifest
from common.broadcast.store import Sink, Store
from common.broadcast.switchboard import Switchboard
from common.buffers import BufferPool
from common.errors import KaError
from common.outbox import FilePayload

__all__ = ["Depot", "reason_of"]

PROMPT_S = 0.02
"""A write that takes longer is not waited for."""

_log = log.get("ka.depot")


class _Held:
    """A chunk in memory, and how many still need it."""

    __slots__ = ("count", "data", "deferred")

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.count = 1
        self.deferred: list[int] = []
        """Peers that it will be sent to once it is written."""


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
        """Bytes of chunks handed to connections."""
        self._manifest = manifest
        self._store = store
        self._sink = sink
        self._board = board
        self._work = work
        self._pool = BufferPool()
        self._held: dict[int, _Held] = {}
        self._waiting: list[int] = []
        """Chunks to be written."""
        self._wanted = trio.Event()
        self._write_began_s: float | None = None

    # ------------------------------------------------------------ coming

    def lend(self, size: int) -> memoryview:
        return self._pool.take(size)

    def give_back(self, data: memoryview) -> None:
        self._pool.give(data)

    def hold(self, chunk: int, data: memoryview) -> Callable[[], None]:
        """Keep an intact chunk while the hop looks at it; call what is returned afterwards."""
        held = _Held(data)
        is_first = chunk not in self._held
        if is_first:
            self._held[chunk] = held

        def looked_at() -> None:
            if is_first and chunk not in self._waiting:
                del self._held[chunk]  # the hop has it already, or wants it no more
            self._let_go(held)

        return looked_at

    def write(self, chunk: int) -> None:
        """Hand a chunk that is held to the sink."""
        self._held[chunk].count += 1
        self._waiting.append(chunk)
        self._wanted.set()

    def _let_go(self, held: _Held) -> None:
        held.count -= 1
        if not held.count:
            self._pool.give(held.data)

    # ------------------------------------------------------------ going

    def send(self, peer: int, chunk: int) -> None:
        """Send a chunk that this node has, from wherever that is cheapest."""
        held = self._held.get(chunk)
        place = self._store.locate(chunk)
        self.sent_size += self._manifest.extent(chunk)[1]
        if held is not None:
            if place is not None and self._writes_promptly():
                held.deferred.append(peer)
            else:
                self._send_held(peer, chunk, held)
        elif place is not None:
            self._send_file(peer, chunk, *place)
        else:
            self._work.start_soon(self._send_read, peer, chunk)

    def hurry(self) -> None:
        """Send what has waited for a write for too long."""
        if not self._writes_promptly():
            for chunk, held in self._held.items():
                self._send_deferred(chunk, held)
            self._board.flush()

    def _writes_promptly(self) -> bool:
        began_s = self._write_began_s
        return began_s is None or trio.current_time() - began_s < PROMPT_S

    def _header(self, chunk: int, size: int) -> bytes:
        return chunk_header(self._manifest.transfer_id, chunk, size)

    def _send_held(self, peer: int, chunk: int, held: _Held) -> None:
        held.count += 1
        frame = (self._header(chunk, len(held.data)), held.data)
        self._board.put(peer, frame, lambda: self._let_go(held))

    def _send_file(self, peer: int, chunk: int, fd: int, offset: int) -> None:
        size = self._manifest.extent(chunk)[1]
        frame = (self._header(chunk, size), FilePayload(fd, offset, size, _nothing))
        self._board.put(peer, frame)

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

    def _send_deferred(self, chunk: int, held: _Held) -> None:
        peers, held.deferred = held.deferred, []
        for peer in peers:
            self._send_held(peer, chunk, held)

    # ------------------------------------------------------------ writing

    async def run(self, written: Callable[[list[int], str], None]) -> None:
        """Write what waits, for ever; *written* gets the chunks that the sink has, or why not."""
        assert self._sink is not None
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            batch, self._waiting = self._waiting, []
            items = [(chunk, self._held[chunk].data) for chunk in batch]
            done: list[int] = []
            failure = ""
            self._write_began_s = trio.current_time()
            try:
                done = await trio.to_thread.run_sync(self._sink.write, items)
            except (OSError, KaError) as error:
                failure = reason_of(error)
            self._write_began_s = None
            for chunk in batch:
                self._written(chunk, failure)
            written(done, failure)

    def _written(self, chunk: int, failure: str) -> None:
        held = self._held.pop(chunk)
        place = self._store.locate(chunk)
        if place is None or failure:
            self._send_deferred(chunk, held)
        for peer in held.deferred:
            assert place is not None
            self._send_file(peer, chunk, *place)
        self._let_go(held)


def reason_of(error: OSError | KaError) -> str:
    """Return one line."""
    if isinstance(error, KaError):
        return str(error)
    return error.strerror or str(error)


def _nothing() -> None:
    pass
