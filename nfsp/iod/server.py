"""The data I/O daemon: the chunk store behind the wire.

Every disk operation runs in a worker thread (`THREADS_MAX` of them); a read's payload goes from
the file to the socket by sendfile.  The store keeps the order per chunk file.  Requests of an
older connection of the same client never run beside those of its newer one (`endpoint.serve`),
so a write that was given up and repeated cannot arrive late and undo a newer one.

A request made under an older cluster map than the mds has announced is refused (EPOCH_STALE).

Not here: what files look like (`nfsp.striping`), who may write what (the cluster key decides).
"""

from __future__ import annotations

import os
import secrets
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import trio

from common import codec, log, metrics
from common.endpoint import listen, parse_address, serve
from common.errors import Code, KaError
from common.metrics import counter
from common.session import Identity
from common.transport import Connection, FilePayload, Reply
from nfsp import wire
from nfsp.config import ClusterConfig, IodConfig
from nfsp.iod.chunkstore import ChunkStore, Place, ReadPlan
from nfsp.model import CHUNK_SIZE_MAX

__all__ = ["IodServer", "run_iod"]

THREADS_MAX = 16
"""Enough to keep a disk busy; more only queue in the kernel."""
SETTLE_INTERVAL_S = 5.0
LIST_COUNT_MAX = 1000
NOW_SIZE_MAX = 128 * 1024
"""Up to here a thread costs more than the memory's work; beyond, sendfile is worth one."""

_log = log.get("nfsp.iod")
_bytes_read = counter("nfsp_iod_read_bytes_total", "Bytes of chunks sent to readers")
_bytes_written = counter("nfsp_iod_written_bytes_total", "Bytes of chunks stored")
_requests = counter("nfsp_iod_requests_total", "Requests served", "operation")
_reads = _requests.labels(wire.Read.__name__)
_writes = _requests.labels(wire.Write.__name__)
_locates = _requests.labels(wire.Locate.__name__)
_corrupt = counter("nfsp_iod_corrupt_total", "Reads refused because stored data are damaged")

_T = TypeVar("_T")
_DONE = Reply(wire.IOD.encode(wire.IodDone()))


class IodServer:
    """Answers requests from one chunk store."""

    def __init__(self, store: ChunkStore, iod: int) -> None:
        self._store = store
        self._iod = iod
        self._written = Reply(wire.IOD.encode(wire.IodDone(store.boot_id)))
        self._epoch = 0
        self._threads = trio.CapacityLimiter(THREADS_MAX)
        self._turns: dict[tuple[int, int], trio.Lock] = {}
        self._started = time.time()
        self._log = _log.bind(iod=iod)
        self._handlers: dict[type, Callable[[Any, memoryview | None], Awaitable[Reply]]] = {
            wire.SyncChunks: self._sync,
            wire.Trim: self._trim,
            wire.Zero: self._zero,
            wire.Remove: self._remove,
            wire.ListChunks: self._list,
            wire.Extents: self._extents,
            wire.Verify: self._verify,
            wire.IodStatFs: self._statfs,
            wire.IodStatus: self._status,
        }

    def handle(
        self, connection: Connection, body: bytes, payload: memoryview | None
    ) -> Reply | Awaitable[Reply | None]:
        """The transport's handler."""
        message = wire.IOD.decode(body)
        if type(message) is wire.Fence:
            return self._fence(connection, message)
        if type(message) is wire.Read:
            return self._read_now(message) or self._read(message)
        if type(message) is wire.Write:
            return self._write_new(message, payload) or self._write(message, payload)
        if type(message) is wire.Locate:
            return self._locate_now(message) or self._locate(message)
        handler = self._handlers.get(type(message))
        if handler is None:
            raise KaError(Code.PROTOCOL, f"{type(message).__name__} is not a request")
        self._check_epoch(getattr(message, "epoch", self._epoch))
        _requests.labels(type(message).__name__).inc()
        return handler(message, payload)

    def _check_epoch(self, epoch: int) -> None:
        if epoch < self._epoch:
            raise KaError(Code.EPOCH_STALE, f"cluster map {epoch}, this iod knows {self._epoch}")

    async def settle_for_ever(self) -> None:
        """Write down, in quiet moments, what has become durable."""
        while True:
            await trio.sleep(SETTLE_INTERVAL_S)
            try:
                await self._in_thread(self._store.settle)
            except KaError as error:
                self._log.warning("settle.failed", reason=str(error))

    async def _in_thread(self, call: Callable[..., _T], *args: object) -> _T:
        return await trio.to_thread.run_sync(call, *args, limiter=self._threads)

    @asynccontextmanager
    async def _turn(self, ino: int, column: int) -> AsyncIterator[None]:
        """Let the writes of a chunk file pass one by one, as they came.

        The store would hold them back too, but in threads, and in any order: a stream then no
        longer looks like one.
        """
        key = (ino, column)
        turn = self._turns.get(key)
        if turn is None:
            turn = self._turns[key] = trio.Lock()
        try:
            async with turn:
                yield
        finally:
            statistics = turn.statistics()
            if not statistics.locked and not statistics.tasks_waiting:
                self._turns.pop(key, None)

    def _fence(self, connection: Connection, message: wire.Fence) -> Reply:
        if connection.role != "mds":
            raise KaError(Code.EPERM, "only an mds announces a cluster map")
        if message.epoch > self._epoch:
            self._log.info("map.announced", epoch=message.epoch)
            self._epoch = message.epoch
        return _DONE

    def _write_new(self, m: wire.Write, payload: memoryview | None) -> Reply | None:
        """Store a small file's first bytes here and now: a thread would cost more.

        A file that does not exist is made and written in memory; there is nothing to be read, no
        barrier to wait for, nobody to race with.
        """
        self._check_epoch(m.epoch)
        if payload is None or len(m.sums) % 8:
            raise KaError(Code.PROTOCOL, "a write without data or sums")
        _writes.inc()
        key = (m.ino, m.column)
        if len(payload) > NOW_SIZE_MAX or m.sync or key in self._turns:
            return None
        if self._store.exists(*key):
            return None
        self._store_payload(m, payload)
        return self._written

    async def _write(self, m: wire.Write, payload: memoryview | None) -> Reply:
        assert payload is not None
        async with self._turn(m.ino, m.column):
            await self._in_thread(self._store_payload, m, payload)
        return self._written

    def _store_payload(self, m: wire.Write, payload: memoryview) -> None:
        sums = struct.unpack(f"<{len(m.sums) // 8}Q", m.sums)
        self._store.write(
            m.ino, m.column, m.row, m.offset, [payload], sums,
            chunk_size=m.chunk_size, sync=m.sync,
        )  # fmt: skip
        _bytes_written.inc(len(payload))

    def _read_now(self, m: wire.Read) -> Reply | None:
        """Answer a small read from memory, here and now: a thread would cost more than the read."""
        self._check_epoch(m.epoch)
        if not 0 < m.length <= CHUNK_SIZE_MAX:
            raise KaError(Code.EINVAL, "a read of no or too many bytes")
        _reads.inc()
        if m.verified or m.length > NOW_SIZE_MAX:
            return None
        found = self._store.read_now(
            m.ino, m.column, m.row, m.offset, m.length, chunk_size=m.chunk_size
        )
        return None if found is None else self._data(*found)

    def _data(self, sums: list[int], data: bytes) -> Reply:
        _bytes_read.inc(len(data))
        body = wire.IOD.encode(wire.ReadReply(struct.pack(f"<{len(sums)}Q", *sums)))
        return Reply(body, data or None)

    async def _read(self, m: wire.Read) -> Reply:
        if m.verified:
            return await self._read_verified(m)

        def plan() -> ReadPlan:
            found = self._store.read(
                m.ino, m.column, m.row, m.offset, m.length, chunk_size=m.chunk_size
            )
            if found.length:  # the disk is at work before sendfile has to wait for it
                os.posix_fadvise(
                    found.fd, found.file_offset, found.length, os.POSIX_FADV_WILLNEED
                )
            return found

        with self._noting_damage(m):
            found = await self._in_thread(plan)
        body = wire.IOD.encode(wire.ReadReply(struct.pack(f"<{len(found.sums)}Q", *found.sums)))
        _bytes_read.inc(found.length)
        if not found.length:
            found.release()
            return Reply(body)
        return Reply(body, FilePayload(found.fd, found.file_offset, found.length, found.release))

    async def _read_verified(self, m: wire.Read) -> Reply:
        def read() -> tuple[list[int], bytes]:
            return self._store.read_verified(
                m.ino, m.column, m.row, m.offset, m.length, chunk_size=m.chunk_size
            )

        with self._noting_damage(m):
            sums, data = await self._in_thread(read)
        return self._data(sums, data)

    def _locate_now(self, m: wire.Locate) -> Reply | None:
        self._check_epoch(m.epoch)
        _locates.inc()
        found = self._store.locate_now(m.ino, m.column, m.row, chunk_size=m.chunk_size)
        return None if found is None else _place_reply(found)

    async def _locate(self, m: wire.Locate) -> Reply:
        def locate() -> Place | None:
            return self._store.locate(m.ino, m.column, m.row, chunk_size=m.chunk_size)

        with self._noting_damage(m):
            return _place_reply(await self._in_thread(locate))

    async def _sync(self, m: wire.SyncChunks, payload: memoryview | None) -> Reply:
        if m.boot and m.boot != self._store.boot_id:
            raise KaError(Code.DATA_LOST, "this machine was started anew since the data came")
        await self._in_thread(self._store.sync_many, _pairs(m.files))
        return _DONE

    async def _trim(self, m: wire.Trim, payload: memoryview | None) -> Reply:
        def trim() -> None:
            self._store.trim(
                m.ino, m.column, row=m.row, offset=m.offset, chunk_size=m.chunk_size
            )

        await self._in_thread(trim)
        return _DONE

    async def _zero(self, m: wire.Zero, payload: memoryview | None) -> Reply:
        def zero() -> None:
            self._store.zero(
                m.ino, m.column, m.row, m.offset, m.length, chunk_size=m.chunk_size
            )

        await self._in_thread(zero)
        return _DONE

    async def _remove(self, m: wire.Remove, payload: memoryview | None) -> Reply:
        files = _pairs(m.files)

        def remove() -> None:
            for ino, column in files:
                self._store.remove(ino, column)

        await self._in_thread(remove)
        return _DONE

    async def _list(self, m: wire.ListChunks, payload: memoryview | None) -> Reply:
        after = (m.after_ino, m.after_column) if m.after_ino > 0 else None
        limit = max(1, min(m.count_max, LIST_COUNT_MAX))
        files = await self._in_thread(self._store.list, after, limit)
        rows = [[file.inode, file.column, file.size, file.allocated_size] for file in files]
        return Reply(wire.IOD.encode(wire.ListChunksReply(rows)))

    async def _extents(self, m: wire.Extents, payload: memoryview | None) -> Reply:
        def extents() -> wire.ExtentsReply:
            found, next_row = self._store.extents(
                m.ino, m.column, chunk_size=m.chunk_size, row=m.row,
                rows_max=max(1, min(m.row_count_max, LIST_COUNT_MAX)),
            )  # fmt: skip
            rows = [[one.row, one.start, one.end - one.start] for one in found]
            return wire.ExtentsReply(rows, -1 if next_row is None else next_row)

        return Reply(wire.IOD.encode(await self._in_thread(extents)))

    async def _verify(self, m: wire.Verify, payload: memoryview | None) -> Reply:
        findings = await self._in_thread(self._store.verify, m.ino, m.column)
        lines = [
            f"inode {one.inode} column {one.column} row {one.row} block {one.block}: {one.message}"
            for one in findings
        ]
        return Reply(wire.IOD.encode(wire.VerifyReply(lines)))

    async def _statfs(self, m: wire.IodStatFs, payload: memoryview | None) -> Reply:
        usage = await self._in_thread(self._store.usage)
        reply = wire.IodStatFsReply(usage.total_bytes, usage.free_bytes, usage.available_bytes)
        return Reply(wire.IOD.encode(reply))

    async def _status(self, m: wire.IodStatus, payload: memoryview | None) -> Reply:
        usage = await self._in_thread(self._store.usage)
        status = {
            "iod": self._iod,
            "uptime_s": round(time.time() - self._started, 3),
            "map_epoch": self._epoch,
            "total_bytes": usage.total_bytes,
            "free_bytes": usage.free_bytes,
            "available_bytes": usage.available_bytes,
            "metrics": metrics.values(),
        }
        return Reply(wire.IOD.encode(wire.IodStatusReply(codec.encode(status))))

    @contextmanager
    def _noting_damage(self, m: wire.Read | wire.Locate) -> Iterator[None]:
        try:
            yield
        except KaError as error:
            if error.code is Code.CHUNK_CORRUPT:
                _corrupt.inc()
                self._log.error(
                    "read.corrupt", ino=m.ino, column=m.column, row=m.row, reason=str(error)
                )
            raise


def _place_reply(place: Place | None) -> Reply:
    if place is None:
        return Reply(wire.IOD.encode(wire.LocateReply(b"", 0, 0, b"")))
    sums = struct.pack(f"<{len(place.sums)}Q", *place.sums)
    path = os.fsencode(place.path)
    return Reply(wire.IOD.encode(wire.LocateReply(path, place.file_inode, place.offset, sums)))


def _pairs(files: list[Any]) -> list[tuple[int, int]]:
    """Return the (inode, column) pairs of a message."""
    pairs = []
    for item in files:
        if type(item) is not list or len(item) != 2 or {type(part) for part in item} != {int}:
            raise KaError(Code.PROTOCOL, "not a list of (inode, column) pairs")
        pairs.append((item[0], item[1]))
    return pairs


async def run_iod(
    config: ClusterConfig, iod: IodConfig, key: bytes, *, ready: Callable[[], None]
) -> None:
    """Serve one iod until cancelled; `ready` is called when it can be reached."""
    identity = Identity(config.cluster.id, "iod", f"iod{iod.id}", secrets.token_bytes(16))
    sockets = listen(iod.address, iod.socket)
    if iod.metrics:
        metrics.serve_http(*parse_address(iod.metrics))
    store = await trio.to_thread.run_sync(
        lambda: ChunkStore(iod.data, reserve_bytes=iod.reserve)
    )
    try:
        server = IodServer(store, iod.id)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.settle_for_ever)
            _log.info("iod.started", iod=iod.id, address=iod.address, data=iod.data)
            ready()
            await serve(sockets, identity=identity, key=key, handler=server.handle)
    finally:
        for sock in sockets:
            sock.close()
        store.close()
