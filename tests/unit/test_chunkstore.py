"""The chunk store on a real disk: integrity, space, caches, listing, threads."""

from __future__ import annotations

import contextlib
import os
import random
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.checksum import ABSENT
from common.errors import Code, KaError
from nfsp.iod import chunk
from nfsp.iod.chunk import BLOCK_SIZE, HEADER_SIZE
from nfsp.iod.chunkstore import ChunkStore, Extent
from tests.support.chunk_model import (
    BOOT,
    CHUNK_SIZE,
    FILE_SIZE,
    Op,
    apply_to_store,
    content,
    opened,
    payload,
    piece_sums,
)

KEY = (5, 0)


def _write(store: ChunkStore, row: int, offset: int, data: bytes, *, sync: bool = False) -> int:
    return store.write(
        *KEY, row, offset, [data], piece_sums(data, offset), chunk_size=CHUNK_SIZE, sync=sync
    )


@contextlib.contextmanager
def _refused(code: Code) -> Iterator[None]:
    with pytest.raises(KaError) as caught:
        yield
    assert caught.value.code is code


def _path(root: Path) -> Path:
    return root / "data" / "0" / "00" / "5.0"


def test_damaged_payload_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        _write(store, 0, 0, b"old" * 1000)
        before = content(store, KEY)
        for sums in ([1], piece_sums(b"other", 0)):
            with _refused(Code.PAYLOAD_CORRUPT):
                store.write(*KEY, 0, 0, [b"new"], sums, chunk_size=CHUNK_SIZE)
        assert content(store, KEY) == before
        with _refused(Code.PAYLOAD_CORRUPT):
            store.write(6, 0, 0, 0, [b"new"], [1], chunk_size=CHUNK_SIZE)
        assert [info.inode for info in store.list(None, 9)] == [5]


def test_sums_of_the_writer_are_the_sums_of_the_reader(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(BLOCK_SIZE + 5000)
    with opened(tmp_path) as store:
        _write(store, 0, 0, data)
        sums, stored = store.read_verified(*KEY, 0, 0, CHUNK_SIZE, chunk_size=CHUNK_SIZE)
        assert (sums, stored) == (piece_sums(data, 0), data)


def test_version_grows_with_every_change(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        assert [_write(store, 0, 0, b"x") for _ in range(3)] == [1, 2, 3]
    with opened(tmp_path) as store:
        store.zero(*KEY, 0, 0, 10, chunk_size=CHUNK_SIZE)
        assert _write(store, 0, 0, b"x") == 5


@pytest.mark.parametrize("settled", [True, False])
def test_flipped_byte_gives_corrupt_or_the_right_data_never_wrong_ones(
    tmp_path: Path, settled: bool
) -> None:
    rng = random.Random(7)
    with opened(tmp_path) as store:
        for op in (
            Op("write", row=0, length=CHUNK_SIZE, fill=1),
            Op("write", row=1, offset=5000, length=40000, fill=2),
            Op("zero", row=0, offset=BLOCK_SIZE, length=BLOCK_SIZE),
            Op("write", row=2, length=100, fill=3),
        ):
            apply_to_store(store, op)
        if settled:
            store.sync(*KEY)
        right = content(store, KEY)
    path = _path(tmp_path)
    size = path.stat().st_size
    stride = HEADER_SIZE + CHUNK_SIZE
    places = {row * stride + at for row in range(3) for at in (*range(0, 280, 7), 4095, 4096)}
    places |= {rng.randrange(size) for _ in range(150)} | {size - 1}
    refusals: list[Code] = []
    for place in sorted(places):
        with path.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))
        with opened(tmp_path) as store:
            for at in range(0, FILE_SIZE, BLOCK_SIZE):
                row, offset = divmod(at, CHUNK_SIZE)
                try:
                    _, data = store.read_verified(
                        *KEY, row, offset, BLOCK_SIZE, chunk_size=CHUNK_SIZE
                    )
                except KaError as error:
                    refusals.append(error.code)
                else:
                    assert data.ljust(BLOCK_SIZE, b"\0") == right[at : at + BLOCK_SIZE], place
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([byte]))
    assert set(refusals) == {Code.CHUNK_CORRUPT}
    assert len(refusals) > len(places) // 2
    with opened(tmp_path) as store:
        assert content(store, KEY) == right


def test_part_of_a_damaged_block_cannot_be_overwritten(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        _write(store, 0, 0, b"a" * CHUNK_SIZE, sync=True)
        with _path(tmp_path).open("r+b") as file:
            file.seek(HEADER_SIZE + 20)
            file.write(b"!")
        with _refused(Code.CHUNK_CORRUPT):
            _write(store, 0, 100, b"part")
        findings = store.verify(*KEY)
        assert [(finding.row, finding.block) for finding in findings] == [(0, 0)]
        _write(store, 0, 0, b"b" * BLOCK_SIZE)
        assert store.verify(*KEY) == []


def test_scrub_names_a_damaged_header(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        for row in range(3):
            _write(store, row, 0, b"a" * CHUNK_SIZE, sync=True)
    for row in (0, 2):
        with _path(tmp_path).open("r+b") as file:
            file.seek(row * chunk.row_stride(CHUNK_SIZE) + 40)
            file.write(b"!")
    with opened(tmp_path) as store:
        findings = [(finding.row, finding.block) for finding in store.verify(*KEY)]
        assert findings == [(0, None), (2, None)]


def test_chunk_file_of_another_inode_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        _write(store, 0, 0, b"a")
    _path(tmp_path).rename(_path(tmp_path).with_name("6.0"))
    with opened(tmp_path) as store, _refused(Code.CHUNK_CORRUPT):
        store.read_verified(6, 0, 0, 0, CHUNK_SIZE, chunk_size=CHUNK_SIZE)


def test_other_chunk_size_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        _write(store, 0, 0, b"a")
        for row in (0, 1):
            with _refused(Code.CHUNK_CORRUPT):
                store.write(*KEY, row, 0, [b"a"], piece_sums(b"a", 0), chunk_size=1 << 20)


@pytest.mark.parametrize(
    ("row", "offset", "length", "chunk_size"),
    [(-1, 0, 1, CHUNK_SIZE), (0, 0, 0, CHUNK_SIZE), (0, 1, CHUNK_SIZE, CHUNK_SIZE), (0, 0, 1, 99)],
)
def test_range_outside_of_a_chunk_is_refused(
    tmp_path: Path, row: int, offset: int, length: int, chunk_size: int
) -> None:
    data = bytes(length)
    with opened(tmp_path) as store, _refused(Code.EINVAL):
        store.write(*KEY, row, offset, [data], piece_sums(data, 0), chunk_size=chunk_size)


def test_second_opener_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    with opened(tmp_path), _refused(Code.EBUSY), opened(tmp_path):
        pass
    with opened(tmp_path):
        pass


def test_nobody_else_may_look_into_the_store(tmp_path: Path) -> None:
    with opened(tmp_path / "store") as store:
        _write(store, 0, 0, b"secret")
    for path in [tmp_path / "store", *(tmp_path / "store").rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_read_plan_stays_readable_while_the_file_is_removed(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        _write(store, 1, 0, b"kept" * 1000)
        with store.read(*KEY, 1, 0, CHUNK_SIZE, chunk_size=CHUNK_SIZE) as plan:
            assert store.remove(*KEY)
            assert not store.remove(*KEY)
            assert os.pread(plan.fd, plan.length, plan.file_offset) == b"kept" * 1000
            assert plan.sums[1] == ABSENT
        with store.read(*KEY, 1, 0, CHUNK_SIZE, chunk_size=CHUNK_SIZE) as plan:
            assert (plan.fd, plan.length, set(plan.sums)) == (-1, 0, {ABSENT})


def test_open_files_are_bounded_and_all_closed_at_the_end(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with ChunkStore(tmp_path, fd_cache_max=8, reserve_bytes=0, boot_id=BOOT) as store:
        for inode in range(100):
            store.write(inode, 0, 0, 0, [b"x"], piece_sums(b"x", 0), chunk_size=CHUNK_SIZE)
        assert len(os.listdir("/proc/self/fd")) <= before + 1 + 8
    assert len(os.listdir("/proc/self/fd")) == before
    with _refused(Code.EBADF):
        store.remove(1, 0)


def test_list_is_sorted_and_can_be_paged(tmp_path: Path) -> None:
    rng = random.Random(3)
    keys = [(rng.choice([5, 1023, 1024, 1 << 18, (1 << 18) - 1, 1 << 40, 3 << 52]), column)
            for column in range(12) for _ in range(3)]  # fmt: skip
    rng.shuffle(keys)
    with opened(tmp_path) as store:
        for key in keys:
            store.write(*key, 0, 0, [b"x"], piece_sums(b"x", 0), chunk_size=CHUNK_SIZE)
        (tmp_path / "data" / "0" / "00" / "stranger").touch()
        listed: list[tuple[int, int]] = []
        while page := store.list(listed[-1] if listed else None, 4):
            assert all(info.size == HEADER_SIZE + 1 for info in page)
            listed += [(info.inode, info.column) for info in page]
        assert listed == sorted(set(keys))


def test_empty_directories_are_removed(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        for inode in (5, 6, 1 << 30):
            store.write(inode, 0, 0, 0, [b"x"], piece_sums(b"x", 0), chunk_size=CHUNK_SIZE)
        for inode in (1 << 30, 5):
            store.remove(inode, 0)
        assert [path.name for path in (tmp_path / "data").iterdir()] == ["0"]
        store.remove(6, 0)
        assert list((tmp_path / "data").iterdir()) == []


def test_extents_are_the_present_blocks(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        assert store.extents(*KEY, chunk_size=CHUNK_SIZE) == ([], None)
        _write(store, 1, BLOCK_SIZE, b"x")
        _write(store, 9, 0, b"x" * CHUNK_SIZE)
        expected = [Extent(1, BLOCK_SIZE, CHUNK_SIZE), Extent(9, 0, CHUNK_SIZE)]
        assert store.extents(*KEY, chunk_size=CHUNK_SIZE) == (expected, None)
        assert store.extents(*KEY, chunk_size=CHUNK_SIZE, rows_max=1) == (expected[:1], 9)
        assert store.extents(*KEY, chunk_size=CHUNK_SIZE, row=2) == (expected[1:], None)


def test_sparse_rows_take_no_space(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        _write(store, 1 << 20, 0, b"far")
        (info,) = store.list(None, 2)
        assert info.size > 1 << 36
        assert info.allocated_size < 1 << 20
        assert store.verify(*KEY) == []


def test_new_data_are_refused_when_only_the_reserve_is_left(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        _write(store, 0, 0, b"old" * 1000)
    with ChunkStore(tmp_path, reserve_bytes=1 << 60, boot_id=BOOT) as store:
        assert store.usage().available_bytes == 0
        with _refused(Code.ENOSPC):
            _write(store, 1, 0, b"new")
        with _refused(Code.ENOSPC):
            store.write(6, 0, 0, 0, [b"new"], piece_sums(b"new", 0), chunk_size=CHUNK_SIZE)
        assert [info.inode for info in store.list(None, 9)] == [5]
        _write(store, 0, 0, b"overwritten")


@contextlib.contextmanager
def _small_disk(path: Path, size: str) -> Iterator[None]:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_full_disk_leaves_the_old_content_and_works_again_when_there_is_room(
    tmp_path: Path,
) -> None:
    rng = random.Random(5)
    disk = tmp_path / "disk"
    with _small_disk(disk, "1m"), opened(disk / "store") as store:
        model = bytearray(FILE_SIZE)
        refusals: list[Code] = []
        for step in range(300):
            filler = Op("write", (6 + step % 7, 0), rng.randrange(3), 0, 40000, 9)
            with contextlib.suppress(KaError):
                apply_to_store(store, filler)
            offset = rng.randrange(CHUNK_SIZE - 1)
            length = rng.randint(1, CHUNK_SIZE - offset)
            op = Op("write", KEY, rng.randrange(3), offset, length, rng.randint(1, 255))
            start, end = op.range
            try:
                apply_to_store(store, op)
                model[start:end] = payload(op)
            except KaError as error:
                refusals.append(error.code)
            assert content(store, KEY) == model, step
            if step % 20 == 19:
                for inode in range(6, 13):
                    store.remove(inode, 0)
            if step % 50 == 49:
                store.trim(*KEY, row=0, offset=100, chunk_size=CHUNK_SIZE)
                model[100:] = bytes(FILE_SIZE - 100)
        assert set(refusals) == {Code.ENOSPC}
        assert 10 < len(refusals) < 290
        assert store.verify(*KEY) == []


def test_block_with_holes_cannot_be_half_overwritten_on_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with _small_disk(disk, "1m"), opened(disk / "store") as store:
        _write(store, 0, 0, b"first")
        _write(store, 0, BLOCK_SIZE - 4, b"last")
        before = content(store, KEY)
        with _refused(Code.ENOSPC):
            for inode in range(6, 1000):
                apply_to_store(store, Op("write", (inode, 0), length=1, fill=1))
        with _refused(Code.ENOSPC):
            _write(store, 0, 0, b"new" * 10000)
        assert content(store, KEY) == before
        for inode in range(6, 20):
            store.remove(inode, 0)
        _write(store, 0, 0, b"new" * 10000)


def test_threads_writing_different_ranges_of_a_chunk_lose_nothing(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def work(store: ChunkStore, number: int) -> None:
        rng = random.Random(number)
        try:
            for step in range(40):
                offset = (step * 8 + number) * 200
                _write(store, 0, offset, bytes([number + 1]) * 200, sync=rng.random() < 0.1)
                apply_to_store(store, Op("write", (6 + rng.randrange(6), 0), 0, 0, 10, 1))
                if rng.random() < 0.2:
                    apply_to_store(store, Op("remove", (6 + rng.randrange(6), 0)))
                store.read_verified(*KEY, 0, 0, CHUNK_SIZE, chunk_size=CHUNK_SIZE)
                if rng.random() < 0.1:
                    store.settle()
        except BaseException as error:
            failures.append(error)

    with opened(tmp_path) as store:
        threads = [threading.Thread(target=work, args=(store, number)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        written = content(store, KEY)[: 40 * 8 * 200]
        assert written == b"".join(bytes([at % 8 + 1]) * 200 for at in range(320))
