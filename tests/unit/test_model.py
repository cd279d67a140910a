"""Laws of the records: golden bytes, round trips, damage."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import codec
from common.errors import Code
from nfsp import keys
from nfsp.model import (
    RECORD_VERSION,
    Chain,
    ClusterMap,
    Inode,
    Iod,
    Layout,
    Remains,
    Superblock,
    following,
    shard_of,
)
from tests.support.space import may_refuse, refused

LAYOUT = Layout(1 << 20, 2, 1, (1, 2))
FILE = Inode(5, 0o100644, 1000, 100, 0, 1, 77, 1, 2, 3, 4, 9, LAYOUT, 0, 0, b"")
DIRECTORY = Inode(1, 0o40755, 0, 0, 0, 2, 4096, 1, 2, 3, 4, 1, None, 1, 3, b"", 2)
SUPERBLOCK = Superblock(1, bytes(range(16)), "lab", 0, 5, Layout(1 << 20, 0, 1, ()))
MAP = ClusterMap(3, (Iod(1, "a:1", "/s", "up"),), (Chain(1, 2, (1,)),))

GOLDEN = [
    (FILE, "dc0012 01 05 cd81a4 cd03e8 64 00 01 4d 01020304 09 94ce0010000002019201020000c40000"),
    (DIRECTORY, "dc0012 01 01 cd41ed 00 00 00 02 cd1000 01020304 01 c0 01 03 c400 02"),
    (
        SUPERBLOCK,
        "96 01 c410000102030405060708090a0b0c0d0e0f a36c6162 00 05 94ce00100000000190",
    ),
    (MAP, "93 03 919401a3613a31a22f73a27570 9193 01 02 9101"),
    (Remains(LAYOUT, 77), "92 94ce00100000020192 0102 4d"),
]
"""docs/on-disk-format.md shows these; a record that is on disk must stay readable."""

U32 = st.integers(0, (1 << 32) - 1)
U63 = st.integers(0, (1 << 63) - 1)
I64 = st.integers(-(1 << 63), (1 << 63) - 1)
LAYOUTS = st.builds(Layout, U32, U32, U32, st.lists(U32, max_size=5).map(tuple))
INODES = st.builds(
    Inode,
    *(U63, U32, U32, U32, U32, U32, U63, I64, I64, I64, I64, U63),
    st.none() | LAYOUTS,
    *(U63, U63, st.binary(max_size=50), U32),
)


@pytest.mark.parametrize(
    ("record", "golden"), GOLDEN, ids=[type(record).__name__ for record, _ in GOLDEN]
)
def test_record_has_its_golden_bytes(
    record: Inode | Superblock | ClusterMap | Remains, golden: str
) -> None:
    data = bytes.fromhex(golden)
    assert record.encode() == data
    assert type(record).decode(data) == record


@given(INODES)
def test_inode_survives_its_record(inode: Inode) -> None:
    assert Inode.decode(inode.encode()) == inode


@given(LAYOUTS, U63)
def test_remains_survive_their_record(layout: Layout, size: int) -> None:
    assert Remains.decode(Remains(layout, size).encode()) == Remains(layout, size)


def test_superblock_and_cluster_map_survive_their_records() -> None:
    assert Superblock.decode(SUPERBLOCK.encode()) == SUPERBLOCK
    assert ClusterMap.decode(MAP.encode()) == MAP


def test_fields_added_by_a_newer_format_are_ignored() -> None:
    for record in (FILE, DIRECTORY):
        longer = codec.encode((RECORD_VERSION, *record, "new", 5))
        assert Inode.decode(longer) == record
    assert Superblock.decode(codec.encode((*SUPERBLOCK, 1))) == SUPERBLOCK


def test_record_of_another_version_is_refused() -> None:
    with refused(Code.WRONG_VERSION):
        Inode.decode(codec.encode((RECORD_VERSION + 1, *FILE)))


@pytest.mark.parametrize("record", [FILE, DIRECTORY], ids=["file", "directory"])
def test_cut_inode_record_is_reported_as_damage(record: Inode) -> None:
    data = record.encode()
    for size in range(len(data)):
        with refused(Code.ENGINE_DAMAGED):
            Inode.decode(data[:size])


VALUES = st.recursive(
    st.none() | I64 | st.binary(max_size=9) | st.text(max_size=9),
    lambda values: st.lists(values, max_size=4),
    max_leaves=8,
)


@given(st.binary(max_size=100) | st.lists(VALUES, max_size=20).map(codec.encode))
def test_any_bytes_are_a_record_or_a_clear_error(data: bytes) -> None:
    for decode in (Inode.decode, Superblock.decode, ClusterMap.decode, Remains.decode):
        with may_refuse(Code.ENGINE_DAMAGED, Code.WRONG_VERSION):
            decode(data)


def test_times_of_changes_within_a_tick_count_on() -> None:
    tick, future = 10**18, 2 * 10**18
    assert following(tick - 5, tick) == tick
    assert following(tick, tick) == tick + 1
    assert following(tick + 1, tick) == tick + 2
    assert following(future, tick) == tick


def test_shard_is_in_the_high_bits_of_an_inode_number() -> None:
    assert shard_of(1) == 0
    assert shard_of((5 << 48) + 1) == 5


# ---------------------------------------------------------------- keys


@given(U63, U63, st.binary(max_size=255), st.binary(max_size=255))
def test_order_of_keys_is_order_of_numbers_then_names(
    one: int, two: int, name: bytes, other: bytes
) -> None:
    assert (keys.inode(one) < keys.inode(two)) == (one < two)
    assert (keys.dentry(one, name) < keys.dentry(two, other)) == ((one, name) < (two, other))
    assert (keys.cookie(1, one) < keys.cookie(1, two)) == (one < two)


@given(U63, st.binary(max_size=255))
def test_prefix_end_is_behind_all_keys_with_the_prefix_and_before_the_next(
    ino: int, name: bytes
) -> None:
    prefix = keys.xattr(ino, b"")
    assert prefix <= keys.xattr(ino, name) < keys.prefix_end(prefix) <= keys.xattr(ino + 1, b"")


@given(st.binary(max_size=20), st.binary(max_size=20))
def test_nothing_lies_between_a_key_and_the_one_after(key: bytes, other: bytes) -> None:
    assert not key < other < keys.after(key)


def test_keys_have_golden_bytes() -> None:
    assert keys.inode(1).hex() == "690000000000000001"
    assert keys.dentry(1, b"a").hex() == "64000000000000000161"
    assert keys.cookie(1, 3).hex() == "6300000000000000010000000000000003"
    assert keys.xattr(1, b"user.a").hex() == "780000000000000001757365722e61"
    assert keys.slot(1, 2).hex() == "7200000000000000010002"
    assert keys.writer(1, 2).hex() == "7700000000000000010000000000000002"
    assert (keys.orphan(1)[:1], keys.purge(1)[:1], keys.trim(1)[:1]) == (b"o", b"p", b"t")
    assert keys.session(1).hex() == "730000000000000001"
