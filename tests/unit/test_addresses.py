"""Addresses: host and port, or one clear line."""

from __future__ import annotations

import pytest

from common.endpoint import parse_address
from common.errors import Code, KaError


@pytest.mark.parametrize(
    ("text", "address"),
    [("node1:7000", ("node1", 7000)), ("[::1]:80", ("::1", 80)), ("10.0.0.1:0", ("10.0.0.1", 0))],
)
def test_addresses_are_parsed(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text", ["", "node1", ":80", "n:", "n:x", "n:65536", "n:-1", "n:" + "9" * 5000]
)
def test_other_texts_are_no_addresses(text: str) -> None:
    with pytest.raises(KaError) as caught:
        parse_address(text)
    assert caught.value.code is Code.USAGE
