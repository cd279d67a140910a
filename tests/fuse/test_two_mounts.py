"""What two mounts of one cluster see of each other: close-to-open, and no attribute over a second.

Leases do not exist yet; docs/posix.md states this contract.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster

STALE_S_MAX = 1.0
"""How old a cached attribute or entry may be (`attr_timeout`)."""
NOISE_S = 1.0


@pytest.fixture(scope="module")
def other(cluster: Cluster) -> Iterator[Path]:
    with cluster.mounted(cluster.directory.parent / "other") as path:
        yield path


def _within_a_second(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + STALE_S_MAX + NOISE_S
    while not holds():
        assert time.monotonic() < deadline_s, "still the old state"
        time.sleep(0.05)


def test_an_open_sees_what_a_close_elsewhere_has_written(cluster: Cluster, other: Path) -> None:
    here, there = cluster.mount / "file", other / "file"
    for generation in range(20):
        writer, reader = (here, there) if generation % 2 else (there, here)
        writer.write_bytes(b"%d " % generation * 50_000)
        assert reader.read_bytes() == b"%d " % generation * 50_000


def test_same_size_and_old_mtime_do_not_hide_a_change(cluster: Cluster, other: Path) -> None:
    here, there = cluster.mount / "dated", other / "dated"
    for content in (b"one", b"two", b"six"):
        here.write_bytes(content)
        os.utime(here, (1, 1))
        assert there.read_bytes() == content


def test_an_open_file_shows_what_was_fsynced_elsewhere(cluster: Cluster, other: Path) -> None:
    here, there = cluster.mount / "synced", other / "synced"
    here.write_bytes(b"aaaa")
    with there.open("rb", buffering=0) as reader, here.open("r+b", buffering=0) as writer:
        assert reader.read() == b"aaaa"
        writer.write(b"bbbb")
        os.fsync(writer.fileno())

        def seen() -> bool:
            os.fstat(reader.fileno())
            return os.pread(reader.fileno(), 4, 0) == b"bbbb"

        _within_a_second(seen)


def test_attributes_and_entries_are_never_older_than_a_second(
    cluster: Cluster, other: Path
) -> None:
    here, there = cluster.mount / "watched", other / "watched"
    here.write_bytes(b"12345")
    assert there.stat().st_size == 5
    here.write_bytes(b"123")
    here.chmod(0o600)
    _within_a_second(lambda: (there.stat().st_size, there.stat().st_mode & 0o777) == (3, 0o600))
    here.rename(cluster.mount / "renamed")
    _within_a_second(lambda: not there.exists() and (other / "renamed").exists())
    (cluster.mount / "renamed").unlink()
    _within_a_second(lambda: not (other / "renamed").exists())
    assert "renamed" not in os.listdir(other)


def test_an_absent_name_is_found_as_soon_as_it_is_made(cluster: Cluster, other: Path) -> None:
    for number in range(10):
        there = other / f"new{number}"
        assert not there.exists()
        (cluster.mount / there.name).mkdir()
        _within_a_second(there.is_dir)


def test_exclusive_creation_has_one_winner(cluster: Cluster, other: Path) -> None:
    for number in range(20):
        winners = 0
        for root in (cluster.mount, other):
            try:
                os.close(os.open(root / f"lock{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                winners += 1
            except FileExistsError:
                pass
        assert winners == 1


def test_a_file_removed_elsewhere_stays_usable_where_it_is_open(
    cluster: Cluster, other: Path
) -> None:
    (cluster.mount / "gone").write_bytes(b"still here")
    with (other / "gone").open("r+b", buffering=0) as held:
        (cluster.mount / "gone").unlink()
        assert held.read() == b"still here"
        held.write(b"!")
        os.fsync(held.fileno())
        assert os.pread(held.fileno(), 20, 0) == b"still here!"


def test_a_directory_removed_elsewhere_cannot_be_filled(cluster: Cluster, other: Path) -> None:
    (cluster.mount / "d").mkdir()
    fd = os.open(other / "d", os.O_RDONLY)
    try:
        (cluster.mount / "d").rmdir()
        with pytest.raises(OSError) as caught:
            os.mkdir("inside", dir_fd=fd)
        assert caught.value.errno in (errno.ENOENT, errno.ESTALE)
    finally:
        os.close(fd)


def test_read_only_mount_reads_and_refuses_every_change(cluster: Cluster) -> None:
    (cluster.mount / "kept").write_bytes(b"content")
    with cluster.mounted(cluster.directory.parent / "ro", "ro") as root:
        assert (root / "kept").read_bytes() == b"content"
        changes: tuple[Callable[[], object], ...] = (
            lambda: (root / "kept").write_bytes(b""),
            lambda: (root / "kept").unlink(),
            lambda: (root / "kept").rename(root / "moved"),
            lambda: (root / "kept").chmod(0o600),
            lambda: os.utime(root / "kept"),
            lambda: os.truncate(root / "kept", 0),
            lambda: os.setxattr(root / "kept", "user.x", b""),
            lambda: os.link(root / "kept", root / "linked"),
            lambda: (root / "new").mkdir(),
            lambda: (root / "new").symlink_to("kept"),
            lambda: os.mkfifo(root / "new"),
        )
        for change in changes:
            with pytest.raises(OSError) as caught:
                change()
            assert caught.value.errno == errno.EROFS
    assert (cluster.mount / "kept").read_bytes() == b"content"
