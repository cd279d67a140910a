"""Typed messages: exact types, fields added at the end only; errors as text of one line."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import codec
from common.errors import Code, KaError
from common.messages import Catalogue, decode_error, encode_error

TEST = Catalogue("test")


@TEST.message(1)
class Everything(NamedTuple):
    number: int
    raw: bytes
    text: str
    flag: bool
    items: list[Any]
    added: int = 5


@TEST.message(2)
class Nothing(NamedTuple):
    pass


def refusal(value: object) -> str:
    with pytest.raises(KaError) as caught:
        TEST.decode(codec.encode(value))
    assert caught.value.code is Code.PROTOCOL
    return caught.value.message


@given(
    st.builds(
        Everything,
        st.integers(-(2**63), 2**63),
        st.binary(),
        st.text(),
        st.booleans(),
        st.lists(st.integers(0, 9) | st.binary()),
        st.integers(0, 9),
    )
)
def test_a_message_survives_the_wire(message: Everything) -> None:
    assert TEST.decode(TEST.encode(message)) == message


def test_messages_have_their_golden_bytes() -> None:
    encoded = TEST.encode(Everything(-1, b"\xff", "é", True, [1], 2))
    assert encoded.hex() == "9701ffc401ffa2c3a9c3910102"
    assert TEST.encode(Nothing()).hex() == "9102"


def test_a_field_left_out_at_the_end_has_its_default() -> None:
    assert TEST.decode(codec.encode([1, 1, b"", "", False, []])) == Everything(
        1, b"", "", False, []
    )


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([1, 1, b"", "", False], "4 fields"),
        ([1, 1, b"", "", False, [], 5, 6], "7 fields"),
        ([1, True, b"", "", False, []], "bool field"),
        ([1, 1, "", "", False, []], "str field"),
        ([1, 1, b"", b"", False, []], "bytes field"),
        ([1, 1, b"", "", 0, []], "int field"),
        ([1, 1, b"", "", False, None], "NoneType field"),
        ([1, 1.0, b"", "", False, []], "float field"),
        ([3], "unknown test message 3"),
        ([True], "not a test message"),
        ([], "not a test message"),
        ({}, "not a test message"),
        (1, "not a test message"),
    ],
)
def test_any_other_shape_is_refused(value: object, reason: str) -> None:
    assert reason in refusal(value)


@given(st.binary(max_size=100))
def test_any_bytes_give_a_message_or_a_protocol_error(data: bytes) -> None:
    try:
        TEST.decode(data)
    except KaError as error:
        assert error.code is Code.PROTOCOL  # noqa: PT017 (both outcomes are right)


def test_a_number_belongs_to_one_message() -> None:
    with pytest.raises(AssertionError):
        TEST.message(1)(Nothing)


def test_errors_cross_the_wire_with_their_context() -> None:
    error = decode_error(encode_error(KaError(Code.ENOENT, "no such entry", ino=7)))
    assert (error.code, error.message, error.context) == (
        Code.ENOENT, "no such entry", {"ino": "7"},
    )  # fmt: skip
    assert error.remote


@given(st.text(), st.text())
def test_encoding_an_error_never_fails(message: str, fact: str) -> None:
    error = decode_error(encode_error(KaError(Code.EIO, message, fact=fact)))
    assert error.code is Code.EIO
    assert str(error).isprintable()


def test_an_error_about_an_undecodable_name_can_be_sent() -> None:
    name = b"\xff.txt".decode("utf-8", "surrogateescape")
    assert "udcff" in decode_error(encode_error(KaError(Code.EIO, name))).message


def test_an_error_with_an_endless_message_stays_small() -> None:
    assert len(encode_error(KaError(Code.EIO, "x" * 10_000_000, y="z" * 10_000_000))) < 5_000


@given(st.binary(max_size=60))
def test_any_bytes_decode_to_some_error(data: bytes) -> None:
    assert str(decode_error(data)).isprintable()


@pytest.mark.parametrize(
    "value",
    [
        1,
        [],
        [2002, "m"],
        [2002, "m", []],
        [2002, 5, {}],
        [[], "m", {}],
        [2002, "m", {1: "x"}],
        [2002, "m", {"code": "x"}],
        [2002, "m", {"x": 5}],
    ],
)
def test_an_unreadable_error_is_a_protocol_error(value: object) -> None:
    assert decode_error(codec.encode(value)).code is Code.PROTOCOL


def test_a_peers_text_cannot_forge_a_line_or_steer_a_terminal() -> None:
    body = codec.encode([2002, "a\nb\x1b[2J", {"k\n": "v\r"}])
    assert str(decode_error(body)) == "a\\nb\\x1b[2J (k\\n=v\\r)"


def test_an_unknown_code_is_internal() -> None:
    assert decode_error(codec.encode([9999, "m", {}])).code is Code.INTERNAL
