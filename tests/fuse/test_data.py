"""Laws of file data through the kernel: holes, mappings, appending, direct I/O, open and gone."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nfsp.model import CHUNK_SIZE_DEFAULT
from tests.support.cluster import Cluster

GIB = 1 << 30
CHUNK_SIZE = CHUNK_SIZE_DEFAULT


@pytest.fixture
def root(cluster: Cluster, request: pytest.FixtureRequest) -> Path:
    """A directory of its own on the mount for each test."""
    path = cluster.mount / request.node.name[:100]
    path.mkdir()
    return path


def _python(script: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)])


def test_sparse_file_beyond_4_gib_reads_zeros_and_stores_little(
    root: Path, cluster: Cluster
) -> None:
    file = root / "sparse"
    stored = _stored(cluster)
    with file.open("w+b") as stream:
        for at in (0, 4 * GIB - 3, 9 * GIB):
            stream.seek(at)
            stream.write(b"island")
    cluster.drop_caches()
    assert file.stat().st_size == 9 * GIB + 6
    fd = os.open(file, os.O_RDONLY)
    try:
        assert os.pread(fd, 20, 4 * GIB - 10) == bytes(7) + b"island" + bytes(7)
        assert os.pread(fd, 4096, 2 * GIB) == bytes(4096)
        assert os.pread(fd, 100, 9 * GIB) == b"island"
        assert os.pread(fd, 1, 9 * GIB + 6) == b""
    finally:
        os.close(fd)
    assert _stored(cluster) - stored < 4 * CHUNK_SIZE
    with file.open("r+b") as stream:
        stream.truncate(4 * GIB)
        stream.truncate(5 * GIB)
        stream.seek(4 * GIB - 3)
        assert stream.read(6) == b"isl\0\0\0"


def _stored(cluster: Cluster) -> int:
    """Bytes that all iods take on their disks."""
    return sum(
        file.stat().st_blocks * 512
        for iod in cluster.directory.glob("iod*")
        for file in iod.rglob("*")
        if file.is_file()
    )


def test_writing_beyond_what_iods_can_hold_is_efbig_at_once(root: Path) -> None:
    with (root / "file").open("w+b", buffering=0) as stream:
        for at in (1 << 50, 1 << 62, (1 << 63) - 2):
            with pytest.raises(OSError) as caught:
                os.pwrite(stream.fileno(), b"x", at)
            assert caught.value.errno == errno.EFBIG
        os.pwrite(stream.fileno(), b"x", (45 << 40) - 1)
        os.fsync(stream.fileno())
        assert os.fstat(stream.fileno()).st_size == 45 << 40


def test_data_are_spread_over_all_iods(root: Path, cluster: Cluster) -> None:
    def shares() -> list[int]:
        return [
            sum(f.stat().st_blocks * 512 for f in iod.rglob("*") if f.is_file())
            for iod in sorted(cluster.directory.glob("iod*"))
        ]

    before = shares()
    with (root / "striped").open("wb") as stream:
        stream.write(os.urandom(12 * CHUNK_SIZE))
        stream.flush()
        os.fsync(stream.fileno())
    grown = [after - b for after, b in zip(shares(), before, strict=True)]
    assert len(grown) == 3
    assert all(4 * CHUNK_SIZE <= one < 5 * CHUNK_SIZE for one in grown), grown


def test_unlinked_file_stays_usable_while_it_is_open(root: Path, cluster: Cluster) -> None:
    with (root / "file").open("w+b") as stream:
        stream.write(b"before ")
        stream.flush()
        (root / "file").unlink()
        assert os.listdir(root) == []
        stream.write(b"after")
        stream.flush()
        os.fsync(stream.fileno())
        cluster.drop_caches()
        stream.seek(0)
        assert stream.read() == b"before after"
        os.fchmod(stream.fileno(), 0o600)
        assert os.fstat(stream.fileno()).st_nlink == 0


def test_shared_mapping_is_written_and_read(root: Path, cluster: Cluster) -> None:
    size = 3 * CHUNK_SIZE + 777
    with (root / "mapped").open("w+b") as stream:
        stream.truncate(size)
        with mmap.mmap(stream.fileno(), size) as mapping:
            mapping[CHUNK_SIZE - 2 : CHUNK_SIZE + 2] = b"edge"
            mapping[size - 3 :] = b"end"
            mapping.flush()
            assert os.pread(stream.fileno(), 4, CHUNK_SIZE - 2) == b"edge"
            os.pwrite(stream.fileno(), b"by write", 5)
            assert mapping[5:13] == b"by write"
    cluster.drop_caches()
    content = (root / "mapped").read_bytes()
    assert len(content) == size
    assert content[CHUNK_SIZE - 2 : CHUNK_SIZE + 2] == b"edge"
    assert content[-3:] == b"end"
    assert content.count(0) == size - len("edge" "end" "by write")


def test_mapping_is_shared_by_two_processes(root: Path) -> None:
    file = root / "mapped"
    file.write_bytes(bytes(8192))
    script = """
import mmap, sys
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 8192) as mapping:
    mapping[4096:4101] = b"child"
"""
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 8192) as mapping:
        assert _python(script, file).wait(30) == 0
        assert mapping[4096:4101] == b"child"


def test_appending_processes_lose_nothing(root: Path) -> None:
    file = root / "log"
    script = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
for number in range(300):
    os.write(fd, f"{sys.argv[2]} {number:06}\\n".encode())
"""
    writers = [_python(script, file, name) for name in ("a", "b")]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    lines = file.read_text().splitlines()
    for name in ("a", "b"):
        own = [line for line in lines if line.startswith(name)]
        assert own == [f"{name} {number:06}" for number in range(300)]
    assert len(lines) == 600


def test_direct_io_agrees_with_cached_io(root: Path) -> None:
    file = root / "direct"
    size = 3 * CHUNK_SIZE
    with mmap.mmap(-1, size) as buffer:  # aligned as direct I/O wants it
        buffer[:] = os.urandom(size)
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        try:
            assert os.pwrite(fd, buffer, 0) == size
            assert file.read_bytes() == buffer[:]
            with file.open("r+b") as cached:
                cached.seek(4096)
                cached.write(b"cached")
            with mmap.mmap(-1, 8192) as back:
                assert os.preadv(fd, [back], 4096) == 8192
                assert back[:6] == b"cached"
                assert back[6:] == buffer[4096 + 6 : 4096 + 8192]
        finally:
            os.close(fd)


def test_a_write_across_many_chunks_is_read_back_in_odd_pieces(root: Path) -> None:
    data = os.urandom(5 * CHUNK_SIZE + 12345)
    file = root / "pieces"
    file.write_bytes(data)
    with file.open("rb", buffering=0) as stream:
        for at in (0, 1, CHUNK_SIZE - 1, 2 * CHUNK_SIZE + 32767, len(data) - 5):
            stream.seek(at)
            assert stream.read(70_001) == data[at : at + 70_001]


def test_space_cannot_be_reserved_and_says_so(root: Path) -> None:
    """What is not built yet fails as such; callers have their ways around it."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (root / "file").open("w+b") as stream:
        stream.write(b"data")
        stream.flush()
        fd = stream.fileno()
        assert libc.fallocate(fd, 0, 0, 4096) == -1
        assert ctypes.get_errno() == errno.EOPNOTSUPP
        os.posix_fallocate(fd, 0, 100_000)  # done by writing
        assert os.fstat(fd).st_size == 100_000
        assert os.lseek(fd, 10, os.SEEK_DATA) == 10
        assert os.lseek(fd, 10, os.SEEK_HOLE) == 100_000


def test_copying_inside_the_kernel_copies(root: Path) -> None:
    data = os.urandom(300_000)
    (root / "from").write_bytes(data)
    with (root / "from").open("rb") as source, (root / "to").open("wb") as target:
        left = len(data)
        while left:
            left -= os.copy_file_range(source.fileno(), target.fileno(), left)
    assert (root / "to").read_bytes() == data
    with (root / "from").open("rb") as source, (root / "sent").open("wb") as target:
        at = 0
        while at < len(data):
            at += os.sendfile(target.fileno(), source.fileno(), at, len(data))
    assert (root / "sent").read_bytes() == data
