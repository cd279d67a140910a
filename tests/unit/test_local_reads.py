"""Reads from chunk files on this host: given out only when the bytes prove themselves."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from common.errors import Code, KaError
from nfsp import wire
from nfsp.client import local_reads
from nfsp.client.block_sums import piece_sums
from nfsp.client.local_reads import LocalReads
from nfsp.iod.chunkstore import ChunkStore
from nfsp.model import BLOCK_SIZE, Layout
from nfsp.striping import Piece

CHUNK_SIZE = 1 << 20
LAYOUT = Layout(CHUNK_SIZE, 1, 1, (1,))
INO, IOD, COLUMN = 7, 1, 0


class Reader:
    """LocalReads on a store, asking it what its iod would be asked."""

    def __init__(self, store: ChunkStore, patience_s: float) -> None:
        self.store = store
        self.questions = 0
        self.folder: str | None = None
        """What the reader sees instead of the store's directory."""
        self.reads = LocalReads(self._locate, patience_s=patience_s)

    async def _locate(self, iod: int, m: wire.Locate) -> wire.LocateReply:
        self.questions += 1
        await trio.lowlevel.checkpoint()
        place = self.store.locate(m.ino, m.column, m.row, chunk_size=m.chunk_size)
        if place is None:
            return wire.LocateReply(b"", 0, 0, b"")
        path = place.path if self.folder is None else f"{self.folder}/{INO:x}.{COLUMN}"
        sums = struct.pack(f"<{len(place.sums)}Q", *place.sums)
        return wire.LocateReply(os.fsencode(path), place.file_inode, place.offset, sums)

    def write(self, data: bytes, *, row: int = 0, offset: int = 0) -> None:
        sums = piece_sums(offset, [data])
        self.store.write(
            INO, COLUMN, row, offset, [data], struct.unpack(f"<{len(sums) // 8}Q", sums),
            chunk_size=CHUNK_SIZE,
        )  # fmt: skip

    def path(self) -> Path:
        place = self.store.locate(INO, COLUMN, 0, chunk_size=CHUNK_SIZE)
        assert place is not None
        return Path(place.path)

    async def read(self, length: int = CHUNK_SIZE, *, row: int = 0) -> bytes | None:
        """Return what was read locally, None if it was not."""
        into = memoryview(bytearray(b"?" * length))
        piece = Piece(COLUMN, row, 0, length, row * CHUNK_SIZE)
        if await self.reads.read(1, IOD, LAYOUT, INO, piece, into):
            return bytes(into)
        return None


@asynccontextmanager
async def reader(tmp_path: Path, *, patience_s: float = 60.0) -> AsyncIterator[Reader]:
    with ChunkStore(tmp_path / "store") as store:
        made = Reader(store, patience_s)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.reads.run)
            yield made
            nursery.cancel_scope.cancel()


def open_below(directory: Path) -> int:
    """Return how many descriptors of this process lead to files below *directory*."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{name}").startswith(str(directory))
        except FileNotFoundError:
            continue
    return count


async def test_whole_chunk_is_read_and_asked_for_once(tmp_path: Path) -> None:
    async with reader(tmp_path) as r:
        data = os.urandom(CHUNK_SIZE)
        r.write(data)
        assert await r.read() == data
        assert await r.read(CHUNK_SIZE // 2) == data[: CHUNK_SIZE // 2]
        assert r.questions == 1


async def test_readers_that_come_together_ask_once(tmp_path: Path) -> None:
    async with reader(tmp_path) as r:
        data = os.urandom(CHUNK_SIZE)
        r.write(data)
        found: list[bytes | None] = []

        async def one() -> None:
            found.append(await r.read())

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one)
        assert found == [data] * 5
        assert r.questions == 1


async def test_last_block_that_ends_early_is_filled_with_zeros(tmp_path: Path) -> None:
    async with reader(tmp_path) as r:
        data = os.urandom(9 * BLOCK_SIZE + 5)
        r.write(data)
        assert await r.read(10 * BLOCK_SIZE) == data.ljust(10 * BLOCK_SIZE, b"\0")


async def test_what_is_not_in_memory_is_read_from_the_disk(tmp_path: Path) -> None:
    async with reader(tmp_path) as r:
        data = os.urandom(CHUNK_SIZE)
        r.write(data)
        r.store.sync(INO, COLUMN)
        fd = os.open(r.path(), os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        assert await r.read() == data


async def test_overwritten_data_are_never_the_old_ones(tmp_path: Path) -> None:
    async with reader(tmp_path) as r:
        old, new = os.urandom(CHUNK_SIZE), os.urandom(CHUNK_SIZE)
        r.write(old)
        assert await r.read() == old
        r.write(new)
        assert await r.read() is None
        assert await r.read() == new


async def test_data_that_grew_into_a_hole_are_never_zeros(tmp_path: Path) -> None:
    async with reader(tmp_path) as r:
        data = os.urandom(CHUNK_SIZE)
        r.write(data[: CHUNK_SIZE // 2])
        assert await r.read() is None
        r.write(data[CHUNK_SIZE // 2 :], offset=CHUNK_SIZE // 2)
        assert await r.read() in (None, data)


@pytest.mark.parametrize("rewritten", [False, True])
async def test_removed_chunk_file_is_not_read(tmp_path: Path, rewritten: bool) -> None:
    async with reader(tmp_path) as r:
        old, new = os.urandom(CHUNK_SIZE), os.urandom(CHUNK_SIZE)
        r.write(old)
        assert await r.read() == old
        r.store.remove(INO, COLUMN)
        if rewritten:
            r.write(new)
        assert await r.read() is None
        assert await r.read() == (new if rewritten else None)


async def test_cut_chunk_file_is_not_read(tmp_path: Path) -> None:
    async with reader(tmp_path) as r:
        r.write(os.urandom(CHUNK_SIZE))
        assert await r.read()
        r.store.trim(INO, COLUMN, row=0, offset=CHUNK_SIZE // 2 + 1, chunk_size=CHUNK_SIZE)
        assert await r.read() is None
        assert await r.read() is None  # what is absent is the iod's to say


@pytest.mark.parametrize("at", [4096, 4096 + CHUNK_SIZE - 1])
async def test_damaged_data_are_not_read(tmp_path: Path, at: int) -> None:
    async with reader(tmp_path) as r:
        r.write(os.urandom(CHUNK_SIZE))
        with r.path().open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))
        assert await r.read() is None


async def test_other_file_of_the_same_name_is_not_read(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with reader(tmp_path) as r:
        r.write(os.urandom(CHUNK_SIZE))
        for name in ("file", "pipe"):
            other = tmp_path / name
            other.mkdir()
            path = other / f"{INO:x}.{COLUMN}"
            if name == "pipe":
                os.mkfifo(path)
            else:
                path.write_bytes(bytes(2 * CHUNK_SIZE))
            r.folder = str(other)
            assert await r.read() is None
            await _forgotten(r)


async def test_iod_whose_files_cannot_be_opened_is_left_alone(tmp_path: Path) -> None:
    async with reader(tmp_path) as r:
        r.write(os.urandom(CHUNK_SIZE))
        r.write(os.urandom(CHUNK_SIZE), row=1)
        r.folder = str(tmp_path / "elsewhere")
        assert await r.read() is None
        assert await r.read(row=1) is None
        assert r.questions == 1


def test_chunk_behind_the_end_of_its_file_is_nowhere(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "store") as store:
        r = Reader(store, 1.0)
        r.write(b"data")
        for row in (1, 1 << 62):
            for locate in (store.locate, store.locate_now):
                assert locate(INO, COLUMN, row, chunk_size=CHUNK_SIZE) is None


async def test_disk_that_hangs_is_an_error_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_answers = threading.Event()

    def hang(fd: int, offset: int, into: memoryview, done: int) -> int:
        disk_answers.wait()
        return done

    monkeypatch.setattr(local_reads, "_read_now", lambda fd, offset, into: 0)
    monkeypatch.setattr(local_reads, "_read_rest", hang)
    async with reader(tmp_path, patience_s=0.1) as r:
        r.write(os.urandom(CHUNK_SIZE))
        try:
            with pytest.raises(KaError) as caught:
                await r.read()
        finally:
            disk_answers.set()
        assert caught.value.code is Code.TIMEOUT


async def test_descriptors_are_bounded_and_given_back(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with reader(tmp_path) as r:
        rows = local_reads.SPOTS_MAX + 5
        block = os.urandom(BLOCK_SIZE)
        for row in range(rows):
            r.write(block, row=row)
        before = open_below(tmp_path)
        for row in range(rows):
            assert await r.read(BLOCK_SIZE, row=row) == block
        assert open_below(tmp_path) - before == local_reads.SPOTS_MAX
        await _forgotten(r)
        assert open_below(tmp_path) == before


async def _forgotten(r: Reader) -> None:
    await trio.sleep(2.5 * local_reads.KEEP_S)
