"""Laws of rename(2) and RENAME_EXCHANGE."""

from __future__ import annotations

import stat
from collections.abc import Iterator

import pytest

from common.errors import Code
from nfsp import keys
from nfsp.mds.rename import RENAME_EXCHANGE, RENAME_NOREPLACE
from nfsp.model import LINK_COUNT_MAX, ROOT
from tests.support.space import Space, refused


@pytest.fixture
def space() -> Iterator[Space]:
    space = Space()
    yield space
    space.check()


def test_rename_moves_the_name_not_the_inode(space: Space) -> None:
    file = space.create(ROOT, b"f")
    there = space.mkdir(ROOT, b"d").ino
    space.rename(ROOT, b"f", there, b"g")
    moved = space.lookup(there, b"g")
    assert moved == file._replace(ctime_ns=space.now_ns, change=file.change + 1)
    assert space.names() == {b"d"}


def test_rename_sets_mtime_and_ctime_of_both_directories(space: Space) -> None:
    one, two = space.mkdir(ROOT, b"1").ino, space.mkdir(ROOT, b"2").ino
    space.create(one, b"f")
    space.rename(one, b"f", two, b"f")
    for ino in (one, two):
        parent = space.inode(ino)
        assert parent.mtime_ns == parent.ctime_ns == space.now_ns
        assert parent.nlink == 2


def test_renamed_entry_gets_a_new_cookie_even_within_its_directory(space: Space) -> None:
    space.create(ROOT, b"a")
    space.create(ROOT, b"b")
    space.rename(ROOT, b"a", ROOT, b"c")
    assert [(entry.name, entry.cookie) for entry in space.entries(ROOT)] == [(b"b", 4), (b"c", 5)]


def test_rename_of_a_missing_name_is_enoent(space: Space) -> None:
    for flags in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
        with refused(Code.ENOENT):
            space.rename(ROOT, b"x", ROOT, b"y", flags)


def test_unknown_flags_are_einval(space: Space) -> None:
    space.create(ROOT, b"a")
    for flags in (3, 4, -1):
        with refused(Code.EINVAL):
            space.rename(ROOT, b"a", ROOT, b"b", flags)


# ---------------------------------------------------------------- directories


def test_moved_directory_changes_its_dotdot_and_both_nlinks(space: Space) -> None:
    one, two = space.mkdir(ROOT, b"1").ino, space.mkdir(ROOT, b"2").ino
    moved = space.mkdir(one, b"d").ino
    space.rename(one, b"d", two, b"e")
    assert space.lookup(moved, b"..").ino == two
    assert (space.inode(one).nlink, space.inode(two).nlink) == (2, 3)


def test_rename_of_a_directory_into_itself_is_einval(space: Space) -> None:
    top = space.mkdir(ROOT, b"a").ino
    middle = space.mkdir(top, b"b").ino
    bottom = space.mkdir(middle, b"c").ino
    for into in (top, middle, bottom):
        with refused(Code.EINVAL):
            space.rename(ROOT, b"a", into, b"x")
        with refused(Code.EINVAL):
            space.rename(ROOT, b"a", into, b"x", RENAME_NOREPLACE)
    space.rename(middle, b"c", ROOT, b"c")


def test_rename_onto_an_ancestor_is_enotempty(space: Space) -> None:
    top = space.mkdir(ROOT, b"a").ino
    middle = space.mkdir(top, b"b").ino
    space.mkdir(middle, b"c")
    with refused(Code.ENOTEMPTY):
        space.rename(middle, b"c", ROOT, b"a")


def test_rename_into_a_removed_directory_is_enoent(space: Space) -> None:
    gone = space.mkdir(ROOT, b"d").ino
    space.open(gone)
    space.rmdir(ROOT, b"d")
    space.create(ROOT, b"f")
    with refused(Code.ENOENT):
        space.rename(ROOT, b"f", gone, b"f")


def test_directory_moved_into_a_full_directory_is_emlink(space: Space) -> None:
    full = space.mkdir(ROOT, b"full")
    space.mkdir(ROOT, b"d")
    space.view.apply({keys.inode(full.ino): full._replace(nlink=LINK_COUNT_MAX).encode()})
    with refused(Code.EMLINK):
        space.rename(ROOT, b"d", full.ino, b"d")
    space.view.apply({keys.inode(full.ino): full.encode()})


# ---------------------------------------------------------------- replacing


def test_replaced_file_loses_a_name_and_its_cookie(space: Space) -> None:
    kept = space.create(ROOT, b"a").ino
    lost = space.create(ROOT, b"b")
    space.link(lost.ino, ROOT, b"other")
    space.rename(ROOT, b"a", ROOT, b"b")
    assert space.lookup(ROOT, b"b").ino == kept
    left = space.inode(lost.ino)
    assert (left.nlink, left.ctime_ns) == (1, space.now_ns)
    assert [entry.name for entry in space.entries(ROOT)] == [b"other", b"b"]


def test_replaced_file_with_data_is_purged(space: Space) -> None:
    space.create(ROOT, b"a")
    lost = space.create(ROOT, b"b").ino
    space.wrote(lost, 1)
    space.rename(ROOT, b"a", ROOT, b"b")
    assert space.purged == {lost}


def test_replaced_open_file_stays_readable(space: Space) -> None:
    space.create(ROOT, b"a")
    lost = space.create(ROOT, b"b", open=True).ino
    space.wrote(lost, 1)
    space.rename(ROOT, b"a", ROOT, b"b")
    assert not space.effects
    assert space.inode(lost).nlink == 0
    space.close(lost)
    assert space.purged == {lost}


def test_replaced_symlink_is_removed_not_followed(space: Space) -> None:
    file = space.create(ROOT, b"a").ino
    target = space.create(ROOT, b"t").ino
    space.symlink(ROOT, b"l", b"t")
    space.rename(ROOT, b"a", ROOT, b"l")
    assert space.lookup(ROOT, b"l").ino == file
    assert space.inode(target).nlink == 1


def test_directory_replaces_an_empty_directory(space: Space) -> None:
    one, two = space.mkdir(ROOT, b"1").ino, space.mkdir(ROOT, b"2").ino
    moved, lost = space.mkdir(one, b"d").ino, space.mkdir(two, b"d").ino
    space.create(moved, b"f")
    space.rename(one, b"d", two, b"d")
    assert space.lookup(two, b"d").ino == moved
    assert (space.inode(one).nlink, space.inode(two).nlink) == (2, 3)
    with refused(Code.ESTALE):
        space.inode(lost)


def test_directory_replaces_its_empty_sibling(space: Space) -> None:
    moved = space.mkdir(ROOT, b"1").ino
    space.mkdir(ROOT, b"2")
    space.rename(ROOT, b"1", ROOT, b"2")
    assert space.lookup(ROOT, b"2").ino == moved
    assert space.inode(ROOT).nlink == 3


def test_rename_onto_nonempty_directory_is_enotempty(space: Space) -> None:
    space.mkdir(ROOT, b"1")
    full = space.mkdir(ROOT, b"2").ino
    space.create(full, b"f")
    with refused(Code.ENOTEMPTY):
        space.rename(ROOT, b"1", ROOT, b"2")


def test_directory_onto_file_is_enotdir_and_file_onto_directory_eisdir(space: Space) -> None:
    space.mkdir(ROOT, b"d")
    space.create(ROOT, b"f")
    with refused(Code.ENOTDIR):
        space.rename(ROOT, b"d", ROOT, b"f")
    with refused(Code.EISDIR):
        space.rename(ROOT, b"f", ROOT, b"d")


def test_noreplace_onto_an_existing_name_is_eexist(space: Space) -> None:
    space.create(ROOT, b"a")
    space.create(ROOT, b"b")
    for name in (b"a", b"b"):
        with refused(Code.EEXIST):
            space.rename(ROOT, b"a", ROOT, name, RENAME_NOREPLACE)
    space.rename(ROOT, b"a", ROOT, b"c", RENAME_NOREPLACE)
    assert space.names() == {b"b", b"c"}


@pytest.mark.parametrize("flags", [0, RENAME_EXCHANGE])
def test_rename_between_names_of_one_inode_does_nothing(space: Space, flags: int) -> None:
    file = space.create(ROOT, b"a").ino
    space.link(file, ROOT, b"b")
    space.mkdir(ROOT, b"d")
    before = dict(space.view.records)
    space.rename(ROOT, b"a", ROOT, b"b", flags)
    space.rename(ROOT, b"a", ROOT, b"a", flags)
    space.rename(ROOT, b"d", ROOT, b"d", flags)
    assert space.view.records == before


# ---------------------------------------------------------------- exchanging


def test_exchange_of_a_file_and_a_directory_fixes_parents_and_nlinks(space: Space) -> None:
    one, two = space.mkdir(ROOT, b"1").ino, space.mkdir(ROOT, b"2").ino
    file, directory = space.create(one, b"x").ino, space.mkdir(two, b"y").ino
    space.rename(one, b"x", two, b"y", RENAME_EXCHANGE)
    assert space.lookup(one, b"x").ino == directory
    assert space.lookup(two, b"y").ino == file
    assert space.lookup(directory, b"..").ino == one
    assert (space.inode(one).nlink, space.inode(two).nlink) == (3, 2)
    assert space.inode(file).ctime_ns == space.inode(directory).ctime_ns == space.now_ns


def test_exchange_of_nonempty_directories_swaps_them_whole(space: Space) -> None:
    one, two = space.mkdir(ROOT, b"1").ino, space.mkdir(ROOT, b"2").ino
    left, right = space.mkdir(one, b"d").ino, space.mkdir(two, b"d").ino
    space.create(left, b"l")
    space.create(right, b"r")
    space.rename(one, b"d", two, b"d", RENAME_EXCHANGE)
    assert space.names(space.lookup(one, b"d").ino) == {b"r"}
    assert space.names(space.lookup(two, b"d").ino) == {b"l"}
    assert (space.inode(one).nlink, space.inode(two).nlink) == (3, 3)


def test_exchanged_entries_keep_their_cookies(space: Space) -> None:
    space.create(ROOT, b"a")
    space.mkdir(ROOT, b"b")
    before = [(entry.name, entry.cookie) for entry in space.entries(ROOT)]
    space.rename(ROOT, b"a", ROOT, b"b", RENAME_EXCHANGE)
    assert [(entry.name, entry.cookie) for entry in space.entries(ROOT)] == before
    assert stat.S_ISDIR(space.lookup(ROOT, b"a").mode)


def test_exchange_of_a_directory_with_its_own_content_is_einval(space: Space) -> None:
    top = space.mkdir(ROOT, b"a").ino
    middle = space.mkdir(top, b"b").ino
    space.create(middle, b"f")
    for ends in ((ROOT, b"a", middle, b"f"), (middle, b"f", ROOT, b"a")):
        with refused(Code.EINVAL):
            space.rename(*ends, RENAME_EXCHANGE)
    with refused(Code.EINVAL):
        space.rename(top, b"b", ROOT, b"a", RENAME_EXCHANGE)


def test_exchange_with_a_missing_name_is_enoent(space: Space) -> None:
    space.create(ROOT, b"a")
    with refused(Code.ENOENT):
        space.rename(ROOT, b"a", ROOT, b"b", RENAME_EXCHANGE)


def test_loop_of_parents_is_reported_as_damage_not_walked_forever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    space = Space()
    monkeypatch.setattr("nfsp.mds.rename.DEPTH_MAX", 100)
    one = space.mkdir(ROOT, b"1")
    two = space.mkdir(one.ino, b"2")
    space.mkdir(ROOT, b"d")
    space.view.apply({keys.inode(one.ino): one._replace(parent=two.ino).encode()})
    with refused(Code.ENGINE_DAMAGED):
        space.rename(ROOT, b"d", two.ino, b"d")
