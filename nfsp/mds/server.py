"""The metadata server: requests to pure operations, their outcome to the engine.

One event loop serves everything, and an operation reads, decides and applies its batch without a
scheduling point in between: operations are atomic and in one order.  A new `await` between
reading and `apply` would be a change of correctness.

A mutation's batch holds its answer for the slot it came in, so a repetition is answered without
being carried out.  An answer is sent when the batch is in the journal; for durable sessions, and
for fsync, when it is on stable storage; after a truncation, when the iods have trimmed.

Tasks: one for each connection (`transport`), the engine's checkpoints, upkeep at the iods, the
reaper of silent sessions.

Not here: what an operation does (`create`, `namespace`, `rename`, `attributes`, `xattrs`,
`sessions`).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio

from common import codec, log, metrics
from common.errors import Code, KaError
from common.metrics import counter
from common.transport import Connection, Reply
from nfsp import keys, wire
from nfsp.clock import now_ns
from nfsp.mds import attributes, create, namespace, rename, sessions, xattrs
from nfsp.mds.engine import Engine, Snapshot
from nfsp.mds.opentable import ClientSession, OpenTable
from nfsp.mds.placement import Placement
from nfsp.mds.queues import wait_trim
from nfsp.mds.upkeep import Upkeep
from nfsp.mds.view import Context, Effect, Opened, Outcome, TrimReady, View, integer
from nfsp.model import ClusterMap, Inode, Superblock

__all__ = ["MdsServer"]

SESSIONS_MAX = 10_000
SLOTS_MAX = 1024
EXPIRE_COUNT = 200
"""Records in one batch while a session is taken apart: keeps the others' wait short."""
ROOM_PATIENCE_S = 10.0
SNAPSHOT_COUNT_MAX = 5000
SNAPSHOT_SIZE_MAX = 1 << 20
"""Of records in one answer; an extended attribute alone has up to 64 KiB."""
SCAN_COUNT = 32
"""Records read at once, since what does not fit is read again."""

_log = log.get("nfsp.mds")
_requests = counter("nfsp_mds_requests_total", "Requests served", "operation")
_repeats = counter("nfsp_mds_repeats_total", "Mutations answered from the record")
_expired = counter("nfsp_mds_sessions_expired_total", "Sessions that ran out")

_Read = Callable[[View, Any], Any]
_Mutation = Callable[[View, Any, Context], Outcome]

READS: dict[type, _Read] = {
    wire.Lookup: namespace.lookup,
    wire.GetAttr: namespace.get_attr,
    wire.ReadDir: namespace.read_dir,
    wire.ListXattr: xattrs.list_xattr,
}
MUTATIONS: dict[type, _Mutation] = {
    wire.Create: create.create,
    wire.Link: namespace.link,
    wire.Unlink: namespace.unlink,
    wire.Rmdir: namespace.rmdir,
    wire.Rename: rename.rename,
    wire.SetAttr: attributes.set_attr,
    wire.SetXattr: xattrs.set_xattr,
    wire.RemoveXattr: xattrs.remove_xattr,
    wire.Wrote: attributes.wrote,
}
_DONE = Reply(wire.MDS.encode(wire.Done()))


class MdsServer:
    """Serves one shard from an engine."""

    def __init__(
        self, engine: Engine, upkeep: Upkeep, cluster_map: ClusterMap, *, session_ttl_s: float
    ) -> None:
        self._engine = engine
        self._epoch = engine.epoch
        self._upkeep = upkeep
        self._ttl_s = session_ttl_s
        record = engine.get(keys.SUPERBLOCK)
        assert record is not None
        self._superblock = record
        self._cluster_map = cluster_map
        self._placement = Placement(Superblock.decode(record).layout, cluster_map)
        self._table = OpenTable()
        self._sequence = 0
        self._connections: dict[int, Connection] = {}
        """By session: the connection that speaks for it."""
        self._snapshots: dict[Connection, Snapshot] = {}
        self._started_at = time.time()
        self._special: dict[type, Callable[[Connection, Any], Reply | Awaitable[Reply | None]]] = {
            wire.SessionOpen: self._session_open,
            wire.SessionResume: self._session_resume,
            wire.SessionRenew: self._session_renew,
            wire.SessionClose: self._session_close,
            wire.Open: self._open,
            wire.GetXattr: self._getxattr,
            wire.StatFs: self._statfs,
            wire.Sync: self._sync,
            wire.Status: self._status,
            wire.SnapshotOpen: self._snapshot_open,
            wire.SnapshotScan: self._snapshot_scan,
            wire.SnapshotClose: self._snapshot_close,
            wire.Repair: self._repair,
        }
        self._load_sessions()

    # ------------------------------------------------------------ requests

    def handle(
        self, connection: Connection, body: bytes, payload: memoryview | None
    ) -> Reply | Awaitable[Reply | None] | None:
        """The transport's handler."""
        message = wire.MDS.decode(body)
        try:
            return self._dispatch(connection, message)
        except KaError as error:
            if error.code is Code.ENGINE_DAMAGED:
                _log.error("store.damaged", request=type(message).__name__, reason=str(error))
            raise

    def _dispatch(
        self, connection: Connection, message: Any
    ) -> Reply | Awaitable[Reply | None] | None:
        kind = type(message)
        session: ClientSession | None = connection.state
        if session is not None:
            session.seen_at = trio.current_time()
        _requests.labels(kind.__name__).inc()
        read = READS.get(kind)
        if read is not None:
            return Reply(wire.MDS.encode(read(self._engine, message)))
        if kind in MUTATIONS:
            return self._mutate(self._session_of(connection), message)
        if kind is wire.Close:
            self._close(self._session_of(connection), message)
            return None
        special = self._special.get(kind)
        if special is None:
            raise KaError(Code.PROTOCOL, f"{kind.__name__} is not a request")
        return special(connection, message)

    def _session_of(self, connection: Connection) -> ClientSession:
        session: ClientSession | None = connection.state
        if session is None or session.session not in self._table.sessions:
            raise KaError(Code.SESSION_UNKNOWN, "this connection has no session")
        return session

    def _context(self, session: int) -> Context:
        return Context(
            session, now_ns(), self._table.is_open, self._table.is_written, self._placement
        )

    def apply(self, writes: dict[bytes, bytes | None]) -> int:
        """Apply a batch under our epoch; what `Upkeep` and the reaper write through."""
        self._sequence = self._engine.apply(writes, epoch=self._epoch)
        return self._sequence

    def _mutate(
        self, session: ClientSession, message: Any
    ) -> Reply | Awaitable[Reply | None]:
        answer = sessions.replay(
            self._engine, session.session, message.slot, message.sequence
        )
        if answer is not None:
            return self._repeat(session, message, answer)
        if message.slot >= SLOTS_MAX:
            raise KaError(Code.PROTOCOL, "no such slot")
        operation = MUTATIONS[type(message)]
        outcome = operation(self._engine, message, self._context(session.session))
        body = wire.MDS.encode(outcome.reply)
        outcome.writes.update(
            sessions.answered(session.session, message.slot, message.sequence, body)
        )
        try:
            sequence = self.apply(outcome.writes)
        except KaError as error:
            if error.code is Code.BUSY:
                return self._mutate_later(session, message)
            raise
        durable = session.durable or (type(message) is wire.Wrote and message.durable)
        return self._settle(session, outcome.follow_up, body, sequence if durable else 0)

    async def _mutate_later(self, session: ClientSession, message: Any) -> Reply | None:
        """The engine is full: decide again when it has room."""
        with trio.move_on_after(ROOM_PATIENCE_S):
            await self._engine.wait_room()
        result = self._mutate(session, message)
        return result if isinstance(result, Reply) else await result

    def _repeat(
        self, session: ClientSession, message: Any, answer: bytes
    ) -> Reply | Awaitable[Reply | None]:
        """Answer a mutation that has been carried out; the table may have to learn it anew."""
        _repeats.inc()
        effects: tuple[Effect, ...] = ()
        if type(message) is wire.Create and message.open:
            inode = Inode.decode(wire.MDS.decode(answer).inode)
            effects = (Opened(inode.ino, True),)
            # A resumption in between did not name it, and so has closed it.
            writes = sessions.writer_record(self._engine, session.session, inode.ino)
            if writes:
                self.apply(writes)
        elif type(message) is wire.SetAttr:
            effects = wait_trim(self._engine, message.ino)
        durable = session.durable or (type(message) is wire.Wrote and message.durable)
        return self._settle(session, effects, answer, self._sequence if durable else 0)

    def _settle(
        self, session: ClientSession, effects: tuple[Effect, ...], body: bytes, durable: int
    ) -> Reply | Awaitable[Reply | None]:
        """Do what an applied outcome asks for, then answer."""
        trims = self._take_effects(session, effects)
        if not trims and not durable:
            return Reply(body)
        return self._answer_later(trims, body, durable)

    def _take_effects(
        self, session: ClientSession | None, effects: tuple[Effect, ...]
    ) -> list[TrimReady]:
        trims = []
        for effect in effects:
            if isinstance(effect, Opened):
                assert session is not None
                self._table.opened(session, effect.ino, writable=effect.writable)
            elif isinstance(effect, TrimReady):
                trims.append(effect)
            else:
                self._upkeep.wake()
        return trims

    async def _answer_later(self, trims: list[TrimReady], body: bytes, durable: int) -> Reply:
        for trim in trims:
            await self._upkeep.trim(trim.ino, trim.remains, trim.end)
        if durable:
            await self._engine.wait_durable(durable)
        return Reply(body)

    # ------------------------------------------------------------ opening and closing

    def _open(self, connection: Connection, m: wire.Open) -> Reply | Awaitable[Reply | None]:
        session = self._session_of(connection)
        outcome = sessions.open_inode(self._engine, m, self._context(session.session))
        if outcome.writes:
            self.apply(outcome.writes)
        return self._settle(session, outcome.follow_up, wire.MDS.encode(outcome.reply), 0)

    def _close(self, session: ClientSession, m: wire.Close) -> None:
        if not self._table.closed(session, m.ino, m.open_count):
            return
        outcome = sessions.close_inode(self._engine, m, self._context(session.session))
        if outcome.writes:
            self.apply(outcome.writes)
        if self._take_effects(session, outcome.follow_up):
            self._upkeep.wake()

    # ------------------------------------------------------------ sessions

    def _load_sessions(self) -> None:
        now = trio.current_time()
        for key, record in self._engine.scan(b"s", b"t", SESSIONS_MAX):
            host, pid, mountpoint, durable = codec.decode(record)
            self._table.add(
                ClientSession(
                    int.from_bytes(key[1:]), host, pid, mountpoint, durable, now, False
                )
            )

    def _session_open(self, connection: Connection, m: wire.SessionOpen) -> Reply:
        if len(self._table.sessions) >= SESSIONS_MAX:
            raise KaError(Code.BUSY, f"{SESSIONS_MAX} sessions are open")
        number = integer(self._engine, keys.NEXT_SESSION)
        record = codec.encode((m.host, m.pid, m.mountpoint, m.durable))
        self.apply({keys.NEXT_SESSION: codec.encode(number + 1), keys.session(number): record})
        session = ClientSession(
            number, m.host, m.pid, m.mountpoint, m.durable, trio.current_time(), True
        )
        self._table.add(session)
        self._bind(connection, session)
        _log.info("session.opened", session=number, host=m.host, mountpoint=m.mountpoint)
        return self._welcome(session)

    def _session_resume(self, connection: Connection, m: wire.SessionResume) -> Reply:
        session = self._table.sessions.get(m.session)
        if session is None:
            raise KaError(Code.SESSION_UNKNOWN, "this session has expired")
        opens = _opens(m.opens)
        writes, stale = sessions.reopen(self._engine, session.session, opens)
        if writes:
            self.apply(writes)
        closed = self._table.resume(session, [item for item in opens if item[0] not in stale])
        session.seen_at = trio.current_time()
        self._bind(connection, session)
        for ino in closed:
            self._forget_open(session, ino)
        if self._table.complete:
            self._sweep()
        _log.info(
            "session.resumed", session=m.session, host=session.host, opens=len(opens),
            stale=len(stale),
        )  # fmt: skip
        return self._welcome(session, stale)

    def _bind(self, connection: Connection, session: ClientSession) -> None:
        """Let a connection, and no other, speak for a session."""
        before = self._connections.get(session.session)
        if before is not None and before is not connection:
            before.close("another connection took over the session")
        connection.state = session
        self._connections[session.session] = connection

    def _forget_open(self, session: ClientSession, ino: int) -> None:
        message = wire.Close(ino, 1)
        outcome = sessions.close_inode(self._engine, message, self._context(session.session))
        if outcome.writes:
            self.apply(outcome.writes)
        self._take_effects(session, outcome.follow_up)
        self._upkeep.wake()

    def _session_renew(self, connection: Connection, m: wire.SessionRenew) -> Reply:
        return self._welcome(self._session_of(connection))

    async def _session_close(self, connection: Connection, m: wire.SessionClose) -> Reply:
        session = self._session_of(connection)
        del self._connections[session.session]
        await self._end(session)
        _log.info("session.closed", session=session.session, host=session.host)
        return _DONE

    def _welcome(self, session: ClientSession, stale: Sequence[int] = ()) -> Reply:
        reply = wire.SessionReply(
            session.session,
            int(self._ttl_s * 1000),
            self._superblock,
            self._cluster_map.encode(),
            list(stale),
        )
        return Reply(wire.MDS.encode(reply))

    async def reap(self) -> None:
        """End sessions that have been silent for too long, for ever.

        While this process does not run (stopped, or on a suspended machine) nobody can be heard:
        that time is not held against the sessions.
        """
        interval_s = self._ttl_s / 4
        while True:
            due = trio.current_time() + interval_s
            await trio.sleep_until(due)
            now = trio.current_time()
            if now - due > interval_s:
                _log.warning("reaper.late", late_s=round(now - due, 3))
                for session in self._table.sessions.values():
                    session.seen_at = min(now, session.seen_at + now - due)
            for session in list(self._table.sessions.values()):
                if now - session.seen_at > self._ttl_s:
                    _expired.inc()
                    _log.warning(
                        "session.expired", session=session.session, host=session.host,
                        mountpoint=session.mountpoint, opens=len(session.opens),
                    )  # fmt: skip
                    await self._end(session)

    async def _end(self, session: ClientSession) -> None:
        """Take a session out of the table, then its records apart, in bounded batches."""
        if self._table.sessions.get(session.session) is not session:
            return
        self._table.remove(session)
        connection = self._connections.pop(session.session, None)
        if connection is not None:
            connection.close("the session has expired")
        done = False
        while not done:
            context = self._context(session.session)
            step = sessions.expire_session(
                self._engine, session.session, context, EXPIRE_COUNT
            )
            self.apply(step.writes)
            self._take_effects(None, step.follow_up)
            done = step.done
            await trio.lowlevel.checkpoint()
        self._upkeep.wake()
        if self._table.complete:
            self._sweep()

    def _sweep(self) -> None:
        """Clear what ended sessions left while nobody knew whether others used it."""
        for sweep in (sessions.sweep_orphans, sessions.sweep_tails):
            after, done = 0, False
            while not done:
                step = sweep(self._engine, after, self._context(0), EXPIRE_COUNT)
                if step.writes:
                    self.apply(step.writes)
                if self._take_effects(None, step.follow_up):
                    self._upkeep.wake()
                after, done = step.after_ino, step.done

    # ------------------------------------------------------------ the rest

    def _getxattr(self, connection: Connection, m: wire.GetXattr) -> Reply:
        return Reply(wire.MDS.encode(xattrs.get_xattr(self._engine, m, self._context(0))))

    async def _statfs(self, connection: Connection, m: wire.StatFs) -> Reply:
        count = integer(self._engine, keys.NEXT_INO) & ((1 << 48) - 1)
        return Reply(wire.MDS.encode(await self._upkeep.statfs(count)))

    async def _sync(self, connection: Connection, m: wire.Sync) -> Reply:
        await self._engine.wait_durable(self._sequence)
        return _DONE

    def _status(self, connection: Connection, m: wire.Status) -> Reply:
        statistics = self._engine.statistics()
        superblock = Superblock.decode(self._superblock)
        status = {
            "shard": superblock.shard,
            "fs_uuid": superblock.fs_uuid,
            "uptime_s": round(time.time() - self._started_at, 3),
            "epoch": self._epoch,
            "map": self._cluster_map,
            "sessions": [
                {
                    "session": session.session,
                    "host": session.host,
                    "pid": session.pid,
                    "mountpoint": session.mountpoint,
                    "durable": session.durable,
                    "opens": len(session.opens),
                    "silent_s": round(trio.current_time() - session.seen_at, 1),
                }
                for session in self._table.sessions.values()
            ],
            "engine": {
                name: getattr(statistics, name) for name in type(statistics).__slots__
            },
            "metrics": metrics.values(),
        }
        return Reply(wire.MDS.encode(wire.StatusReply(codec.encode(status))))

    async def _snapshot_open(self, connection: Connection, m: wire.SnapshotOpen) -> Reply:
        self._drop_snapshot(connection)
        snapshot = await self._engine.snapshot()
        self._snapshots[connection] = snapshot
        connection.on_close(lambda: self._drop_snapshot(connection))
        return _DONE

    def _snapshot_scan(self, connection: Connection, m: wire.SnapshotScan) -> Reply:
        snapshot = self._snapshots.get(connection)
        if snapshot is None:
            raise KaError(Code.EBADF, "no snapshot is open on this connection")
        count = max(1, min(m.count_max, SNAPSHOT_COUNT_MAX))
        records = _page(snapshot, m.start, m.end, count)
        return Reply(wire.MDS.encode(wire.RecordsReply(records)))

    def _snapshot_close(self, connection: Connection, m: wire.SnapshotClose) -> Reply:
        self._drop_snapshot(connection)
        return _DONE

    def _drop_snapshot(self, connection: Connection) -> None:
        snapshot = self._snapshots.pop(connection, None)
        if snapshot is not None:
            snapshot.close()

    async def _repair(self, connection: Connection, m: wire.Repair) -> Reply:
        writes: dict[bytes, bytes | None] = {}
        for key, value in _records(m.expected):
            if self._engine.get(key) != value:
                raise KaError(Code.EBUSY, "changed meanwhile", key=key.hex())
        writes.update(_records(m.records))
        _log.warning("repair.applied", records=len(writes))
        await self._engine.wait_durable(self.apply(writes))
        self._upkeep.wake()
        return _DONE


def _page(
    snapshot: Snapshot, start: bytes, end: bytes, count_max: int
) -> list[tuple[bytes, bytes]]:
    """Return the first records, one at least, that fit into an answer."""
    page: list[tuple[bytes, bytes]] = []
    size = 0
    while len(page) < count_max:
        asked = min(SCAN_COUNT, count_max - len(page))
        records = snapshot.scan(start, end, asked)
        for key, value in records:
            size += len(key) + len(value)
            if page and size > SNAPSHOT_SIZE_MAX:
                return page
            page.append((key, value))
        if len(records) < asked:
            break
        start = keys.after(page[-1][0])
    return page


def _opens(items: list[Any]) -> list[tuple[int, int, bool]]:
    opens = []
    for item in items:
        if type(item) is not list or [type(part) for part in item] != [int, int, bool]:
            raise KaError(Code.PROTOCOL, "not a list of opens")
        ino, count, writable = item
        opens.append((ino, count, writable))
    return opens


def _records(items: list[Any]) -> list[tuple[bytes, bytes | None]]:
    records = []
    for item in items:
        if type(item) is not list or len(item) != 2 or type(item[0]) is not bytes:
            raise KaError(Code.PROTOCOL, "not a list of records")
        if item[1] is not None and type(item[1]) is not bytes:
            raise KaError(Code.PROTOCOL, "not a list of records")
        records.append((item[0], item[1]))
    return records
