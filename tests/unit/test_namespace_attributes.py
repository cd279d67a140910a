"""Laws of chmod, chown, utimens, truncate, and of the trim queue."""

from __future__ import annotations

import stat
from collections.abc import Iterator

import pytest

from common.errors import Code
from nfsp import keys, wire
from nfsp.mds import queues
from nfsp.mds.view import TrimReady
from nfsp.model import FILE_SIZE_MAX, ROOT, Remains
from tests.support.space import Space, refused


@pytest.fixture
def space() -> Iterator[Space]:
    space = Space()
    yield space
    space.check()


# ---------------------------------------------------------------- attributes


def test_only_the_attributes_named_change(space: Space) -> None:
    file = space.create(ROOT, b"f")
    values = {"mode": 0o4711, "uid": 5, "gid": 6, "atime_ns": -8, "mtime_ns": 9}
    for bit, field in (
        (wire.SET_MODE, "mode"),
        (wire.SET_UID, "uid"),
        (wire.SET_GID, "gid"),
        (wire.SET_ATIME, "atime_ns"),
        (wire.SET_MTIME, "mtime_ns"),
    ):
        before = space.inode(file.ino)
        after = space.set_attr(file.ino, bit, **values)
        expected = stat.S_IFREG | 0o4711 if field == "mode" else values[field]
        changes = {field: expected, "ctime_ns": space.now_ns, "change": before.change + 1}
        assert after == before._replace(**changes)
        assert space.inode(file.ino) == after


def test_chmod_keeps_the_file_type(space: Space) -> None:
    made = space.mkdir(ROOT, b"d")
    after = space.set_attr(made.ino, wire.SET_MODE, mode=stat.S_IFREG | 0o1777)
    assert after.mode == stat.S_IFDIR | 0o1777


def test_now_is_the_servers_clock(space: Space) -> None:
    file = space.create(ROOT, b"f").ino
    after = space.set_attr(file, wire.SET_ATIME_NOW | wire.SET_MTIME_NOW, atime_ns=1, mtime_ns=1)
    assert (after.atime_ns, after.mtime_ns) == (space.now_ns, space.now_ns)


def test_setting_nothing_changes_nothing(space: Space) -> None:
    file = space.create(ROOT, b"f")
    assert space.set_attr(file.ino, 0) == file
    assert space.inode(file.ino) == file


def test_numbers_out_of_range_are_einval(space: Space) -> None:
    file = space.create(ROOT, b"f").ino
    for valid, values in (
        (256, {}),
        (-1, {}),
        (wire.SET_UID, {"uid": -1}),
        (wire.SET_GID, {"gid": 1 << 32}),
        (wire.SET_ATIME, {"atime_ns": 1 << 63}),
        (wire.SET_MTIME, {"mtime_ns": 1 << 63}),
        (wire.SET_SIZE, {"size": -1}),
    ):
        with refused(Code.EINVAL):
            space.set_attr(file, valid, **values)
    with refused(Code.ESTALE):
        space.set_attr(99, wire.SET_MODE)


def test_attributes_of_a_removed_open_file_can_change(space: Space) -> None:
    file = space.create(ROOT, b"f", open=True).ino
    space.unlink(ROOT, b"f")
    assert space.set_attr(file, wire.SET_UID, uid=3).uid == 3
    assert space.truncate(file, 100).size == 100


# ---------------------------------------------------------------- truncate


def test_truncate_sets_mtime_and_ctime_even_to_the_same_size(space: Space) -> None:
    file = space.create(ROOT, b"f").ino
    for size in (10, 10, 3, 0, 0):
        after = space.truncate(file, size)
        assert (after.size, after.mtime_ns, after.ctime_ns) == (size, space.now_ns, space.now_ns)
        space.finish_trims()


def test_truncate_with_mtime_takes_that_mtime(space: Space) -> None:
    file = space.create(ROOT, b"f").ino
    after = space.set_attr(file, wire.SET_SIZE | wire.SET_MTIME, size=1, mtime_ns=5)
    assert after.mtime_ns == 5


def test_shrinking_waits_for_a_trim_at_the_new_size(space: Space) -> None:
    file = space.create(ROOT, b"f")
    space.wrote(file.ino, 1000)
    space.truncate(file.ino, 10)
    assert file.layout is not None
    remains = Remains(file.layout, 10)
    assert space.effects == (TrimReady(file.ino, remains, 1000),)
    assert queues.trim_queue(space.view, 0, 10) == [(file.ino, remains)]


def test_growing_and_keeping_the_size_trim_nothing(space: Space) -> None:
    file = space.create(ROOT, b"f", open=True).ino
    for size in (0, 5, 5, FILE_SIZE_MAX):
        space.truncate(file, size)
        assert not space.effects


def test_second_truncation_keeps_the_smaller_cut(space: Space) -> None:
    file = space.create(ROOT, b"f").ino
    space.wrote(file, 1000)
    space.truncate(file, 10)
    space.truncate(file, 500)
    assert [trim.remains.size for trim in space.trims] == [10]
    space.truncate(file, 50)
    assert [trim.remains.size for trim in space.trims] == [10]
    space.truncate(file, 5)
    assert [(trim.remains.size, trim.end) for trim in space.trims] == [(5, FILE_SIZE_MAX)]


def test_finished_trim_leaves_the_queue_unless_another_took_its_place(space: Space) -> None:
    file = space.create(ROOT, b"f").ino
    space.wrote(file, 1000)
    space.truncate(file, 10)
    first = space.trims[0].remains
    space.truncate(file, 5)
    assert queues.trimmed(space.view, file, first) == {}
    space.view.apply(queues.trimmed(space.view, file, space.trims[0].remains))
    assert queues.trim_queue(space.view, 0, 10) == []


def test_opening_for_writing_waits_for_a_pending_trim(space: Space) -> None:
    file = space.create(ROOT, b"f").ino
    space.wrote(file, 1000)
    space.truncate(file, 10)
    space.open(file)
    assert not space.trims
    space.open(file, writable=True)
    assert [trim.remains.size for trim in space.trims] == [10]
    space.create(ROOT, b"f", open=True)
    assert [trim.remains.size for trim in space.trims] == [10]
    space.finish_trims()
    space.open(file, writable=True)
    assert not space.trims


def test_write_beyond_the_cut_of_a_pending_trim_is_eio(space: Space) -> None:
    file = space.create(ROOT, b"f").ino
    space.wrote(file, 1000)
    space.truncate(file, 10)
    assert space.wrote(file, 10).size == 10
    with refused(Code.EIO):
        space.wrote(file, 11)
    space.finish_trims()
    assert space.wrote(file, 11).size == 11


def test_file_removed_with_a_pending_trim_has_all_its_columns_purged(space: Space) -> None:
    file = space.create(ROOT, b"f").ino
    space.wrote(file, 1000)
    space.truncate(file, 0)
    space.unlink(ROOT, b"f")
    assert queues.trim_queue(space.view, 0, 10) == []
    [(ino, remains)] = queues.purge_queue(space.view, 0, 10)
    assert (ino, remains.size) == (file, FILE_SIZE_MAX)
    space.view.apply(queues.purged(file))
    assert queues.purge_queue(space.view, 0, 10) == []


def test_queues_are_read_in_pages(space: Space) -> None:
    inos = []
    for number in range(5):
        inos.append(space.create(ROOT, b"%d" % number).ino)
        space.wrote(inos[-1], 10)
        space.truncate(inos[-1], 1)
    first = queues.trim_queue(space.view, 0, 3)
    rest = queues.trim_queue(space.view, first[-1][0], 3)
    assert [ino for ino, _ in first + rest] == inos


def test_size_of_what_is_no_file_cannot_be_set(space: Space) -> None:
    fifo = space.create(ROOT, b"p", stat.S_IFIFO | 0o600).ino
    with refused(Code.EINVAL):
        space.truncate(fifo, 0)
    with refused(Code.EISDIR):
        space.truncate(ROOT, 0)
    with refused(Code.EISDIR):
        space.wrote(ROOT, 1)


def test_size_beyond_63_bits_is_efbig(space: Space) -> None:
    file = space.create(ROOT, b"f").ino
    for attempt in (space.truncate, space.wrote):
        with refused(Code.EFBIG):
            attempt(file, FILE_SIZE_MAX + 1)
        assert attempt(file, FILE_SIZE_MAX).size == FILE_SIZE_MAX


# ---------------------------------------------------------------- wrote


def test_wrote_never_shrinks_and_takes_the_writers_mtime(space: Space) -> None:
    file = space.create(ROOT, b"f")
    space.wrote(file.ino, 100)
    after = space.wrote(file.ino, 50, mtime_ns=77)
    assert (after.size, after.mtime_ns, after.ctime_ns) == (100, 77, space.now_ns)
    assert after.change == file.change + 2


def test_wrote_is_dated_by_the_writer_unless_that_cannot_be(space: Space) -> None:
    file = space.create(ROOT, b"f")
    between = file.ctime_ns + 1
    space.now_ns += 10
    assert space.wrote(file.ino, 1, mtime_ns=between).ctime_ns == between
    assert space.wrote(file.ino, 1, mtime_ns=between - 1).ctime_ns == space.now_ns
    assert space.wrote(file.ino, 1, mtime_ns=space.now_ns + 1000).ctime_ns == space.now_ns


def test_wrote_to_a_vanished_file_is_estale(space: Space) -> None:
    file = space.create(ROOT, b"f").ino
    space.unlink(ROOT, b"f")
    with refused(Code.ESTALE):
        space.wrote(file, 1)
    assert space.view.get(keys.inode(file)) is None
