"""The embedded engine when the process, the disk or its content fails."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from common.errors import Code, KaError
from nfsp.mds.lmdb_config import LmdbConfig
from nfsp.mds.lmdb_engine import LmdbEngine
from tests.support.engines import SMALL, content, created, fill, opened, refused


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "store"


def flip(path: Path, content: bytes) -> None:
    """Change a bit of *content* wherever it stands in a file."""
    data = path.read_bytes()
    assert content in data
    path.write_bytes(data.replace(content, bytes([content[0] ^ 1]) + content[1:]))


def crash_copy(directory: Path, target: Path) -> Path:
    """Return a copy of what a killed process leaves behind."""
    shutil.copytree(directory, target)
    return target


async def test_failed_sync_is_final(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails cannot be had here, so the system call fails in its place."""

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with created(directory) as engine:
        sequence = engine.apply({b"k": b"v"}, epoch=0)
        monkeypatch.setattr(os, "fdatasync", fail)
        with refused(Code.EIO):
            await engine.wait_durable(sequence)
        monkeypatch.undo()
        with refused(Code.EIO):
            await engine.wait_durable(sequence)
        with refused(Code.EIO):
            engine.apply({b"k": b"w"}, epoch=0)
        with refused(Code.EIO):
            engine.get(b"k")
        with refused(Code.EIO):
            await engine.checkpoint()


async def test_sync_covers_the_retired_segment_before_the_active_one(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fdatasync = os.fdatasync

    def observe(descriptor: int) -> None:
        fdatasync(descriptor)
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    with created(directory) as engine:
        fill(engine, SMALL.overlay_entries_max + 1)
        monkeypatch.setattr(os, "fdatasync", observe)
        await engine.wait_durable(engine.apply({b"k": b"v"}, epoch=0))
        assert synced == ["journal.0", "journal.1"]
        await engine.wait_durable(engine.apply({b"k": b"w"}, epoch=0))
        assert synced == ["journal.0", "journal.1", "journal.1"]


def test_wrapped_journal_replays_both_segments(directory: Path, tmp_path: Path) -> None:
    with created(directory) as engine:
        for turn in range(5):
            fill(engine, 30, start=30 * turn)
            trio.run(engine.checkpoint)
        fill(engine, 45, start=150)
        assert engine.statistics().checkpoint_sequence == 150
        copy = crash_copy(directory, tmp_path / "copy")
    with opened(copy) as engine:
        assert engine.statistics().last_sequence == 195
        assert len(content(engine)) == 195
        trio.run(engine.checkpoint)
        assert len(content(engine)) == 195


def test_torn_end_is_dropped_and_appending_goes_on(directory: Path) -> None:
    with created(directory) as engine:
        engine.apply({b"a": b"1"}, epoch=0)
        engine.apply({b"b": b"2"}, epoch=0)
    flip(directory / "journal.0", b"b2")
    with opened(directory) as engine:
        assert content(engine) == [(b"a", b"1")]
        assert engine.apply({b"c": b"3"}, epoch=0) == 2
    with opened(directory) as engine:
        assert content(engine) == [(b"a", b"1"), (b"c", b"3")]


def test_record_behind_a_torn_one_never_comes_back(directory: Path) -> None:
    """Its predecessor's place is filled by a record of the same size before the next crash."""
    with created(directory) as engine:
        for key in (b"a", b"b", b"c"):
            engine.apply({key: b"1"}, epoch=0)
    flip(directory / "journal.0", b"b1")
    with opened(directory) as engine:
        assert content(engine) == [(b"a", b"1")]
        engine.apply({b"x": b"1"}, epoch=0)
    with opened(directory) as engine:
        assert content(engine) == [(b"a", b"1"), (b"x", b"1")]


def test_segment_behind_a_torn_one_never_comes_back(directory: Path) -> None:
    """The torn record's number is given again, so that the later segment would fit."""
    with created(directory) as engine:
        fill(engine, SMALL.overlay_entries_max)
        engine.apply({b"later": b"1"}, epoch=0)
    flip(directory / "journal.0", b"00000023v")
    with opened(directory) as engine:
        assert len(content(engine)) == SMALL.overlay_entries_max - 1
        engine.apply({b"x": b"1"}, epoch=0)
    with opened(directory) as engine:
        assert len(content(engine)) == SMALL.overlay_entries_max
        assert engine.get(b"later") is None


def test_lost_record_that_was_durable_is_damage(directory: Path) -> None:
    with created(directory) as engine:
        trio.run(engine.wait_durable, engine.apply({b"a": b"1"}, epoch=0))
    flip(directory / "journal.0", b"a1")
    for _ in range(2):
        with refused(Code.ENGINE_DAMAGED):
            LmdbEngine.open(directory, SMALL)


def test_missing_journal_is_damage(directory: Path) -> None:
    with created(directory):
        pass
    (directory / "journal.1").unlink()
    with refused(Code.ENGINE_DAMAGED):
        LmdbEngine.open(directory, SMALL)


def test_flipped_bit_in_a_stored_value_is_reported_never_returned(directory: Path) -> None:
    with created(directory) as engine:
        engine.apply({b"key": b"precious", b"other": b"fine"}, epoch=0)
        trio.run(engine.checkpoint)
    flip(directory / "data.mdb", b"precious")
    with opened(directory) as engine:
        with refused(Code.ENGINE_DAMAGED):
            engine.get(b"key")
        with refused(Code.ENGINE_DAMAGED):
            content(engine)
        assert engine.get(b"other") == b"fine"


def test_main_store_that_was_cut_short_is_damage(directory: Path) -> None:
    with created(directory) as engine:
        fill(engine, 20)
        trio.run(engine.checkpoint)
    os.truncate(directory / "data.mdb", (directory / "data.mdb").stat().st_size // 2)
    with refused(Code.ENGINE_DAMAGED):
        LmdbEngine.open(directory, SMALL)


def test_file_that_is_no_lmdb_is_damage(directory: Path) -> None:
    directory.mkdir()
    (directory / "data.mdb").write_bytes(b"garbage" * 10_000)
    with refused(Code.ENGINE_DAMAGED):
        LmdbEngine.open(directory, SMALL)


CHILD = """
import os, pathlib, sys, trio
from common.errors import KaError
from nfsp.mds.lmdb_config import LmdbConfig
from nfsp.mds.lmdb_engine import LmdbEngine

async def main():
    engine = LmdbEngine.open(pathlib.Path(sys.argv[1]), LmdbConfig(
        segment_size=65536, checkpoint_size=8192, checkpoint_entries=100))
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        sequence = engine.statistics().last_sequence
        while True:
            try:
                sequence = engine.apply(
                    {b"a%d" % (sequence + 1): b"%d" % (sequence + 1) * 20,
                     b"b%d" % (sequence + 1): b"%d" % (sequence + 1) * 20,
                     b"a%d" % (sequence - 50): None}, epoch=0)
                os.write(1, b"%d\\n" % sequence)
            except KaError:
                await engine.wait_room()
            await trio.lowlevel.checkpoint()

trio.run(main)
"""


def test_every_acknowledged_batch_survives_kill_9(directory: Path) -> None:
    """Killed at random moments, checkpoints and rotations among them, and started again."""
    chance = random.Random(20)
    config = LmdbConfig(segment_size=65536, checkpoint_size=8192, checkpoint_entries=100)
    LmdbEngine.create(directory, config).close()
    for _ in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, str(directory)], stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            for _ in range(chance.randrange(200, 3000)):
                acknowledged = int(child.stdout.readline())
            child.send_signal(signal.SIGKILL)
            rest = child.stdout.read().splitlines(keepends=True)
        acknowledged = max([acknowledged, *(int(line) for line in rest if line.endswith(b"\n"))])
        with opened(directory, config) as engine:
            last = engine.statistics().last_sequence
            assert last in (acknowledged, acknowledged + 1)
            expected: dict[bytes, bytes] = {}
            for number in range(1, last + 1):
                expected[b"b%d" % number] = b"%d" % number * 20
                if number > last - 51:
                    expected[b"a%d" % number] = b"%d" % number * 20
            assert dict(content(engine)) == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    path = tmp_path / "disk"
    path.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs", str(path)]
    if subprocess.run(mounting, capture_output=True).returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


async def test_full_disk_is_enospc_and_recovers_when_space_returns(small_disk: Path) -> None:
    config = LmdbConfig(
        segment_size=65536,
        checkpoint_size=16384,
        checkpoint_retry_ms=10,
    )
    ballast = small_disk / "ballast"
    with created(small_disk / "store", config) as engine:
        ballast.write_bytes(bytes(1 << 20))
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            applied = 0
            with refused(Code.ENOSPC):
                while True:
                    applied = await apply_waiting(engine, applied)
            assert engine.statistics().checkpoint_failure_count > 0
            assert len(content(engine)) == applied
            await engine.wait_durable(applied)
            copy = crash_copy(small_disk / "store", small_disk.parent / "copy")
            with opened(copy, config) as survivor:
                assert len(content(survivor)) == applied
            with refused(Code.ENOSPC):
                engine.apply({b"one more": bytes(3000)}, epoch=0)
            ballast.unlink()
            with trio.fail_after(10):
                await engine.wait_room()
            for _ in range(100):
                applied = await apply_waiting(engine, applied)
            nursery.cancel_scope.cancel()
        await engine.checkpoint()
        assert len(content(engine)) == applied
    with opened(small_disk / "store", config) as engine:
        assert len(content(engine)) == applied


async def apply_waiting(engine: LmdbEngine, applied: int) -> int:
    """Apply one more batch, waiting while the engine is busy; raise if the disk is full."""
    while True:
        try:
            return engine.apply({b"%08d" % applied: os.urandom(1000)}, epoch=0)
        except KaError as error:
            if error.code is not Code.BUSY:
                raise
            with trio.move_on_after(0.05):
                await engine.wait_room()


@pytest.mark.slow
def test_start_up_does_not_depend_on_the_number_of_keys(directory: Path) -> None:
    config = LmdbConfig()
    with created(directory, config) as engine:
        for start in range(0, 1_000_000, 40_000):
            for number in range(start, start + 40_000, 10):
                engine.apply({b"%08d" % n: b"v" * 100 for n in range(number, number + 10)}, epoch=0)
            trio.run(engine.checkpoint)
        engine.apply({b"last": b""}, epoch=0)
    began = time.perf_counter()
    with opened(directory, config) as engine:
        assert engine.get(b"00999999") == b"v" * 100
        assert time.perf_counter() - began < 1
        assert engine.get(b"last") == b""
