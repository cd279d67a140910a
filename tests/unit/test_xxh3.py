"""Laws of the sums: the plain Python one and the compiled one are the same function."""

from __future__ import annotations

from itertools import pairwise

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from common import checksum
from common.xxh3 import xxh3_64

GOLDEN = {
    b"": "2d06800538d394c2",
    b"a": "e6c632b61e964e1f",
    b"KaF\x01": "0036bf107c35aae3",
}


@pytest.mark.parametrize(
    "size", [*range(20), 32, 33, 64, 65, 96, 97, 128, 129, 240, 241, 1024, 1025, 5000]
)
def test_plain_python_sums_every_length_as_the_compiled_one_does(size: int) -> None:
    data = bytes(7 * at % 251 for at in range(size))
    assert xxh3_64(data) == xxhash.xxh3_64_intdigest(data)


@given(st.binary(max_size=2100))
def test_plain_python_sums_any_bytes_as_the_compiled_one_does(data: bytes) -> None:
    assert xxh3_64(data) == xxhash.xxh3_64_intdigest(data)


def test_known_sums() -> None:
    for data, expected in GOLDEN.items():
        assert f"{xxh3_64(data):016x}" == expected


def test_without_xxhash_all_sums_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = (b"one", b"two" * 100)
    data = b"".join(pieces)
    with_it = (
        checksum.digest(data),
        checksum.digest_bytes(data),
        checksum.block_sum(pieces, 4096),
    )
    monkeypatch.setattr(checksum, "COMPILED", False)
    assert with_it == (
        checksum.digest(data),
        checksum.digest_bytes(data),
        checksum.block_sum(pieces, 4096),
    )


@pytest.mark.parametrize("compiled", [True, False])
@given(data=st.binary(max_size=2000), cuts=st.lists(st.integers(0, 2000), max_size=5))
def test_what_comes_in_parts_has_the_sum_of_the_whole(
    compiled: bool, data: bytes, cuts: list[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksum, "COMPILED", compiled)
        summing = checksum.summing()
        places = sorted(min(cut, len(data)) for cut in cuts)
        for start, stop in pairwise((0, *places, len(data))):
            summing.update(data[start:stop])
        assert summing.digest() == checksum.digest_bytes(data)
