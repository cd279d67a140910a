"""Laws of extended attributes and of the layout attribute."""

from __future__ import annotations

import stat
from collections.abc import Iterator

import pytest

from common.errors import Code
from nfsp.mds.xattrs import LAYOUT, LIST_SIZE_MAX, XATTR_CREATE, XATTR_REPLACE
from nfsp.model import ROOT, Layout
from tests.support.space import Space, refused


@pytest.fixture
def space() -> Iterator[Space]:
    space = Space()
    yield space
    space.check()


def test_attributes_are_set_replaced_listed_and_removed(space: Space) -> None:
    file = space.create(ROOT, b"f").ino
    space.set_xattr(file, b"user.a", b"1")
    space.set_xattr(file, b"trusted.b", b"")
    space.set_xattr(file, b"security.capability", b"\0\xff")
    space.set_xattr(file, b"user.a", b"2")
    assert space.get_xattr(file, b"user.a") == b"2"
    assert space.get_xattr(file, b"trusted.b") == b""
    assert space.xattr_names(file) == {b"user.a", b"trusted.b", b"security.capability"}
    space.remove_xattr(file, b"user.a")
    assert space.xattr_names(file) == {b"trusted.b", b"security.capability"}
    with refused(Code.ENODATA):
        space.get_xattr(file, b"user.a")
    with refused(Code.ENODATA):
        space.remove_xattr(file, b"user.a")


def test_setting_an_attribute_sets_ctime_only(space: Space) -> None:
    file = space.create(ROOT, b"f")
    space.set_xattr(file.ino, b"user.a", b"1")
    changes = {"ctime_ns": space.now_ns, "change": file.change + 1, "xattr_count": 1}
    assert space.inode(file.ino) == file._replace(**changes)


def test_flags_ask_for_an_attribute_that_exists_or_does_not(space: Space) -> None:
    file = space.create(ROOT, b"f").ino
    with refused(Code.ENODATA):
        space.set_xattr(file, b"user.a", b"1", XATTR_REPLACE)
    space.set_xattr(file, b"user.a", b"1", XATTR_CREATE)
    with refused(Code.EEXIST):
        space.set_xattr(file, b"user.a", b"2", XATTR_CREATE)
    space.set_xattr(file, b"user.a", b"3", XATTR_REPLACE)
    with refused(Code.EINVAL):
        space.set_xattr(file, b"user.a", b"4", 4)
    assert space.get_xattr(file, b"user.a") == b"3"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        (b"", Code.ERANGE),
        (b"user." + b"n" * 251, Code.ERANGE),
        (b"other.x", Code.EOPNOTSUPP),
        (b"system.nfs4_acl", Code.EOPNOTSUPP),
        (b"user", Code.EOPNOTSUPP),
        (b"user.", Code.EINVAL),
        (b"user.a\0", Code.EINVAL),
    ],
)
def test_impossible_attribute_names_are_refused(space: Space, name: bytes, code: Code) -> None:
    file = space.create(ROOT, b"f").ino
    with refused(code):
        space.set_xattr(file, name, b"")
    with refused(code):
        space.get_xattr(file, name)
    with refused(code):
        space.remove_xattr(file, name)


def test_longest_name_and_value_fit(space: Space) -> None:
    file = space.create(ROOT, b"f").ino
    name = b"user." + b"n" * 250
    space.set_xattr(file, name, b"v" * 65536)
    assert space.get_xattr(file, name) == b"v" * 65536
    with refused(Code.E2BIG):
        space.set_xattr(file, name, b"v" * 65537)


def test_more_names_than_can_be_listed_are_enospc(space: Space) -> None:
    file = space.create(ROOT, b"f").ino
    for number in range(LIST_SIZE_MAX // 256):
        space.set_xattr(file, b"user.%0250d" % number, b"")
    with refused(Code.ENOSPC):
        space.set_xattr(file, b"user.a", b"")
    space.set_xattr(file, b"user.%0250d" % 7, b"replacing is fine")


def test_user_attributes_are_for_files_and_directories_only(space: Space) -> None:
    for inode in (space.create(ROOT, b"p", stat.S_IFIFO), space.symlink(ROOT, b"l", b"t")):
        with refused(Code.EPERM):
            space.set_xattr(inode.ino, b"user.a", b"")
        space.set_xattr(inode.ino, b"trusted.a", b"")
    space.set_xattr(ROOT, b"user.a", b"")


def test_attributes_belong_to_one_inode(space: Space) -> None:
    one, two = space.create(ROOT, b"1").ino, space.create(ROOT, b"2").ino
    space.set_xattr(one, b"user.a", b"1")
    space.set_xattr(two, b"user.b", b"2")
    assert space.xattr_names(one) == {b"user.a"}
    with refused(Code.ENODATA):
        space.get_xattr(two, b"user.a")


# ---------------------------------------------------------------- the layout


def test_layout_of_a_new_file_can_be_read_but_is_not_listed(space: Space) -> None:
    file = space.create(ROOT, b"f")
    text = b"chunk_size=1048576 stripe_width=3 replicas=1 chains=3,1,2"
    assert space.get_xattr(file.ino, LAYOUT) == text
    assert space.xattr_names(file.ino) == set()


def test_layout_of_a_directory_is_inherited_by_what_is_made_in_it_later(space: Space) -> None:
    parent = space.mkdir(ROOT, b"d").ino
    before = space.create(parent, b"before")
    space.set_xattr(parent, LAYOUT, b"chunk_size=65536 stripe_width=2")
    child = space.mkdir(parent, b"c").ino
    file = space.create(child, b"f")
    assert file.layout is not None
    assert file.layout[:3] == (65536, 2, 1)
    assert len(file.layout.chains) == 2
    assert space.inode(before.ino) == before


def test_layout_of_a_directory_is_listed_only_if_set(space: Space) -> None:
    parent = space.mkdir(ROOT, b"d").ino
    default = b"chunk_size=1048576 stripe_width=0 replicas=1 chains="
    assert space.get_xattr(parent, LAYOUT) == default
    assert space.xattr_names(parent) == set()
    with refused(Code.ENODATA):
        space.remove_xattr(parent, LAYOUT)
    space.set_xattr(parent, LAYOUT, b"stripe_width=1", XATTR_CREATE)
    with refused(Code.EEXIST):
        space.set_xattr(parent, LAYOUT, b"stripe_width=1", XATTR_CREATE)
    assert space.xattr_names(parent) == {LAYOUT}
    space.remove_xattr(parent, LAYOUT)
    assert space.get_xattr(parent, LAYOUT) == default


def test_text_that_was_read_can_be_set_again(space: Space) -> None:
    space.set_xattr(ROOT, LAYOUT, b"chains=3,1 chunk_size=131072")
    text = space.get_xattr(ROOT, LAYOUT)
    space.set_xattr(ROOT, LAYOUT, text)
    assert space.get_xattr(ROOT, LAYOUT) == text
    assert space.inode(ROOT).layout == Layout(131072, 2, 1, (3, 1))


def test_empty_file_takes_a_layout_chain_by_chain(space: Space) -> None:
    file = space.create(ROOT, b"f").ino
    space.set_xattr(file, LAYOUT, b"chunk_size=65536 chains=2,3")
    assert space.inode(file).layout == Layout(65536, 2, 1, (2, 3))
    space.set_xattr(file, LAYOUT, b"stripe_width=1")
    layout = space.inode(file).layout
    assert layout is not None
    assert (layout.stripe_width, len(layout.chains)) == (1, 1)


def test_layout_of_a_file_with_chunks_cannot_change(space: Space) -> None:
    file = space.create(ROOT, b"f", open=True).ino
    with refused(Code.EBUSY):  # chunks may be under way
        space.set_xattr(file, LAYOUT, b"stripe_width=1")
    space.wrote(file, 10)
    space.close(file)
    with refused(Code.EBUSY):
        space.set_xattr(file, LAYOUT, b"stripe_width=1")
    space.truncate(file, 0)
    with refused(Code.EBUSY):  # the trim goes by the old layout
        space.set_xattr(file, LAYOUT, b"stripe_width=1")
    with refused(Code.EPERM):
        space.remove_xattr(file, LAYOUT)


@pytest.mark.parametrize(
    "text",
    [
        b"nonsense",
        b"chunk_size",
        b"chunk_size=",
        b"chunk_size=1e6",
        b"chunk_size=+65536",
        b"chunk_size=65537",
        b"chunk_size=1024",
        b"chunk_size=16777216",
        b"stripe_width=256",
        b"stripe_width=-1",
        b"stripe_width=1 stripe_width=1",
        b"stripe_width=3 chains=1,2",
        b"replicas=0",
        b"replicas=2 chains=1",
        b"chains=1,1",
        b"chains=1,,2",
        b"chains=9",
        b"chains=99999999999999999999",
        b"colour=red",
        b"\xff=\xff",
        b"x" * 5000,
    ],
)
def test_bad_layout_text_is_einval(space: Space, text: bytes) -> None:
    with refused(Code.EINVAL):
        space.set_xattr(ROOT, LAYOUT, text)
    assert space.inode(ROOT).layout is None
