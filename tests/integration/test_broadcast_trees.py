"""Laws of directories: a tree arrives as it is, again for next to nothing, and stays in place."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from common.broadcast import edge
from common.broadcast.image import Entry, EntryKind, decode_table, encode_table, image_id
from common.broadcast.manifest import Algorithm, Manifest
from common.broadcast.sink import FileSink
from common.broadcast.topology import Kind
from common.errors import Code, KaError
from common.framing import FrameReceiver
from tests.support.transfers import CHUNK_SIZE, Party, random_file, shape

FILE_COUNT = 500
MANY_COUNT = 5000


class CountingSink(FileSink):
    """Knows how many chunks had to travel, and in how many parts they were written."""

    written_count = 0
    part_count = 0

    def put(self, chunk: int, at: int, part: memoryview) -> None:
        self.written_count += not at
        self.part_count += 1
        super().put(chunk, at, part)


def make_tree(root: Path, file_count: int = FILE_COUNT) -> None:
    """Make one of everything that a tree can hold, and many small files.

    Some of them have attributes, some another name, some a hole.
    """
    root.mkdir()
    for number in range(file_count):
        directory = root / f"d{number % 7}" / f"e{number % 3}"
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"file{number}"
        path.write_bytes(bytes([number % 256]) * (number * 37 % 5000))
        if number % 20 == 3:
            os.setxattr(path, "user.number", b"%d" % number)
        if number % 50 == 5:
            os.link(path, directory / f"second name {number}")
        if number % 100 == 7:
            os.truncate(path, path.stat().st_size + (1 << 20))
        path.chmod(0o400 + number % 0o300)
    (root / "empty").mkdir(mode=0o711)
    (root / "link").symlink_to("/nowhere/at/all")
    os.link(root / "d1" / "e1" / "file1", root / "hard link")
    os.mkfifo(root / "fifo", 0o640)
    with (root / "holes").open("wb") as file:
        file.write(b"start")
        file.seek(1 << 24)
        file.write(b"middle")
        file.truncate(1 << 25)
    odd = os.fsencode(root) + b"/\xff\xfe not utf-8"
    with open(odd, "wb") as file:
        file.write(b"odd")
    os.setxattr(root / "holes", "user.colour", b"blue")
    os.setxattr(root / "empty", "user.shape", b"\x00\x01")
    if os.geteuid() == 0:
        os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.chown(root / "d0", 12345, 54321)
        os.chown(root / "link", 77, 77, follow_symlinks=False)
        (root / "d0" / "setuid").write_bytes(b"#!")
        (root / "d0" / "setuid").chmod(0o4755)
    for path in sorted(root.rglob("*"), reverse=True):
        os.utime(path, ns=(5, 1_600_000_000_123_456_789), follow_symlinks=False)
    os.utime(root, ns=(5, 1_500_000_000_000_000_001))


def look(root: Path) -> dict[str, Any]:
    """Return everything that must be equal on both sides."""
    found: dict[str, Any] = {}
    first_names: dict[int, str] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        name, status = str(path.relative_to(root)), path.lstat()
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = (path.read_bytes(), first_names.setdefault(status.st_ino, name))
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        xattrs = {
            one: os.getxattr(path, one, follow_symlinks=False)
            for one in os.listxattr(path, follow_symlinks=False)
        }
        found[name] = (
            status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_rdev,
            content, xattrs,
        )  # fmt: skip
    return found


def check_equal(one: Path, other: Path) -> None:
    mine, theirs = look(one), look(other)
    assert mine.keys() == theirs.keys()
    for name, facts in mine.items():
        assert facts == theirs[name], name


async def copy(source: Path, targets: Sequence[Path], *, chunk_size: int = CHUNK_SIZE) -> int:
    """Copy to all; return the number of chunks that had to travel to the first."""
    sinks = {rank: CountingSink(str(path)) for rank, path in enumerate(targets, 1)}
    party = Party(shape(Kind.CHAIN, len(targets)))
    summary = await party.run(source, dict(sinks), chunk_size=chunk_size)
    assert summary.exit_code == 0, summary
    return sinks[1].written_count


async def test_a_tree_arrives_as_it_is_and_again_for_nothing(tmp_path: Path) -> None:
    make_tree(tmp_path / "source", MANY_COUNT)
    targets = [tmp_path / "one", tmp_path / "two"]
    assert await copy(tmp_path / "source", targets) > 10
    for target in targets:
        check_equal(tmp_path / "source", target)
        assert (target / "holes").stat().st_blocks * 512 < 1 << 20
    assert await copy(tmp_path / "source", targets) == 0
    check_equal(tmp_path / "source", targets[0])


async def test_large_chunks_are_written_as_they_come_and_arrive_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine a whole chunk may have come before its first byte is taken.
    whole = FrameReceiver.want
    monkeypatch.setattr(FrameReceiver, "want", lambda self: whole(self)[: 256 << 10])
    monkeypatch.setattr(edge, "SIZE_PER_TURN", 1 << 20)
    source = tmp_path / "source"
    source.mkdir()
    for number, size in enumerate((3_000_000, 1, 900_000, 0, 5_000_000)):
        random_file(source / f"file{number}", size, seed=number)
    sinks = {rank: CountingSink(str(tmp_path / f"target{rank}")) for rank in (1, 2)}
    party = Party(shape(Kind.CHAIN, 2))
    summary = await party.run(source, dict(sinks), chunk_size=4 << 20)
    assert summary.exit_code == 0
    for rank, sink in sinks.items():
        assert sink.part_count > sink.written_count
        check_equal(source, tmp_path / f"target{rank}")


async def test_only_what_has_changed_travels_however_places_shift(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    make_tree(source)
    await copy(source, [target])
    (source / "a new first file").write_bytes(os.urandom(3 * CHUNK_SIZE + 1))
    os.chmod(source / "holes", 0o600)
    with (source / "holes").open("ab") as file:
        file.write(b"end")
    (target / "d2" / "e2" / "file2").unlink()
    (target / "link").unlink()
    (target / "link").write_bytes(b"not a link any more")
    assert await copy(source, [target]) <= 8
    check_equal(source, target)


async def test_extra_files_at_the_destination_are_left_alone(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "file").write_bytes(b"new")
    target.mkdir()
    (target / "other").write_bytes(b"old")
    await copy(source, [target])
    assert (target / "file").read_bytes() == b"new"
    assert (target / "other").read_bytes() == b"old"
    assert sorted(os.listdir(target)) == ["file", "other"]


async def test_names_as_long_as_can_be_and_leftovers_do_no_harm(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / ".ka-part").mkdir(parents=True)
    (source / ("n" * 255)).write_bytes(b"long")
    await copy(source, [target])
    assert os.listdir(target) == ["n" * 255]
    await copy(source / ("n" * 255), [tmp_path / ("m" * 255)])
    assert (tmp_path / ("m" * 255)).read_bytes() == b"long"


async def test_data_in_the_place_of_a_hole_do_not_survive(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    target.write_bytes(b"\xee" * (1 << 20) + b"end")
    await copy(source, [target])
    assert target.read_bytes() == source.read_bytes()


async def test_no_link_at_the_destination_leads_out_of_it(tmp_path: Path) -> None:
    source, target, outside = tmp_path / "source", tmp_path / "target", tmp_path / "outside"
    for path in (source / "dir", target, outside):
        path.mkdir(parents=True)
    (source / "dir" / "file").write_bytes(b"inside")
    (source / "file").write_bytes(b"inside")
    (outside / "file").write_bytes(b"outside")
    (target / "dir").symlink_to(outside)
    (target / "file").symlink_to(outside / "file")
    await copy(source, [target])
    assert (outside / "file").read_bytes() == b"outside"
    assert sorted(os.listdir(outside)) == ["file"]
    check_equal(source, target)


async def test_nothing_changes_at_the_destination_when_a_transfer_fails(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "a").mkdir(parents=True)
    (source / "a" / "file").write_bytes(b"new")
    (target / "a").mkdir(parents=True)
    (target / "a" / "file").write_bytes(b"old")

    class FailingSink(FileSink):
        def put(self, chunk: int, at: int, part: memoryview) -> None:
            raise OSError(5, "Input/output error")

    party = Party(shape(Kind.CHAIN, 1))
    summary = await party.run(source, {1: FailingSink(str(target))})
    assert summary.exit_code == 1
    assert (target / "a" / "file").read_bytes() == b"old"


async def test_a_second_transfer_to_the_same_place_is_told_to_wait(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"data")
    party = Party(shape(Kind.CHAIN, 2))
    sinks = {rank: FileSink(str(tmp_path / "same")) for rank in (1, 2)}
    summary = await party.run(tmp_path / "source", dict(sinks))
    assert summary.exit_code == 2
    (other,) = summary.others.values()
    assert "another transfer" in other.reason


def refused(*entries: Entry) -> None:
    table = encode_table(entries)
    manifest = Manifest(bytes(16), image_id("x", table), 0, 1, Algorithm.XXH3, b"")
    with pytest.raises(KaError) as caught:
        decode_table(table, manifest.image_id)
    assert caught.value.code is Code.PROTOCOL


ROOT = Entry(b"", EntryKind.DIRECTORY, 0o755, 0, 0, 0)


def entry(path: bytes, kind: EntryKind = EntryKind.FILE, **more: Any) -> Entry:
    return Entry(path, kind, 0o644, 0, 0, 0, **more)


@pytest.mark.parametrize(
    "path",
    [b"..", b"../x", b"/etc/passwd", b"a/../../x", b"a//x", b"./x", b"x\0y", b"absent/x",
     b"x" * 256, b".ka-part", b".ka-part/x", b"file/x", b"link/x", b""],
)  # fmt: skip
def test_paths_that_leave_the_destination_are_refused(path: bytes) -> None:
    link = entry(b"link", EntryKind.SYMLINK, target=b"/etc")
    refused(ROOT, entry(b"a", EntryKind.DIRECTORY), entry(b"file"), link, entry(path))


def test_tables_that_contradict_themselves_are_refused() -> None:
    refused(entry(b"x"))
    refused(ROOT, entry(b"x", size=5, ranges=((0, 6),)))
    refused(ROOT, entry(b"x", size=9, ranges=((0, 5), (4, 2))))
    refused(ROOT, entry(b"x", EntryKind.DIRECTORY, size=9, ranges=((0, 5),)))
    refused(ROOT, entry(b"x", EntryKind.HARD_LINK, target=b"y"))
    refused(ROOT, entry(b"x", EntryKind.SYMLINK))
    refused(ROOT, entry(b"x"), entry(b"x"))
