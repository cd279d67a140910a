"""Laws of manifests and sets of chunks: what is signed is what is read, nothing else is."""

from __future__ import annotations

import contextlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import codec
from common.broadcast import chunkset
from common.broadcast.manifest import (
    Algorithm,
    Manifest,
    decode_signed,
    encode_signed,
)
from common.errors import Code, KaError

TOKEN = bytes(range(32))
SETS = st.builds(
    lambda count, picked: (count, picked & chunkset.full(count)),
    st.integers(0, 600),
    st.one_of(
        st.integers(0, 2**600 - 1),
        st.lists(st.tuples(st.integers(0, 600), st.integers(0, 300)), max_size=6).map(
            lambda runs: sum({1 << i for at, n in runs for i in range(at, at + n)})
        ),
    ),
)


def manifest_of(
    data: bytes, algorithm: Algorithm = Algorithm.XXH3, chunk_size: int = 4
) -> Manifest:
    chunks = [data[at : at + chunk_size] for at in range(0, len(data), chunk_size)]
    sums = b"".join(algorithm.sum_of(chunk) for chunk in chunks)
    return Manifest(bytes(16), "debian 12", len(data), chunk_size, algorithm, sums)


@given(SETS)
def test_a_set_of_chunks_survives_the_wire(counted: tuple[int, int]) -> None:
    count, bits = counted
    assert chunkset.decode(chunkset.encode(bits), count) == bits
    assert chunkset.from_indexes(chunkset.indexes(bits)) == bits
    assert sum(length for _, length in chunkset.runs(bits)) == chunkset.count_of(bits)
    if bits:
        assert chunkset.first(bits) == next(chunkset.indexes(bits))


@given(SETS)
def test_a_set_of_chunks_is_never_longer_than_its_bits(counted: tuple[int, int]) -> None:
    count, bits = counted
    assert len(chunkset.encode(bits)) <= 1 + (count + 7) // 8
    assert len(chunkset.encode(chunkset.full(1 << 18))) <= 5


@given(st.binary(max_size=12), st.integers(0, 100))
def test_garbage_is_refused_or_a_set_within_bounds(data: bytes, count: int) -> None:
    bits = 0
    with contextlib.suppress(KaError):
        bits = chunkset.decode(data, count)
    assert bits <= chunkset.full(count)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x02", b"\x00\x01", b"\x00\x00\x09", b"\x01\x00\x01", b"\x00" + b"\xff" * 11,
     b"\x00\x00\x80"],
)  # fmt: skip
def test_a_malformed_set_of_chunks_is_refused(data: bytes) -> None:
    with pytest.raises(KaError):
        chunkset.decode(data, 8)


@given(st.binary(max_size=40), st.sampled_from(Algorithm))
def test_a_signed_manifest_is_read_as_it_was_written(data: bytes, algorithm: Algorithm) -> None:
    manifest = manifest_of(data, algorithm)
    assert decode_signed(encode_signed(manifest, TOKEN), TOKEN) == manifest


@given(st.data())
def test_a_manifest_that_was_tampered_with_is_refused(data: st.DataObject) -> None:
    signed = bytearray(encode_signed(manifest_of(b"some content"), TOKEN))
    at = data.draw(st.integers(0, len(signed) - 1))
    signed[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(KaError) as refused:
        decode_signed(bytes(signed), TOKEN)
    assert refused.value.code in (Code.AUTH, Code.PROTOCOL)


def test_a_manifest_of_another_session_is_refused() -> None:
    with pytest.raises(KaError) as refused:
        decode_signed(encode_signed(manifest_of(b"x"), TOKEN), bytes(32))
    assert refused.value.code is Code.AUTH


@pytest.mark.parametrize(
    "changes",
    [{"transfer_id": b"short"}, {"size": -1}, {"size": 9}, {"chunk_size": 0},
     {"chunk_size": 17 << 20}, {"sums": b""}, {"image_id": "x" * 1025}],
)  # fmt: skip
def test_a_manifest_whose_parts_do_not_fit_is_refused(changes: dict[str, object]) -> None:
    fields: dict[str, object] = {
        "transfer_id": bytes(16), "image_id": "x", "size": 8, "chunk_size": 4,
        "algorithm": Algorithm.XXH3, "sums": bytes(16),
    }  # fmt: skip
    Manifest(**fields)  # type: ignore[arg-type]
    with pytest.raises(KaError):
        Manifest(**(fields | changes))  # type: ignore[arg-type]


def test_an_unknown_algorithm_or_format_is_refused() -> None:
    def signed(fields: object) -> bytes:
        packed = codec.encode(fields)
        return codec.encode([packed, hmac.digest(TOKEN, b"ka manifest" + packed, "sha256")])

    good = [1, bytes(16), "x", 4, 4, "xxh3-64", bytes(8)]
    decode_signed(signed(good), TOKEN)
    for place, value in ((0, 2), (5, "crc32"), (3, "4")):
        with pytest.raises(KaError) as refused:
            decode_signed(signed([*good[:place], value, *good[place + 1 :]]), TOKEN)
        assert refused.value.code is Code.PROTOCOL


@given(st.binary(min_size=1, max_size=40), st.sampled_from(Algorithm), st.data())
def test_only_the_right_bytes_verify(data: bytes, algorithm: Algorithm, at: st.DataObject) -> None:
    manifest = manifest_of(data, algorithm)
    index = at.draw(st.integers(0, manifest.chunk_count - 1))
    offset, length = manifest.extent(index)
    chunk = data[offset : offset + length]
    assert manifest.verify(index, chunk)
    assert not manifest.verify(index, chunk + b"\0")
    assert not manifest.verify(index, bytes([chunk[0] ^ 1]) + chunk[1:])
    assert not manifest.verify(manifest.chunk_count, chunk)
    assert not manifest.verify(-1, chunk)
