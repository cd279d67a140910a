"""The codec: round trips, and bounded, total decoding of anything."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import codec
from common.errors import Code, KaError

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.binary()
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(0, 9), inner),
    max_leaves=30,
)


@given(values)
def test_what_is_encoded_is_decoded(value: Any) -> None:
    assert codec.decode(codec.encode(value)) == value


@given(st.binary(max_size=200))
def test_any_bytes_give_a_value_or_a_protocol_error(data: bytes) -> None:
    try:
        codec.decode(data)
    except KaError as error:
        assert error.code is Code.PROTOCOL  # noqa: PT017 (both outcomes are right)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x01\x01", id="trailing bytes"),
        pytest.param(b"\xc1", id="unused code"),
        pytest.param(b"\xdd\xff\xff\xff\xff", id="array of 4 billion"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="map of 4 billion"),
        pytest.param(b"\xc6\xff\xff\xff\xff", id="bytes beyond the end"),
        pytest.param(b"\xd4\x05\x00", id="extension"),
        pytest.param(b"\xc7\x00\x05", id="empty extension"),
        pytest.param(b"\xd6\xff\x00\x00\x00\x00", id="timestamp"),
        pytest.param(b"\x81\x90\x01", id="list as map key"),
        pytest.param(b"\xa1\xff", id="text that is not UTF-8"),
        pytest.param(b"\x91" * 100_000, id="nested too deeply"),
    ],
)
def test_malformed_input_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(KaError) as caught:
        codec.decode(data)
    assert caught.value.code is Code.PROTOCOL


def test_bytes_and_text_stay_apart() -> None:
    assert codec.decode(codec.encode([b"a", "a"])) == [b"a", "a"]
    assert codec.encode([b"a", "a"]).hex() == "92c40161a161"


@pytest.mark.parametrize("value", [object(), 2**64, "\ud800", [1, {2: {3}}]])
def test_a_failed_encoding_leaves_nothing_behind(value: object) -> None:
    with pytest.raises((TypeError, OverflowError, ValueError)):
        codec.encode(["prefix", value])
    assert codec.encode(1) == b"\x01"
