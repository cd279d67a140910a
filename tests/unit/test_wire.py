"""Laws of the messages: golden bytes, round trips, and what garbage may cause."""

from __future__ import annotations

from typing import Any, get_origin, get_type_hints

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common import codec
from common.errors import Code
from common.messages import Catalogue
from nfsp import wire
from tests.support.space import may_refuse, refused

CATALOGUES = [wire.MDS, wire.IOD]

GOLDEN = [
    (wire.MDS, wire.Done(), "91 06"),
    (wire.MDS, wire.Lookup(1, b"a"), "93 0a 01 c40161"),
    (wire.MDS, wire.InodeReply(b"r"), "92 0c c40172"),
    (
        wire.MDS,
        wire.Create(0, 1, 1, b"f", 0o100644, 0, 0, 0o22, 0, b"", True, False),
        "9d 28 00 01 01 c40166 cd81a4 00 00 12 00 c400 c3 c2",
    ),
    (
        wire.MDS,
        wire.SetAttr(1, 2, 5, wire.SET_SIZE, 0, 0, 0, 4096, 0, 0),
        "9b 2d 01 02 05 08 00 00 00 cd1000 00 00",
    ),
    (
        wire.IOD,
        wire.Write(1, 5, 2, 0, 0, 1 << 20, b"\1" * 8, False),
        "9b 02 01 05 02 00 00 ce00100000 c4080101010101010101 c2 00 00",
    ),
    (
        wire.IOD,
        wire.Read(1, 5, 2, 0, 0, 32768, 1 << 20),
        "99 03 01 05 02 00 00 cd8000 ce00100000 c2",
    ),
    (wire.IOD, wire.Locate(1, 5, 2, 0, 1 << 20), "96 14 01 05 02 00 ce00100000"),
    (
        wire.IOD,
        wire.LocateReply(b"/d/5.2", 77, 4096, b"\1" * 8),
        "95 15 c4062f642f352e32 4d cd1000 c4080101010101010101",
    ),
]

I64 = st.integers(-(1 << 63), (1 << 64) - 1)
VALUES = st.recursive(
    st.none() | st.booleans() | I64 | st.binary(max_size=9) | st.text(max_size=9),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(I64, values, max_size=3),
    max_leaves=6,
)
BY_TYPE: dict[type, st.SearchStrategy[Any]] = {
    int: I64,
    bytes: st.binary(max_size=20),
    str: st.text(max_size=9),
    bool: st.booleans(),
    list: st.lists(VALUES, max_size=4),
}


@st.composite
def messages(draw: st.DrawFn, catalogue: Catalogue) -> Any:
    cls: Any = draw(st.sampled_from(list(catalogue.classes().values())))
    hints = get_type_hints(cls)
    kinds = [get_origin(hints[field]) or hints[field] for field in cls._fields]
    return cls(*(draw(BY_TYPE[kind]) for kind in kinds))


@pytest.mark.parametrize(
    ("catalogue", "message", "golden"), GOLDEN, ids=[type(row[1]).__name__ for row in GOLDEN]
)
def test_message_has_its_golden_bytes(catalogue: Catalogue, message: Any, golden: str) -> None:
    data = bytes.fromhex(golden)
    assert catalogue.encode(message) == data
    assert catalogue.decode(data) == message


@pytest.mark.parametrize("catalogue", CATALOGUES, ids=["mds", "iod"])
@given(data=st.data())
def test_message_survives_the_wire(catalogue: Catalogue, data: st.DataObject) -> None:
    message = data.draw(messages(catalogue))
    decoded = catalogue.decode(catalogue.encode(message))
    assert type(decoded) is type(message)
    assert decoded == message


@given(st.binary(max_size=60) | VALUES.map(codec.encode))
@example(b"")
@example(b"\xc1")
@example(b"\x91" * 5000)
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\x91\xc7\x01\x05\x00")
@example(b"\x82\x01\x02\x01\x02")
@example(b"\x81\x90\x01")
def test_any_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    for catalogue in CATALOGUES:
        with may_refuse(Code.PROTOCOL):
            message = catalogue.decode(data)
            assert type(message) in catalogue.classes().values()


@given(st.sampled_from(CATALOGUES), st.integers(0, 70), st.lists(VALUES, max_size=14))
def test_any_fields_are_a_message_or_a_protocol_error(
    catalogue: Catalogue, number: int, fields: list[Any]
) -> None:
    with may_refuse(Code.PROTOCOL):
        message = catalogue.decode(codec.encode([number, *fields]))
        assert [*message][: len(fields)] == fields


@pytest.mark.parametrize("catalogue", CATALOGUES, ids=["mds", "iod"])
@given(data=st.data())
def test_damaged_message_is_a_message_or_a_protocol_error(
    catalogue: Catalogue, data: st.DataObject
) -> None:
    encoded = bytearray(catalogue.encode(data.draw(messages(catalogue))))
    place = data.draw(st.integers(0, len(encoded) - 1))
    encoded[place] ^= data.draw(st.integers(1, 255))
    for damaged in (encoded, encoded[:place]):
        with may_refuse(Code.PROTOCOL):
            catalogue.decode(damaged)


def test_bool_is_no_int_and_str_no_bytes() -> None:
    for fields in ([10, True, b"a"], [10, 1, "a"], [10, 1.0, b"a"], [10, 1, None]):
        with refused(Code.PROTOCOL):
            wire.MDS.decode(codec.encode(fields))


def test_fields_with_defaults_may_be_left_out_at_the_end() -> None:
    message = wire.Read(1, 5, 2, 0, 0, 32768, 1 << 20, False)
    assert wire.IOD.decode(codec.encode([3, *message[:-1]])) == message
    with refused(Code.PROTOCOL):
        wire.IOD.decode(codec.encode([3, *message, 0]))


def test_mutations_begin_with_slot_and_sequence() -> None:
    for number, cls in wire.MDS.classes().items():
        fields: Any = cls
        if 40 <= number < 49:
            assert fields._fields[:2] == ("slot", "sequence"), cls
