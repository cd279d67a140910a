"""Flipped bits: what is damaged is refused and named, and never given out as data.

KA_FLIPS=2000 asks for that many flips in each place, KA_FLIP_SEED for other ones.
"""

from __future__ import annotations

import errno
import os
import random
import re
import secrets
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from common.errors import Code, KaError
from nfsp import wire
from nfsp.client.volume import Volume
from nfsp.fsck.findings import Severity
from nfsp.model import ROOT
from tests.conftest import TOKEN
from tests.support import store_probe
from tests.support.running import CHUNK_SIZE, Cluster

FLIPS = int(os.environ.get("KA_FLIPS", "60"))
SEED = int(os.environ.get("KA_FLIP_SEED", "1"))
HEADER_SIZE = 4096


@dataclass(frozen=True, slots=True)
class File:
    name: bytes
    ino: int
    data: bytes


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix=f"ka-{TOKEN}-") as name:
        made = Cluster(Path(name) / "c")
        made.start()
        yield made
        made.stop()


async def make_files(cluster: Cluster) -> list[File]:
    """Full chunks, part of a block, a hole, a file overwritten in part."""
    rng, files = random.Random(SEED), []
    async with Volume.open(cluster.config, cluster.key) as volume:
        for size in (7 * CHUNK_SIZE, 5 * CHUNK_SIZE + 33, 100, 3 * CHUNK_SIZE):
            name, data = secrets.token_hex(8).encode(), bytearray(rng.randbytes(size))
            handle, inode = await volume.create_file(
                ROOT, name, stat.S_IFREG | 0o644, uid=0, gid=0, exclusive=True
            )
            await volume.write(handle, 0, bytes(data))
            if size % CHUNK_SIZE == 0:
                await volume.fsync(handle)
                data[size // 2 : size // 2 + 5000] = rng.randbytes(5000)
                await volume.write(handle, size // 2, bytes(data[size // 2 : size // 2 + 5000]))
                at = size + 2 * CHUNK_SIZE
                data += bytes(at - size) + b"end"
                await volume.write(handle, at, b"end")
            await volume.fsync(handle)
            await volume.release(handle)
            files.append(File(name, inode.ino, bytes(data)))
    return files


async def read_pieces(volume: Volume, file: File) -> list[int]:
    """Return the chunks that cannot be read; what can be read must be true."""
    bad = []
    handle, inode, _ = await volume.open_file(file.ino, writable=False)
    assert inode.size == len(file.data)
    for index in range(-(-len(file.data) // CHUNK_SIZE)):
        at = index * CHUNK_SIZE
        try:
            data = bytes(await volume.read(handle, at, CHUNK_SIZE))
        except KaError as error:
            if error.errno != errno.EIO:
                raise
            bad.append(index)
        else:
            assert data == file.data[at : at + CHUNK_SIZE], (file.name, index)
    await volume.release(handle)
    return bad


def place(path: Path) -> tuple[int, int]:
    """(inode, column) of a chunk file."""
    ino, column = path.name.split(".")
    return int(ino, 16), int(column)


def flip(path: Path, offset: int, mask: int) -> tuple[int, int]:
    """Change a byte; return it before and after."""
    with open(path, "r+b") as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ mask]), offset)
        os.fsync(file.fileno())
    return byte, byte ^ mask


def restore(path: Path, offset: int, change: tuple[int, int]) -> None:
    """Take a flip back, unless the iod has written there since."""
    before, after = change
    with open(path, "r+b") as file:
        if os.pread(file.fileno(), 1, offset)[0] == after:
            os.pwrite(file.fileno(), bytes([before]), offset)


def choose(rng: random.Random, path: Path) -> int:
    """An offset in a header's fields, its sums, its end, or the data."""
    rows = -(-path.stat().st_size // (HEADER_SIZE + CHUNK_SIZE))
    start = rng.randrange(rows) * (HEADER_SIZE + CHUNK_SIZE)
    inside = rng.choice((
        rng.randrange(256), rng.randrange(256, 300), rng.randrange(HEADER_SIZE),
        rng.randrange(HEADER_SIZE - 8, HEADER_SIZE), HEADER_SIZE + rng.randrange(CHUNK_SIZE),
        HEADER_SIZE + rng.randrange(CHUNK_SIZE),
    ))  # fmt: skip
    return min(start + inside, path.stat().st_size - 1)


@pytest.mark.parametrize("running", [False, True], ids=["stopped", "running"])
async def test_a_flipped_bit_of_a_chunk_file_is_reported_and_never_returned(
    cluster: Cluster, running: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever it is; every other chunk still reads."""
    rng = random.Random(f"{SEED} {running}")
    files = {file.ino: file for file in await make_files(cluster)}
    paths = [
        (iod, path)
        for iod in cluster.names[:-1]
        for path in cluster.chunk_files(iod)
        if place(path)[0] in files
    ]
    outcomes: Counter[str] = Counter()
    for _ in range(FLIPS if running else FLIPS // 10):
        iod, path = rng.choice(paths)
        ino, column = place(path)
        offset, mask = choose(rng, path), 1 << rng.randrange(8)
        row = offset // (HEADER_SIZE + CHUNK_SIZE)
        if not running:
            await trio.to_thread.run_sync(cluster.kill, iod)
        change = flip(path, offset, mask)
        if not running:
            await trio.to_thread.run_sync(cluster.start, iod)
        caplog.clear()
        async with Volume.open(cluster.config, cluster.key) as volume:
            bad = await read_pieces(volume, files[ino])
        chunk_index = row * 3 + column
        assert bad in ([], [chunk_index]), (path, offset, mask)
        outcomes["noticed" if bad else "harmless"] += 1
        if bad:
            line = rf"read\.corrupt.* ino={ino} .*chunk_index={chunk_index} iod={iod[3:]}\b"
            assert re.search(line, caplog.text), caplog.text
        restore(path, offset, change)
        if running:
            async with Volume.open(cluster.config, cluster.key) as volume:
                assert not await read_pieces(volume, files[ino])
    print(f"\n{outcomes}")
    # Harmless: in a header that the iod knows already, or under a hole, which is not read.
    assert outcomes["noticed"]


async def test_the_iod_names_what_is_damaged_in_its_log(cluster: Cluster) -> None:
    file = (await make_files(cluster))[0]
    iod, path = next(
        (iod, path)
        for iod in cluster.names[:-1]
        for path in cluster.chunk_files(iod)
        if place(path)[0] == file.ino
    )
    flip(path, HEADER_SIZE + 5, 1)
    async with Volume.open(cluster.config, cluster.key) as volume:
        assert len(await read_pieces(volume, file)) == 1
        report = await trio.to_thread.run_sync(lambda: cluster.fsck(verify=True))
        ino, column = place(path)
        assert f"read.corrupt iod={iod[3:]} ino={ino} column={column} row=0" in cluster.log(iod)
        assert [one.severity for one, _ in report.results] == [Severity.DAMAGE]
        assert report.results[0][0].ino == ino
        # Part of the block cannot be written: the rest of it could not be kept true.
        handle, _, _ = await volume.open_file(ino, writable=True)
        await volume.write(handle, column * CHUNK_SIZE + 1, b"x")
        with pytest.raises(KaError):
            await volume.fsync(handle)
        # Written whole, it is well again.
        await volume.write(handle, 0, file.data)
        await volume.fsync(handle)
        await volume.release(handle)
        assert not await read_pieces(volume, file)
        await volume.unlink(ROOT, file.name)


async def test_a_chunk_file_that_is_cut_or_gone_is_noticed(cluster: Cluster) -> None:
    files = await make_files(cluster)
    file = files[0]
    paths = [
        path
        for iod in cluster.names[:-1]
        for path in cluster.chunk_files(iod)
        if place(path)[0] == file.ino
    ]
    async with Volume.open(cluster.config, cluster.key) as volume:
        for path in paths:
            whole = path.read_bytes()
            os.truncate(path, HEADER_SIZE + CHUNK_SIZE // 2)
            assert await read_pieces(volume, file)
            path.write_bytes(whole)
            assert not await read_pieces(volume, file)
        await volume.setattr(file.ino, wire.SET_SIZE, size=0)
        for one in files:
            await volume.unlink(ROOT, one.name)


# ---------------------------------------------------------------- the metadata store


async def test_what_was_answered_before_a_clean_stop_is_never_silently_lost(
    cluster: Cluster,
) -> None:
    """Not even by damage to the journal's last record, which after a crash is just its end."""
    name = secrets.token_hex(20).encode()
    async with Volume.open(cluster.config, cluster.key) as volume:
        await volume.create(ROOT, name, stat.S_IFDIR | 0o755, uid=0, gid=0)
        await trio.to_thread.run_sync(cluster.stop)
        data = cluster.config.mds[0].data
        places = [
            (path, found.start())
            for path in (data / "journal.0", data / "journal.1")
            for found in re.finditer(name, path.read_bytes())
        ]
        assert places
        changes = [flip(path, at, 1) for path, at in places]
        with pytest.raises(KaError) as caught:
            await trio.to_thread.run_sync(cluster.start)
        assert caught.value.code is Code.ENGINE_DAMAGED
        for (path, at), change in zip(places, changes, strict=True):
            restore(path, at, change)
        await trio.to_thread.run_sync(cluster.start)
        assert (await volume.lookup(ROOT, name)).is_dir


async def test_a_damaged_inode_is_an_error_and_a_line_in_the_mds_log(cluster: Cluster) -> None:
    target = secrets.token_hex(30).encode()
    async with Volume.open(cluster.config, cluster.key) as volume:
        await volume.create(ROOT, target[:8], stat.S_IFLNK | 0o777, uid=0, gid=0, target=target)
        await volume.create(ROOT, b"sound", stat.S_IFDIR | 0o755, uid=0, gid=0)
        await trio.to_thread.run_sync(cluster.fsck)  # its snapshot is a checkpoint
        await trio.to_thread.run_sync(cluster.kill, "mds0")
        store = cluster.config.mds[0].data / "data.mdb"
        content = store.read_bytes()
        places = [found.start() for found in re.finditer(re.escape(target), content)]
        assert places
        for at in places:
            flip(store, at, 4)
        await trio.to_thread.run_sync(cluster.start)
        with pytest.raises(KaError) as caught:
            await volume.lookup(ROOT, target[:8])
        assert caught.value.code is Code.ENGINE_DAMAGED
        assert "store.damaged" in cluster.log("mds0")
        assert (await volume.lookup(ROOT, b"sound")).is_dir
        with pytest.raises(KaError):
            await volume.readdir(ROOT, 0, 100)
        await trio.to_thread.run_sync(cluster.kill, "mds0")
        for at in places:
            flip(store, at, 4)
        await trio.to_thread.run_sync(cluster.start)
        assert (await volume.lookup(ROOT, target[:8])).target == target


def probe_all(store: Path, jobs: list[tuple[str, int, int]]) -> list[str]:
    """Return the verdict on each flip; `died` where LMDB took the process with it."""
    verdicts: list[str] = []
    while len(verdicts) < len(jobs):
        lines = "".join(f"{name} {at} {mask}\n" for name, at, mask in jobs[len(verdicts) :])
        process = subprocess.run(
            [sys.executable, "-m", "tests.support.store_probe", store, store.with_name("work")],
            input=lines, capture_output=True, text=True, check=False,
        )  # fmt: skip
        verdicts += process.stdout.splitlines()
        if len(verdicts) < len(jobs):
            assert process.returncode < 0, process.stderr
            verdicts.append("died")
    return verdicts


@pytest.mark.parametrize("name", ["data.mdb", "journal.0", "journal.1"])
def test_a_flipped_bit_of_the_metadata_store_is_never_silently_wrong(
    tmp_path: Path, name: str
) -> None:
    """Neither a wrong value, nor a record that has vanished, nor a durable batch that is lost."""
    store_probe.build(tmp_path / "store")
    rng, size = random.Random(f"{SEED} {name}"), (tmp_path / "store" / name).stat().st_size
    # Records lie at the journals' beginning.
    end = size if name == "data.mdb" else 40_000
    jobs = [(name, rng.randrange(end), 1 << rng.randrange(8)) for _ in range(FLIPS)]
    verdicts = probe_all(tmp_path / "store", jobs)
    wrong = [(job, one) for job, one in zip(jobs, verdicts, strict=True) if "wrong" in one]
    print(f"\n{Counter(verdicts)}")
    assert not wrong
    assert set(verdicts) <= {*store_probe.VERDICTS, "died"}
