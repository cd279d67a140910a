"""The embedded metadata engine: journal, overlay, LMDB.

Owns a directory with a metadata store and the order in which its parts are used.  A batch goes
into the journal's active segment (one write, no sync) and into the active overlay, and is then
applied.  When enough has gathered, segment and overlay are put aside together (*frozen*) and a
fresh pair takes over; a worker thread writes the frozen overlay to LMDB in one transaction, after
which the frozen segment is free.  Why not LMDB alone: each of its commits costs two syncs, and
without them a loss of power may corrupt it.

Tasks: the callers of the synchronous methods (event loop), any number of `wait_durable` callers
of whom one at a time runs the sync in a thread, one checkpoint at a time.

Invariants
  * active overlay = records of the active segment; frozen overlay = those of the retired one;
  * durable_sequence only grows: by a sync of the journal or by LMDB's commit;
  * a failed sync is final: the kernel may have dropped the pages, so a second sync that succeeds
    would prove nothing.  The engine then refuses every call; a restart reads what is there;
  * a failed checkpoint is repeated: nothing that it wrote is ever relied upon.

Not here: formats (journal, lmdb_store), what a restart keeps (journal_recovery), keys' meaning.
On-disk format and crash points: docs/on-disk-format.md#metadata-store.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

import trio

from common.errors import Code, KaError
from nfsp.mds.engine import Batch, Statistics, TaskStatus, require_epoch
from nfsp.mds.group_sync import GroupSync
from nfsp.mds.journal import Record
from nfsp.mds.lmdb_config import LmdbConfig
from nfsp.mds.lmdb_store import MapFull, Snapshot, StoreState
from nfsp.mds.overlay import Overlay, Pair, merge_scan
from nfsp.mds.store_directory import StoreDirectory, open_directory

__all__ = ["LmdbEngine"]


@dataclass(frozen=True, slots=True)
class _Frozen:
    """What a checkpoint has to write."""

    overlay: Overlay
    state: StoreState


class LmdbEngine:
    """An `Engine` on a local directory.  Make one with `create` or `open`."""

    def __init__(self, directory: StoreDirectory, config: LmdbConfig) -> None:
        self._directory = directory
        self._config = config
        self._store = directory.store
        self._state = directory.state
        self._journal = directory.journal
        self._overlay = Overlay()
        self._frozen: _Frozen | None = None
        self._epoch = self._state.epoch
        self._sequence = self._state.checkpoint_sequence
        self._replay(directory.unsaved_records)
        self._sync = GroupSync(self._journal, self._sequence, self._journal_failed)
        self._failure: KaError | None = None
        self._checkpoint_error: KaError | None = None
        self._checkpoint_count = self._checkpoint_failure_count = 0
        self._checkpoint_lock = trio.Lock()
        self._checkpoint_thread = trio.CapacityLimiter(1)
        self._room: trio.Event | None = None
        self._wake = trio.Event()
        self._is_idle = False
        self._is_closed = False

    @classmethod
    def create(cls, path: Path, config: LmdbConfig | None = None) -> LmdbEngine:
        """Make a new store in directory *path* (which may exist) and open it.

        Raises EEXIST if it holds one already.  What an interrupted attempt left is replaced.
        """
        config = config or LmdbConfig()
        return cls(open_directory(path, config, is_new=True), config)

    @classmethod
    def open(cls, path: Path, config: LmdbConfig | None = None) -> LmdbEngine:
        """Open the store in directory *path*, with all that was applied before.

        Raises NOT_FORMATTED, EBUSY if another process has it, ENGINE_DAMAGED, WRONG_VERSION.
        Blocks for as long as reading two journal segments takes.
        """
        config = config or LmdbConfig()
        return cls(open_directory(path, config, is_new=False), config)

    @property
    def epoch(self) -> int:
        return self._epoch

    def get(self, key: bytes) -> bytes | None:
        if self._failure is not None:
            self._refuse_if_failed()
        entries = self._overlay.entries
        if key in entries:
            return entries[key]
        if self._frozen is not None and key in self._frozen.overlay.entries:
            return self._frozen.overlay.entries[key]
        return self._store.reader.get(key)

    def scan(self, start: bytes, end: bytes, limit: int) -> list[Pair]:
        self._refuse_if_failed()
        reader = self._store.reader
        return merge_scan(reader.page, reader.verify, self._overlays(), start, end, limit)

    def apply(self, batch: Batch, *, epoch: int) -> int:
        self._refuse_if_failed()
        require_epoch(epoch, self._epoch)
        sequence = self._sequence + 1
        record = self._journal.encode(batch, sequence=sequence, epoch=epoch)
        try:
            if (
                not self._journal.fits(len(record))
                or len(self._overlay.entries) >= self._config.overlay_entries_max
            ):
                self._make_room(len(record))
                record = self._journal.encode(batch, sequence=sequence, epoch=epoch)
            self._journal.append(record)
        except OSError as error:
            raise self._write_failure(error) from error
        self._sequence = sequence
        self._epoch = epoch
        self._overlay.update(batch)
        if self._is_idle or self._is_due():
            self._wake.set()
        return sequence

    async def wait_durable(self, sequence: int) -> None:
        assert sequence <= self._sequence
        while self._sync.durable_sequence < sequence:
            self._refuse_if_failed()
            await self._sync.advance(self._sequence)
        self._refuse_if_failed()

    async def wait_room(self) -> None:
        """As in `Engine`; somebody must be in `run` or `checkpoint`."""
        while self._room is not None:
            await self._room.wait()
        self._refuse_if_failed()

    async def claim(self, epoch: int) -> None:
        require_epoch(epoch, self._epoch + 1)
        await self.wait_durable(self.apply({}, epoch=epoch))

    async def checkpoint(self) -> None:
        target = self._sequence
        self._refuse_if_failed()
        while self._state.checkpoint_sequence < target:
            await self._checkpoint_once()

    async def snapshot(self) -> Snapshot:
        """As in `Engine`.  It lasts until `close`, or until LMDB's map must be enlarged."""
        await self.checkpoint()
        return self._store.snapshot()

    async def run(self, *, task_status: TaskStatus = trio.TASK_STATUS_IGNORED) -> None:
        """Make checkpoints when they are due.  Raises only what is final."""
        task_status.started()
        while True:
            await self._wait_due()
            try:
                await self._checkpoint_once()
            except KaError:
                self._refuse_if_failed()
                await trio.sleep(self._config.checkpoint_retry_ms / 1000)

    def statistics(self) -> Statistics:
        overlays = self._overlays()
        return Statistics(
            epoch=self._epoch,
            last_sequence=self._sequence,
            durable_sequence=self._sync.durable_sequence,
            checkpoint_sequence=self._state.checkpoint_sequence,
            overlay_entries=sum(len(overlay.entries) for overlay in overlays),
            overlay_bytes=sum(overlay.size for overlay in overlays),
            journal_bytes=self._journal.content_size,
            checkpoint_count=self._checkpoint_count,
            checkpoint_failure_count=self._checkpoint_failure_count,
            sync_count=self._sync.sync_count,
        )

    def close(self) -> None:
        """Release everything.  No asynchronous call may be in progress."""
        assert not self._checkpoint_lock.locked()
        assert not self._sync.is_busy
        if not self._is_closed:
            self._is_closed = True
            self._fail(KaError(Code.EBADF, "the metadata engine is closed"))
            self._directory.close()

    def _overlays(self) -> list[Overlay]:
        """Return what lies over LMDB, oldest first."""
        return [self._overlay] if self._frozen is None else [self._frozen.overlay, self._overlay]

    def _replay(self, replayed: list[list[Record]]) -> None:
        for number, records in enumerate(replayed):
            if number > 0:
                self._put_aside()
            self._overlay = Overlay.from_batches(record.batch for record in records)
            if records:
                self._sequence = records[-1].sequence
                self._epoch = records[-1].epoch

    def _put_aside(self) -> None:
        state = StoreState(self._state.store, self._sequence, self._epoch)
        self._frozen = _Frozen(self._overlay, state)
        self._overlay = Overlay()

    def _freeze(self) -> None:
        self._journal.retire(self._sequence + 1)
        self._put_aside()

    def _make_room(self, record_size: int) -> None:
        if record_size > self._journal.record_size_max:
            raise KaError(
                Code.E2BIG,
                "a batch exceeds the metadata journal",
                size=record_size,
                size_max=self._journal.record_size_max,
            )
        if self._frozen is None:
            self._freeze()
            return
        if self._room is None:
            self._room = trio.Event()
        if self._checkpoint_error is not None:
            raise KaError(self._checkpoint_error.code, self._checkpoint_error.message)
        raise KaError(Code.BUSY, "metadata changes come faster than they can be checkpointed")

    def _is_due(self) -> bool:
        return (
            self._frozen is not None
            or self._journal.active_size >= self._config.checkpoint_size
            or len(self._overlay.entries) >= self._config.checkpoint_entries
        )

    async def _wait_due(self) -> None:
        """Return when much has gathered, or when what has gathered is old."""
        self._is_idle = self._frozen is None and self._sequence == self._state.checkpoint_sequence
        if self._is_idle:
            self._wake = trio.Event()
            await self._wake.wait()
            self._is_idle = False
        if not self._is_due():
            self._wake = trio.Event()
            with trio.move_on_after(self._config.checkpoint_age_ms / 1000):
                await self._wake.wait()

    async def _checkpoint_once(self) -> None:
        """Write the frozen overlay, or else the active one, to LMDB."""
        async with self._checkpoint_lock:
            self._refuse_if_failed()
            if self._frozen is None:
                if self._sequence == self._state.checkpoint_sequence:
                    return
                try:
                    self._freeze()
                except OSError as error:
                    raise self._write_failure(error) from error
            frozen = self._frozen
            assert frozen is not None
            try:
                await self._write_out(frozen)
            except KaError as error:
                self._checkpoint_failure_count += 1
                self._checkpoint_error = error
                if error.code not in (Code.ENOSPC, Code.EIO):
                    self._fail(error)
                raise
            # No await from here on: readers must not see LMDB, overlay and journal disagree.
            self._store.renew_reader()
            self._state = frozen.state
            self._frozen = None
            self._journal.release()
            self._checkpoint_count += 1
            self._checkpoint_error = None
            self._sync.note(frozen.state.checkpoint_sequence)
            self._announce_room()

    async def _write_out(self, frozen: _Frozen) -> None:
        while True:
            try:
                await trio.to_thread.run_sync(
                    self._store.write,
                    frozen.overlay,
                    frozen.state,
                    limiter=self._checkpoint_thread,
                )
                return
            except MapFull:
                self._store.grow()

    def _write_failure(self, error: OSError) -> KaError:
        """Return what to raise when writing to the journal failed."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            # Only where the local file system copies on write.  The place is taken again.
            return KaError(Code.ENOSPC, f"no space left for the journal in {self._directory.path}")
        return self._journal_failed(error)

    def _journal_failed(self, error: OSError) -> KaError:
        failure = KaError(Code.EIO, f"the metadata journal failed: {error.strerror}")
        self._fail(failure)
        return failure

    def _fail(self, failure: KaError) -> None:
        """Refuse every call from now on."""
        self._failure = failure
        self._announce_room()

    def _announce_room(self) -> None:
        if self._room is not None:
            self._room.set()
            self._room = None

    def _refuse_if_failed(self) -> None:
        if self._failure is not None:
            raise KaError(self._failure.code, self._failure.message, **self._failure.context)
