"""The embedded engine against the model, and against everything that can go wrong on a disk."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from common.errors import Code, KaError
from nfsp.mds.engine import KEY_END, Batch
from nfsp.mds.lmdb_engine import LmdbConfig, LmdbEngine
from nfsp.mds.memory_engine import MemoryEngine

SMALL = LmdbConfig(
    segment_size=8192,
    checkpoint_size=2048,
    checkpoint_entries=16,
    overlay_entries_max=24,
    map_size=1 << 20,
)
SECTOR_SIZE = 512
JOURNALS = ("journal.0", "journal.1")


def content(engine: LmdbEngine | MemoryEngine) -> list[tuple[bytes, bytes]]:
    return engine.scan(b"", KEY_END, 1 << 30)


def refused(code: Code) -> pytest.RaisesExc[KaError]:
    return pytest.RaisesExc(KaError, check=lambda error: error.code is code)


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
        self.root = Path(tempfile.mkdtemp(prefix="engine-"))
        self.copies = 0
        self.directory = self.root / "0"
        self.engine = LmdbEngine.create(self.directory, SMALL)
        self.model = MemoryEngine()
        self.history: list[Batch] = []
        self.durable = 0
        self.on_disk = self.read_journals()

    def teardown(self) -> None:
        self.engine.close()
        shutil.rmtree(self.root)

    def read_journals(self) -> dict[str, bytes]:
        return {name: (self.directory / name).read_bytes() for name in JOURNALS}

    @rule(batch=batches)
    def apply(self, batch: Batch) -> None:
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
        self.on_disk = self.read_journals()

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
        self.engine = LmdbEngine.open(self.directory, SMALL)
        survived = self.engine.statistics().last_sequence
        assert self.durable <= survived <= len(self.history)
        if survived < len(self.history):
            del self.history[survived:]
            self.model = MemoryEngine()
            for batch in self.history:
                self.model.apply(batch, epoch=1)
        self.durable = survived
        self.on_disk = self.read_journals()

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
