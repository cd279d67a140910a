"""Laws of finding, listing, making and removing entries."""

from __future__ import annotations

import stat
from collections.abc import Iterator

import pytest

from common import codec
from common.errors import Code
from nfsp import keys, wire
from nfsp.mds import namespace
from nfsp.mds.view import PurgeReady
from nfsp.model import DIRECTORY_SIZE, LINK_COUNT_MAX, ROOT, Layout, Remains
from tests.support.space import Space, refused

KINDS = {
    "file": stat.S_IFREG,
    "directory": stat.S_IFDIR,
    "fifo": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
    "character device": stat.S_IFCHR,
    "block device": stat.S_IFBLK,
}


@pytest.fixture
def space() -> Iterator[Space]:
    space = Space()
    yield space
    space.check()


# ---------------------------------------------------------------- making


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_created_inode_has_the_attributes_asked_for(space: Space, kind: int) -> None:
    made = space.create(ROOT, b"x", kind | 0o4751, uid=7, gid=8, rdev=0x103)
    assert space.lookup(ROOT, b"x") == made
    assert (made.mode, made.uid, made.gid) == (kind | 0o4751, 7, 8)
    assert made.rdev == (0x103 if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0)
    assert made.nlink == (2 if kind == stat.S_IFDIR else 1)
    assert made.parent == (ROOT if kind == stat.S_IFDIR else 0)
    assert made.size == (DIRECTORY_SIZE if kind == stat.S_IFDIR else 0)
    times = {made.atime_ns, made.mtime_ns, made.ctime_ns, made.btime_ns}
    assert times == {space.now_ns}


def test_create_changes_mtime_and_ctime_of_the_parent_once(space: Space) -> None:
    before = space.inode(ROOT)
    space.create(ROOT, b"x")
    after = space.inode(ROOT)
    assert after.mtime_ns == after.ctime_ns == space.now_ns
    assert after.change == before.change + 1
    assert after.atime_ns == before.atime_ns


def test_directory_nlink_counts_subdirectories_only(space: Space) -> None:
    space.mkdir(ROOT, b"a")
    space.create(ROOT, b"f")
    assert space.inode(ROOT).nlink == 3
    space.rmdir(ROOT, b"a")
    assert space.inode(ROOT).nlink == 2


def test_symlink_keeps_target_and_its_length_as_size(space: Space) -> None:
    made = space.symlink(ROOT, b"l", b"../a\xff")
    assert (made.target, made.size, stat.S_IMODE(made.mode)) == (b"../a\xff", 5, 0o777)
    with refused(Code.ENOENT):
        space.symlink(ROOT, b"empty", b"")
    with refused(Code.ENAMETOOLONG):
        space.symlink(ROOT, b"long", b"t" * 4096)


def test_existing_name_is_eexist(space: Space) -> None:
    space.create(ROOT, b"x")
    for make in (space.create, space.mkdir):
        with refused(Code.EEXIST):
            make(ROOT, b"x")
    with refused(Code.EEXIST):
        space.symlink(ROOT, b"x", b"t")
    with refused(Code.EEXIST):
        space.create(ROOT, b"x", open=True, exclusive=True)


def test_create_with_open_opens_the_file_that_exists(space: Space) -> None:
    made = space.create(ROOT, b"x", open=True)
    space.session = 2
    assert space.create(ROOT, b"x", open=True).ino == made.ino
    assert space.opens == {(1, made.ino): True, (2, made.ino): True}
    assert space.view.get(keys.writer(2, made.ino)) is not None


def test_create_with_open_does_not_open_what_is_no_file(space: Space) -> None:
    space.mkdir(ROOT, b"d")
    space.symlink(ROOT, b"l", b"x")
    for name in (b"d", b"l"):
        with refused(Code.EEXIST):
            space.create(ROOT, name, open=True)
    assert not space.opens


def test_unknown_file_type_or_number_out_of_range_is_einval(space: Space) -> None:
    for mode in (0, 0o644, stat.S_IFREG | 1 << 20, 0o110000, -1):
        with refused(Code.EINVAL):
            space.create(ROOT, b"x", mode)
    for numbers in ({"uid": -1}, {"gid": 1 << 32}, {"rdev": 1 << 40}):
        with refused(Code.EINVAL):
            space.create(ROOT, b"x", **numbers)


def test_inode_numbers_are_never_reused(space: Space) -> None:
    seen = []
    for _ in range(3):
        seen.append(space.create(ROOT, b"x").ino)
        with refused(Code.EEXIST):
            space.create(ROOT, b"x")
        space.unlink(ROOT, b"x")
    assert seen == sorted(set(seen))


def test_setgid_directory_hands_down_its_group_and_directories_the_bit(space: Space) -> None:
    parent = space.create(ROOT, b"d", stat.S_IFDIR | 0o2755, gid=50)
    file = space.create(parent.ino, b"f", gid=9)
    child = space.create(parent.ino, b"c", stat.S_IFDIR | 0o755, gid=9)
    assert (file.gid, file.mode & stat.S_ISGID) == (50, 0)
    assert (child.gid, child.mode & stat.S_ISGID) == (50, stat.S_ISGID)


def test_umask_clears_permission_bits_but_not_of_symlinks(space: Space) -> None:
    file = space.create(ROOT, b"f", stat.S_IFREG | 0o6777, umask=0o7027)
    assert stat.S_IMODE(file.mode) == 0o6750
    link = space.create(ROOT, b"l", stat.S_IFLNK, umask=0o777, target=b"t")
    assert stat.S_IMODE(link.mode) == 0o777


def test_too_many_subdirectories_is_emlink(space: Space) -> None:
    root = space.inode(ROOT)
    space.view.apply({keys.inode(ROOT): root._replace(nlink=LINK_COUNT_MAX).encode()})
    with refused(Code.EMLINK):
        space.mkdir(ROOT, b"d")
    space.create(ROOT, b"f")
    space.view.apply({keys.inode(ROOT): space.inode(ROOT)._replace(nlink=2).encode()})


# ---------------------------------------------------------------- names


def test_longest_name_fits_and_one_byte_more_is_enametoolong(space: Space) -> None:
    space.create(ROOT, b"n" * 255)
    space.lookup(ROOT, b"n" * 255)
    for attempt in (space.create, space.lookup, space.unlink, space.rmdir):
        with refused(Code.ENAMETOOLONG):
            attempt(ROOT, b"n" * 256)
    with refused(Code.ENAMETOOLONG):
        space.rename(ROOT, b"n" * 255, ROOT, b"n" * 256)


@pytest.mark.parametrize(
    ("name", "code"), [(b"", Code.ENOENT), (b"a/b", Code.EINVAL), (b"a\0", Code.EINVAL)]
)
def test_impossible_names_are_refused(space: Space, name: bytes, code: Code) -> None:
    for attempt in (space.create, space.lookup, space.unlink, space.rmdir):
        with refused(code):
            attempt(ROOT, name)


def test_dots_cannot_be_made_or_removed(space: Space) -> None:
    parent = space.mkdir(ROOT, b"d").ino
    for name in (b".", b".."):
        with refused(Code.EEXIST):
            space.mkdir(parent, name)
        with refused(Code.EISDIR):
            space.unlink(parent, name)
        with refused(Code.EBUSY):
            space.rename(parent, name, ROOT, b"x")
        with refused(Code.EBUSY):
            space.rename(ROOT, b"d", parent, name)
    with refused(Code.EINVAL):
        space.rmdir(parent, b".")
    with refused(Code.ENOTEMPTY):
        space.rmdir(parent, b"..")


def test_names_are_bytes_of_any_value(space: Space) -> None:
    for name in (b"\xff", b"\xff" * 255, b"\x01", "é".encode("latin-1"), b"..."):
        ino = space.create(ROOT, name).ino
        assert space.lookup(ROOT, name).ino == ino


# ---------------------------------------------------------------- finding


def test_lookup_of_dot_and_dotdot_works_for_any_directory(space: Space) -> None:
    outer = space.mkdir(ROOT, b"a")
    inner = space.mkdir(outer.ino, b"b")
    assert space.lookup(inner.ino, b".").ino == inner.ino
    assert space.lookup(inner.ino, b"..").ino == outer.ino
    assert space.lookup(ROOT, b"..").ino == ROOT


def test_lookup_of_dot_finds_a_file_by_its_number(space: Space) -> None:
    file = space.create(ROOT, b"f")
    assert space.lookup(file.ino, b".") == file


def test_missing_name_is_enoent_and_missing_directory_estale(space: Space) -> None:
    with refused(Code.ENOENT):
        space.lookup(ROOT, b"x")
    for ino in (99, 0, -1, (1 << 64) - 1):
        with refused(Code.ESTALE):
            space.lookup(ino, b"x")
        with refused(Code.ESTALE):
            space.inode(ino)
        with refused(Code.ESTALE):
            space.create(ino, b"x")
        with refused(Code.ESTALE):
            space.entries(ino)


def test_entries_of_a_file_are_enotdir(space: Space) -> None:
    file = space.create(ROOT, b"f").ino
    space.mkdir(ROOT, b"d")
    for attempt in (space.lookup, space.create, space.unlink, space.rmdir):
        with refused(Code.ENOTDIR):
            attempt(file, b"x")
    for ends in ((file, b"x", ROOT, b"y"), (ROOT, b"d", file, b"y")):
        with refused(Code.ENOTDIR):
            space.rename(*ends)
    with refused(Code.ENOTDIR):
        space.entries(file)
    with refused(Code.ENOTDIR):
        space.lookup(file, b"..")


# ---------------------------------------------------------------- listing


def test_listing_in_pages_shows_each_entry_once_in_cookie_order(space: Space) -> None:
    made = [b"f%d" % number for number in range(10)]
    for name in made:
        space.create(ROOT, name)
    cookie, listed = 0, []
    while page := space.entries(ROOT, cookie, 3):
        listed += page
        cookie = page[-1].cookie
    assert [dentry.name for dentry in listed] == made
    assert [dentry.cookie for dentry in listed] == list(range(3, 13))


def test_listing_says_when_it_is_at_the_end(space: Space) -> None:
    for name in (b"a", b"b"):
        space.create(ROOT, name)
    ends = [namespace.read_dir(space.view, wire.ReadDir(ROOT, 0, n)).eof for n in (1, 2, 3)]
    assert ends == [False, True, True]


def test_cookies_of_removed_entries_are_not_given_out_again(space: Space) -> None:
    space.create(ROOT, b"a")
    space.create(ROOT, b"b")
    space.unlink(ROOT, b"b")
    space.create(ROOT, b"b")
    assert [(entry.name, entry.cookie) for entry in space.entries(ROOT)] == [(b"a", 3), (b"b", 5)]


def test_listing_goes_on_behind_a_removed_entry(space: Space) -> None:
    for name in (b"a", b"b", b"c"):
        space.create(ROOT, name)
    cookie = space.entries(ROOT)[1].cookie
    space.unlink(ROOT, b"b")
    assert [entry.name for entry in space.entries(ROOT, cookie)] == [b"c"]


def test_listing_shows_one_directory_only(space: Space) -> None:
    one, two = space.mkdir(ROOT, b"1").ino, space.mkdir(ROOT, b"2").ino
    space.create(one, b"x")
    assert space.entries(two) == []
    assert space.names(one) == {b"x"}


def test_cookie_out_of_range_is_einval(space: Space) -> None:
    for cookie in (-1, 1 << 63):
        with refused(Code.EINVAL):
            space.entries(ROOT, cookie)
    assert space.entries(ROOT, (1 << 63) - 1) == []


# ---------------------------------------------------------------- hard links


def test_link_raises_nlink_and_ctime_but_not_mtime(space: Space) -> None:
    file = space.create(ROOT, b"f")
    linked = space.link(file.ino, ROOT, b"g")
    assert (linked.nlink, linked.ctime_ns) == (2, space.now_ns)
    assert (linked.mtime_ns, linked.change) == (file.mtime_ns, file.change + 1)
    assert space.lookup(ROOT, b"g") == space.lookup(ROOT, b"f") == linked


def test_link_to_a_directory_is_eperm(space: Space) -> None:
    directory = space.mkdir(ROOT, b"d")
    with refused(Code.EPERM):
        space.link(directory.ino, ROOT, b"e")


def test_link_onto_an_existing_name_is_eexist(space: Space) -> None:
    file = space.create(ROOT, b"f")
    with refused(Code.EEXIST):
        space.link(file.ino, ROOT, b"f")


def test_link_to_a_removed_file_is_enoent(space: Space) -> None:
    file = space.create(ROOT, b"f", open=True)
    space.unlink(ROOT, b"f")
    with refused(Code.ENOENT):
        space.link(file.ino, ROOT, b"g")


def test_too_many_links_is_emlink(space: Space) -> None:
    file = space.create(ROOT, b"f")
    space.view.apply({keys.inode(file.ino): file._replace(nlink=LINK_COUNT_MAX).encode()})
    with refused(Code.EMLINK):
        space.link(file.ino, ROOT, b"g")
    space.view.apply({keys.inode(file.ino): file.encode()})


# ---------------------------------------------------------------- removing


def test_unlink_takes_one_name_and_sets_ctime(space: Space) -> None:
    file = space.create(ROOT, b"f")
    space.link(file.ino, ROOT, b"g")
    space.unlink(ROOT, b"f")
    left = space.inode(file.ino)
    assert (left.nlink, left.ctime_ns, left.mtime_ns) == (1, space.now_ns, file.mtime_ns)
    assert space.names() == {b"g"}
    assert not space.effects


def test_unlink_of_a_directory_is_eisdir_and_rmdir_of_a_file_enotdir(space: Space) -> None:
    space.mkdir(ROOT, b"d")
    space.create(ROOT, b"f")
    with refused(Code.EISDIR):
        space.unlink(ROOT, b"d")
    with refused(Code.ENOTDIR):
        space.rmdir(ROOT, b"f")
    with refused(Code.ENOENT):
        space.unlink(ROOT, b"x")
    with refused(Code.ENOENT):
        space.rmdir(ROOT, b"x")


def test_rmdir_of_a_nonempty_directory_is_enotempty(space: Space) -> None:
    parent = space.mkdir(ROOT, b"d").ino
    space.create(parent, b"f")
    with refused(Code.ENOTEMPTY):
        space.rmdir(ROOT, b"d")
    space.unlink(parent, b"f")
    space.rmdir(ROOT, b"d")
    with refused(Code.ESTALE):
        space.inode(parent)


def test_last_name_of_a_file_with_data_puts_its_chunks_on_the_purge_queue(space: Space) -> None:
    file = space.create(ROOT, b"f")
    space.wrote(file.ino, 5)
    space.unlink(ROOT, b"f")
    assert space.effects == (PurgeReady(file.ino),)
    record = space.view.get(keys.purge(file.ino))
    assert record is not None
    assert Remains.decode(record) == Remains(space_layout(file.layout), 5)
    with refused(Code.ESTALE):
        space.inode(file.ino)


def space_layout(layout: Layout | None) -> Layout:
    assert layout is not None
    return layout


def test_last_name_of_an_empty_file_leaves_nothing(space: Space) -> None:
    before = dict(space.view.records)
    space.create(ROOT, b"f")
    space.unlink(ROOT, b"f")
    changed = {key for key in space.view.records if space.view.records[key] != before.get(key)}
    assert changed == {keys.NEXT_INO, keys.inode(ROOT)}


def test_last_name_takes_the_extended_attributes_along(space: Space) -> None:
    file = space.create(ROOT, b"f").ino
    space.set_xattr(file, b"user.a", b"1")
    space.set_xattr(file, b"user.b", b"2")
    space.unlink(ROOT, b"f")
    assert not [key for key in space.view.records if key.startswith(b"x")]


def test_unlinked_open_file_stays_until_its_last_close(space: Space) -> None:
    file = space.create(ROOT, b"f", open=True).ino
    space.wrote(file, 10)
    space.session = 2
    space.open(file)
    space.unlink(ROOT, b"f")
    assert space.inode(file).nlink == 0
    assert not space.effects
    space.close(file)
    assert space.inode(file).size == 10
    space.session = 1
    space.close(file)
    assert space.purged == {file}
    with refused(Code.ESTALE):
        space.inode(file)


def test_removed_open_directory_stays_empty_until_its_close(space: Space) -> None:
    ino = space.mkdir(ROOT, b"d").ino
    space.open(ino)
    space.rmdir(ROOT, b"d")
    assert space.inode(ino).nlink == 0
    assert space.entries(ino) == []
    with refused(Code.ENOENT):
        space.create(ino, b"x")
    space.close(ino)
    assert not space.effects
    with refused(Code.ESTALE):
        space.inode(ino)


def test_refused_operations_write_nothing(space: Space) -> None:
    space.mkdir(ROOT, b"d")
    before = dict(space.view.records)
    for attempt in (space.create, space.mkdir, space.unlink):
        with refused(Code.EISDIR if attempt == space.unlink else Code.EEXIST):
            attempt(ROOT, b"d")
    assert space.view.records == before


# ---------------------------------------------------------------- damage


def test_entry_without_inode_is_reported_as_damage() -> None:
    space = Space()
    file = space.create(ROOT, b"f").ino
    space.view.apply({keys.inode(file): None})
    with refused(Code.ENGINE_DAMAGED):
        space.lookup(ROOT, b"f")
    with refused(Code.ENGINE_DAMAGED):
        space.entries(ROOT)


def test_store_without_counter_is_not_formatted() -> None:
    space = Space()
    space.view.apply({keys.NEXT_INO: None})
    with refused(Code.NOT_FORMATTED):
        space.create(ROOT, b"f")


def test_mkfs_makes_a_root_and_counters(space: Space) -> None:
    root = space.inode(ROOT)
    assert (root.mode, root.nlink, root.parent) == (stat.S_IFDIR | 0o755, 2, ROOT)
    assert codec.decode(space.view.records[keys.NEXT_INO]) == ROOT + 1
    assert codec.decode(space.view.records[keys.NEXT_SESSION]) == 1
