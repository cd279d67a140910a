"""The embedded engine against the model, and its behaviour call by call."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from common.errors import Code, KaError
from nfsp.mds.engine import KEY_END, Batch
from nfsp.mds.lmdb_config import LmdbConfig
from nfsp.mds.lmdb_engine import LmdbEngine
from nfsp.mds.lmdb_store import LmdbStore
from tests.support.engines import SMALL, content, created, fill, opened, refused
from tests.support.memory_engine import MemoryEngine

TINY = dataclasses.replace(SMALL, checkpoint_entries=4, overlay_entries_max=8)
"""Overlays so small that both segments are in use most of the time."""
SECTOR_SIZE = 512
JOURNALS = ("journal.0", "journal.1")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "store"


keys = st.binary(min_size=1, max_size=2) | st.sampled_from(
    [b"a", b"ab", b"b", b"\xff\xff", b"k" * 511]
)
batches = st.dictionaries(keys, st.none() | st.binary(max_size=300), max_size=6)


class EngineAgainstModel(RuleBasedStateMachine):
    """Every answer equals the model's; every crash leaves a prefix with all that was promised."""

    def __init__(self) -> None:
        super().__init__()
        # In memory where that is possible: what a sync would make durable is modelled here.
        shared_memory = Path("/dev/shm")
        parent = shared_memory if shared_memory.is_dir() else None
        self.root = Path(tempfile.mkdtemp(prefix="ka-engine-", dir=parent))
        self.copies = 0
        self.directory = self.root / "0"
        self.engine = LmdbEngine.create(self.directory, TINY)
        self.model = MemoryEngine()
        self.history: list[Batch] = []
        self.durable = 0
        self.on_disk = {name: (self.directory / name).read_bytes() for name in JOURNALS}
        self.fdatasync = os.fdatasync
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(os, "fdatasync", self.observe_sync)

    def teardown(self) -> None:
        self.patch.undo()
        self.engine.close()
        shutil.rmtree(self.root)

    def observe_sync(self, descriptor: int) -> None:
        """Sync, and remember what is now safe from a loss of power."""
        self.fdatasync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.on_disk[path.name] = path.read_bytes()

    @rule(several=st.lists(batches, min_size=1, max_size=6))
    def apply(self, several: list[Batch]) -> None:
        for batch in several:
            try:
                sequence = self.engine.apply(batch, epoch=1)
            except KaError as error:
                if error.code is not Code.BUSY:
                    raise
                self.checkpoint()
                trio.run(self.engine.wait_room)
                sequence = self.engine.apply(batch, epoch=1)
            self.history.append(batch)
            assert sequence == self.model.apply(batch, epoch=1) == len(self.history)

    @rule(key=keys)
    def get(self, key: bytes) -> None:
        assert self.engine.get(key) == self.model.get(key)

    @rule(
        start=st.binary(max_size=2),
        end=st.binary(max_size=2) | st.just(KEY_END),
        limit=st.integers(0, 6),
    )
    def scan(self, start: bytes, end: bytes, limit: int) -> None:
        assert self.engine.scan(start, end, limit) == self.model.scan(start, end, limit)

    @rule()
    def checkpoint(self) -> None:
        trio.run(self.engine.checkpoint)
        self.durable = len(self.history)

    @rule()
    def wait_durable(self) -> None:
        trio.run(self.engine.wait_durable, len(self.history))
        self.durable = len(self.history)

    @rule()
    def snapshot(self) -> None:
        view = trio.run(self.engine.snapshot)
        assert view.scan(b"", KEY_END, 1 << 30) == content(self.model)
        view.close()
        self.durable = len(self.history)

    @rule()
    def close_and_open(self) -> None:
        self.engine.close()
        self.reopen()

    @rule()
    def kill_and_open(self) -> None:
        """What the kernel has of the files is all that is left."""
        self.copy_directory()
        self.reopen()

    @rule(seed=st.integers(0, 2**32))
    def lose_power_and_open(self, seed: int) -> None:
        """Any of the sectors that were written since the last sync may be lost."""
        chance = random.Random(seed)
        self.copy_directory()
        for name in JOURNALS:
            synced, written = self.on_disk[name], (self.directory / name).read_bytes()
            mixed = b"".join(
                chance.choice((synced, written))[place : place + SECTOR_SIZE]
                for place in range(0, len(written), SECTOR_SIZE)
            )
            (self.directory / name).write_bytes(mixed)
        self.reopen()

    def copy_directory(self) -> None:
        self.copies += 1
        following = self.root / str(self.copies)
        shutil.copytree(self.directory, following)
        self.engine.close()
        self.directory = following

    def reopen(self) -> None:
        self.engine = LmdbEngine.open(self.directory, TINY)
        survived = self.engine.statistics().last_sequence
        assert self.durable <= survived <= len(self.history)
        if survived < len(self.history):
            del self.history[survived:]
            self.model = MemoryEngine()
            for batch in self.history:
                self.model.apply(batch, epoch=1)
        self.durable = survived

    @invariant()
    def content_equals_the_model(self) -> None:
        assert content(self.engine) == content(self.model)
        statistics = self.engine.statistics()
        assert statistics.checkpoint_sequence <= statistics.durable_sequence
        assert statistics.durable_sequence >= self.durable


EngineAgainstModel.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
TestEngineAgainstModel = EngineAgainstModel.TestCase


def test_directory_without_a_store_is_not_formatted(directory: Path) -> None:
    with refused(Code.NOT_FORMATTED):
        LmdbEngine.open(directory, SMALL)
    assert not directory.exists()


def test_interrupted_creation_is_not_formatted_and_can_be_repeated(directory: Path) -> None:
    directory.mkdir()
    LmdbStore(directory, SMALL.map_size).close()
    with refused(Code.NOT_FORMATTED):
        LmdbEngine.open(directory, SMALL)
    with created(directory) as engine:
        assert content(engine) == []


def test_store_is_never_created_over_another_one(directory: Path) -> None:
    with created(directory) as engine:
        engine.apply({b"k": b"v"}, epoch=0)
    with refused(Code.EEXIST):
        LmdbEngine.create(directory, SMALL)
    with opened(directory) as engine:
        assert engine.get(b"k") == b"v"


def test_second_opener_is_refused(directory: Path) -> None:
    with created(directory), refused(Code.EBUSY):
        LmdbEngine.open(directory, SMALL)
    with opened(directory):
        pass


def test_files_are_readable_by_their_owner_only(directory: Path) -> None:
    with created(directory):
        assert directory.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}


def test_closed_engine_refuses_every_call(directory: Path) -> None:
    engine = LmdbEngine.create(directory, SMALL)
    engine.close()
    engine.close()
    for call in (
        lambda: engine.get(b"k"),
        lambda: engine.scan(b"", KEY_END, 1),
        lambda: engine.apply({}, epoch=0),
        lambda: trio.run(engine.checkpoint),
    ):
        with refused(Code.EBADF):
            call()


def test_batch_of_a_lower_epoch_is_refused_and_changes_nothing(directory: Path) -> None:
    with created(directory) as engine:
        trio.run(engine.claim, 5)
        with refused(Code.EPOCH_STALE):
            engine.apply({b"k": b"stale"}, epoch=4)
        assert engine.get(b"k") is None
        assert engine.apply({b"k": b"v"}, epoch=5) == 2


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_claimed_epoch_survives_a_restart(directory: Path, has_checkpoint: bool) -> None:
    with created(directory) as engine:
        trio.run(engine.claim, 5)
        assert engine.statistics().durable_sequence == 1
        if has_checkpoint:
            trio.run(engine.checkpoint)
    with opened(directory) as engine:
        assert engine.epoch == 5
        with refused(Code.EPOCH_STALE):
            engine.apply({}, epoch=4)
        with refused(Code.EPOCH_STALE):
            trio.run(engine.claim, 5)


def test_batch_that_can_never_fit_is_e2big_and_changes_nothing(directory: Path) -> None:
    with created(directory) as engine:
        with refused(Code.E2BIG):
            engine.apply({b"k": bytes(SMALL.segment_size)}, epoch=0)
        assert engine.get(b"k") is None
        assert engine.apply({b"k": b"v"}, epoch=0) == 1


def test_batch_with_a_key_too_long_is_einval_and_changes_nothing(directory: Path) -> None:
    with created(directory) as engine:
        with refused(Code.EINVAL):
            engine.apply({b"good": b"v", b"k" * 512: b"v"}, epoch=0)
        assert engine.get(b"good") is None


def test_full_journal_is_busy_and_changes_nothing(directory: Path) -> None:
    with created(directory) as engine:
        with refused(Code.BUSY):
            fill(engine, 1000)
        before = engine.statistics()
        with refused(Code.BUSY):
            engine.apply({b"00000000": b"new"}, epoch=0)
        assert engine.statistics() == before
        assert engine.get(b"00000000") == b"v" * 100


async def test_background_checkpoints_make_room(directory: Path) -> None:
    """Twenty times what both segments hold goes through, in order, while readers look on."""
    with created(directory) as engine:
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            for number in range(1500):
                batch: Batch = {b"%08d" % number: b"v" * 100}
                while True:
                    try:
                        engine.apply(batch, epoch=0)
                        break
                    except KaError as error:
                        assert error.code is Code.BUSY  # noqa: PT017
                        await engine.wait_room()
                assert engine.get(b"%08d" % (number // 2)) == b"v" * 100
            nursery.cancel_scope.cancel()
        assert len(content(engine)) == 1500
        assert engine.statistics().checkpoint_count > 10
    with opened(directory) as engine:
        assert len(content(engine)) == 1500


async def test_old_records_are_checkpointed_without_being_asked(
    directory: Path, autojump_clock: trio.testing.MockClock
) -> None:
    with created(directory) as engine:
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            await trio.testing.wait_all_tasks_blocked()
            engine.apply({b"k": b"v"}, epoch=0)
            await trio.sleep(SMALL.checkpoint_age_ms / 1000 - 1)
            assert engine.statistics().checkpoint_count == 0
            await trio.sleep(2)
            await engine.checkpoint()  # waits for the one in progress, has nothing to do itself
            assert engine.statistics().checkpoint_count == 1
            nursery.cancel_scope.cancel()
        assert engine.statistics().overlay_entries == 0


async def test_many_waiters_share_one_sync(directory: Path) -> None:
    with created(directory) as engine:
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(
                    engine.wait_durable, engine.apply({b"%d" % number: b""}, epoch=0)
                )
        assert engine.statistics().durable_sequence == 20
        assert engine.statistics().sync_count <= 2


async def test_cancelled_waiter_leaves_the_sync_to_the_others(directory: Path) -> None:
    with created(directory) as engine:
        sequence = engine.apply({b"k": b"v"}, epoch=0)
        with trio.CancelScope() as scope:
            scope.cancel()
            await engine.wait_durable(sequence)
        assert scope.cancelled_caught
        await engine.wait_durable(sequence)
        assert engine.statistics().durable_sequence == sequence


async def test_store_outgrows_its_map(directory: Path) -> None:
    config = LmdbConfig(segment_size=8 << 20, map_size=1 << 20)
    pairs = [(b"%03d" % number, bytes(60_000)) for number in range(200)]
    with created(directory, config) as engine:
        old = await engine.snapshot()
        engine.apply(dict(pairs[:100]), epoch=0)
        await engine.checkpoint()
        assert content(engine) == pairs[:100]
        with refused(Code.BUSY):
            old.get(b"001")
        old.close()
    with opened(directory, config) as engine:
        engine.apply(dict(pairs[100:]), epoch=0)
        await engine.checkpoint()
        assert content(engine) == pairs


async def test_snapshot_does_not_see_later_changes(directory: Path) -> None:
    with created(directory) as engine:
        fill(engine, 10)
        view = await engine.snapshot()
        engine.apply({b"00000003": None, b"00000004": b"new", b"z": b""}, epoch=0)
        await engine.checkpoint()
        assert view.get(b"00000003") == b"v" * 100
        assert view.get(b"00000004") == b"v" * 100
        assert len(view.scan(b"", KEY_END, 100)) == 10
        view.close()


def test_scan_passes_over_long_runs_of_deleted_keys(directory: Path) -> None:
    with created(directory) as engine:
        for start in range(0, 100, 20):
            fill(engine, 20, start=start, size=1)
            trio.run(engine.checkpoint)
        engine.apply({b"%08d" % number: None for number in range(20)}, epoch=0)
        assert engine.scan(b"", KEY_END, 2) == [(b"00000020", b"v"), (b"00000021", b"v")]
