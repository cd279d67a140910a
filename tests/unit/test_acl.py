"""Laws of POSIX access control lists, alone and as attributes in the name space."""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import Code
from nfsp import wire
from nfsp.mds import acl
from nfsp.mds.acl import GROUP, GROUP_OBJ, MASK, NO_ID, OTHER, USER, USER_OBJ, Entry
from nfsp.model import ROOT
from tests.support.space import Space, may_refuse, refused


def acl_of(user: int, group: int, other: int, *named: Entry, mask: int | None = None) -> acl.Acl:
    entries = [
        Entry(USER_OBJ, user, NO_ID),
        *(entry for entry in named if entry.tag == USER),
        Entry(GROUP_OBJ, group, NO_ID),
        *(entry for entry in named if entry.tag == GROUP),
    ]
    if mask is not None:
        entries.append(Entry(MASK, mask, NO_ID))
    return (*entries, Entry(OTHER, other, NO_ID))


EXTENDED = acl_of(7, 5, 0, Entry(USER, 6, 1000), Entry(GROUP, 7, 50), mask=7)
PERMISSIONS = st.integers(0, 7)
NAMED = st.builds(Entry, st.sampled_from((USER, GROUP)), PERMISSIONS, st.integers(0, 1 << 20))


@st.composite
def acls(draw: st.DrawFn) -> acl.Acl:
    named = draw(st.lists(NAMED, max_size=4))
    mask = draw(PERMISSIONS if named else st.none() | PERMISSIONS)
    bits = draw(st.tuples(PERMISSIONS, PERMISSIONS, PERMISSIONS))
    return acl_of(*bits, *named, mask=mask)


@pytest.fixture
def space() -> Iterator[Space]:
    space = Space()
    yield space
    space.check()


# ---------------------------------------------------------------- the value


def test_acl_value_has_the_kernels_format() -> None:
    value = acl.encode(acl_of(6, 4, 0, Entry(USER, 6, 1000), mask=6))
    golden = (
        "02000000 01000600ffffffff 02000600e8030000 04000400ffffffff"
        "10000600ffffffff 20000000ffffffff"
    )
    assert value == bytes.fromhex(golden)


@given(acls())
def test_acl_survives_encoding(entries: acl.Acl) -> None:
    assert acl.decode(acl.encode(entries)) == entries


@given(st.binary(max_size=64) | st.binary(max_size=64).map(lambda tail: b"\2\0\0\0" + tail))
def test_any_bytes_are_an_acl_or_einval(value: bytes) -> None:
    with may_refuse(Code.EINVAL):
        acl.decode(value)


@pytest.mark.parametrize(
    "entries",
    [
        EXTENDED[1:],
        EXTENDED[:-1],
        EXTENDED[::-1],
        (EXTENDED[0], *EXTENDED),
        tuple(entry for entry in EXTENDED if entry.tag != MASK),
        (Entry(USER_OBJ, 8, NO_ID), *EXTENDED[1:]),
        (EXTENDED[0], Entry(USER, 7, NO_ID), *EXTENDED[2:]),
        (EXTENDED[0], Entry(3, 7, 5), *EXTENDED[2:]),
    ],
    ids=["owner", "other", "order", "twice", "mask", "bits", "id", "tag"],
)
def test_invalid_acl_is_einval(entries: acl.Acl) -> None:
    with refused(Code.EINVAL):
        acl.decode(acl.encode(entries))


def test_wrong_version_or_cut_value_is_einval() -> None:
    value = acl.encode(EXTENDED)
    for broken in (b"", value[:-1], struct.pack("<I", 1) + value[4:]):
        with refused(Code.EINVAL):
            acl.decode(broken)


@given(acls(), st.integers(0, 0o777))
def test_chmod_makes_the_acl_stand_for_that_mode(entries: acl.Acl, mode: int) -> None:
    assert acl.mode_of(acl.chmod(entries, mode))[0] == mode


@given(acls(), st.integers(0, 0o7777))
def test_inherited_acl_never_gives_more_than_was_asked_for(entries: acl.Acl, mode: int) -> None:
    access, new_mode = acl.inherit(entries, mode)
    assert new_mode & ~mode == 0
    assert new_mode & ~0o777 == mode & ~0o777
    assert new_mode & 0o777 == mode & acl.mode_of(entries)[0]
    if access:
        assert acl.mode_of(access) == (new_mode & 0o777, False)
    else:
        assert len(entries) == 3


# ---------------------------------------------------------------- in the name space


def test_setting_an_access_acl_sets_the_mode(space: Space) -> None:
    file = space.create(ROOT, b"f", stat.S_IFREG | 0o4600).ino
    space.set_xattr(file, acl.ACCESS, acl.encode(EXTENDED))
    assert space.inode(file).mode == stat.S_IFREG | 0o4770
    assert acl.decode(space.get_xattr(file, acl.ACCESS)) == EXTENDED
    assert space.xattr_names(file) == {acl.ACCESS}


def test_access_acl_that_says_no_more_than_the_mode_is_not_stored(space: Space) -> None:
    file = space.create(ROOT, b"f").ino
    space.set_xattr(file, acl.ACCESS, acl.encode(EXTENDED))
    space.set_xattr(file, acl.ACCESS, acl.encode(acl_of(6, 4, 4)))
    assert space.inode(file).mode == stat.S_IFREG | 0o644
    assert space.xattr_names(file) == set()
    with refused(Code.ENODATA):
        space.get_xattr(file, acl.ACCESS)


def test_chmod_changes_the_mask_and_leaves_the_owning_group(space: Space) -> None:
    file = space.create(ROOT, b"f").ino
    space.set_xattr(file, acl.ACCESS, acl.encode(EXTENDED))
    space.set_attr(file, wire.SET_MODE, mode=0o741)
    after = acl.decode(space.get_xattr(file, acl.ACCESS))
    assert after == acl_of(7, 5, 1, Entry(USER, 6, 1000), Entry(GROUP, 7, 50), mask=4)


def test_removing_acls_that_are_not_there_does_nothing(space: Space) -> None:
    file = space.create(ROOT, b"f")
    space.remove_xattr(file.ino, acl.ACCESS)
    space.set_xattr(file.ino, acl.DEFAULT, acl.encode(()))
    assert space.inode(file.ino).mode == file.mode


def test_default_acl_belongs_to_directories_only(space: Space) -> None:
    file = space.create(ROOT, b"f").ino
    with refused(Code.EACCES):
        space.set_xattr(file, acl.DEFAULT, acl.encode(EXTENDED))


def test_symlink_has_no_acl(space: Space) -> None:
    link = space.symlink(ROOT, b"l", b"t").ino
    with refused(Code.EOPNOTSUPP):
        space.set_xattr(link, acl.ACCESS, acl.encode(EXTENDED))


def test_invalid_acl_changes_nothing(space: Space) -> None:
    file = space.create(ROOT, b"f")
    with refused(Code.EINVAL):
        space.set_xattr(file.ino, acl.ACCESS, b"\2\0\0\0garbage")
    assert space.inode(file.ino) == file


def test_new_file_gets_the_default_acl_cut_to_its_mode_whatever_the_umask(space: Space) -> None:
    parent = space.mkdir(ROOT, b"d").ino
    space.set_xattr(parent, acl.DEFAULT, acl.encode(EXTENDED))
    file = space.create(parent, b"f", stat.S_IFREG | 0o664, umask=0o077)
    assert file.mode == stat.S_IFREG | 0o660
    inherited = acl.decode(space.get_xattr(file.ino, acl.ACCESS))
    assert inherited == acl_of(6, 5, 0, Entry(USER, 6, 1000), Entry(GROUP, 7, 50), mask=6)
    assert space.xattr_names(file.ino) == {acl.ACCESS}


def test_new_directory_hands_the_default_acl_on(space: Space) -> None:
    parent = space.mkdir(ROOT, b"d").ino
    space.set_xattr(parent, acl.DEFAULT, acl.encode(EXTENDED))
    child = space.mkdir(parent, b"c", 0o777).ino
    assert space.xattr_names(child) == {acl.ACCESS, acl.DEFAULT}
    grandchild = space.mkdir(child, b"g", 0o777).ino
    assert acl.decode(space.get_xattr(grandchild, acl.DEFAULT)) == EXTENDED


def test_minimal_default_acl_sets_the_mode_only(space: Space) -> None:
    parent = space.mkdir(ROOT, b"d").ino
    space.set_xattr(parent, acl.DEFAULT, acl.encode(acl_of(7, 5, 0)))
    file = space.create(parent, b"f", stat.S_IFREG | 0o666, umask=0o022)
    assert file.mode == stat.S_IFREG | 0o640
    assert space.xattr_names(file.ino) == set()


def test_symlink_inherits_no_acl(space: Space) -> None:
    parent = space.mkdir(ROOT, b"d").ino
    space.set_xattr(parent, acl.DEFAULT, acl.encode(EXTENDED))
    link = space.symlink(parent, b"l", b"t")
    assert (stat.S_IMODE(link.mode), space.xattr_names(link.ino)) == (0o777, set())
