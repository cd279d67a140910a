"""The chunk format and the plans: golden bytes, flipped bytes, and a dumb second arithmetic."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.checksum import ABSENT, block_sum
from nfsp.iod import chunk, chunkplan
from nfsp.iod.chunk import BLOCK_SIZE, HEADER_SIZE, BadHeader, ChunkHeader

CHUNK_SIZE = 128 * 1024
DOCUMENT = Path(__file__).parents[2] / "docs" / "on-disk-format.md"
EXAMPLE = ChunkHeader(
    chunk_size=65536,
    inode=0x1234,
    column=2,
    row=1,
    version=7,
    chain_epoch=0,
    data_end=40960,
    boot_id=bytes(range(16)),
    in_flight=0,
    unsynced=0b10,
    sums=(block_sum([b"a" * 32768], BLOCK_SIZE), block_sum([b"b" * 8192], BLOCK_SIZE)),
)


@st.composite
def headers(draw: st.DrawFn) -> ChunkHeader:
    size = draw(st.sampled_from(chunk.CHUNK_SIZES))
    blocks = size // BLOCK_SIZE
    u64 = st.integers(0, 2**64 - 1)
    bitmap = st.integers(0, 2**blocks - 1)
    return ChunkHeader(
        size, draw(u64), draw(st.integers(0, 2**32 - 1)), draw(u64), draw(u64),
        draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, size)),
        draw(st.binary(min_size=16, max_size=16)), draw(bitmap), draw(bitmap),
        tuple(draw(st.lists(u64, min_size=blocks, max_size=blocks))),
    )  # fmt: skip


def _decode(page: bytes, like: ChunkHeader) -> ChunkHeader | None:
    return chunk.decode(page, inode=like.inode, column=like.column, row=like.row)


@settings(max_examples=50, deadline=None)
@given(headers())
def test_header_survives_encoding(header: ChunkHeader) -> None:
    page = chunk.encode(header)
    assert len(page) == HEADER_SIZE
    assert _decode(page, header) == header


def test_any_flipped_bit_of_a_header_is_noticed() -> None:
    page = bytearray(chunk.encode(EXAMPLE))
    for position in range(HEADER_SIZE):
        page[position] ^= 1 << position % 8
        with pytest.raises(BadHeader):
            _decode(bytes(page), EXAMPLE)
        page[position] ^= 1 << position % 8


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=HEADER_SIZE))
def test_garbage_is_no_header(page: bytes) -> None:
    if page.strip(b"\0"):
        with pytest.raises(BadHeader):
            _decode(page, EXAMPLE)
    else:
        assert _decode(page, EXAMPLE) is None


@pytest.mark.parametrize("field", ["inode", "column", "row"])
def test_header_in_a_wrong_place_is_refused(field: str) -> None:
    page = chunk.encode(replace(EXAMPLE, **{field: 99}))
    with pytest.raises(BadHeader, match="another chunk"):
        _decode(page, EXAMPLE)


def test_documented_hexdump_is_the_encoded_header() -> None:
    text = DOCUMENT.read_text()
    page = bytearray(HEADER_SIZE)
    lines = re.findall(r"^([0-9a-f]{4})  ((?:[0-9a-f]{2} ?)+)", text, re.MULTILINE)
    assert len(lines) == 8
    for offset, digits in lines:
        data = bytes.fromhex(digits)
        page[int(offset, 16) : int(offset, 16) + len(data)] = data
    assert bytes(page) == chunk.encode(EXAMPLE)
    assert _decode(bytes(page), EXAMPLE) == EXAMPLE


def test_documented_offsets_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+) \| `(\w+)`", DOCUMENT.read_text(), re.MULTILINE)
    end = 0
    for offset, size, _ in rows:
        assert int(offset) == end
        end += int(size)
    assert end == HEADER_SIZE
    page = chunk.encode(EXAMPLE)
    for offset, size, name in rows:
        value = getattr(EXAMPLE, name, None)
        if isinstance(value, int):
            field = page[int(offset) : int(offset) + int(size)]
            assert int.from_bytes(field, "little") == value, name


def _header(present: int, data_end: int, unsynced: int = 0) -> ChunkHeader:
    empty = chunk.new_header(5, 0, 0, chunk_size=CHUNK_SIZE, boot_id=bytes(16))
    sums = tuple(1000 + b if present >> b & 1 else ABSENT for b in range(4))
    return replace(empty, sums=sums, data_end=data_end, unsynced=unsynced & present)


RANGES = st.tuples(st.integers(0, CHUNK_SIZE - 1), st.integers(1, CHUNK_SIZE)).map(
    lambda pair: (pair[0], min(pair[1], CHUNK_SIZE - pair[0]))
)
HEADERS = st.builds(
    _header, st.integers(0, 15), st.integers(0, CHUNK_SIZE), st.integers(0, 15)
)


@given(RANGES, st.lists(st.integers(0, CHUNK_SIZE), max_size=6))
def test_split_pieces_are_the_bytes_of_each_block(span: tuple[int, int], cuts: list[int]) -> None:
    offset, length = span
    data = bytes(at % 251 for at in range(length))
    edges = sorted({0, length, *(min(cut, length) for cut in cuts)})
    pieces = [data[start:end] for start, end in itertools.pairwise(edges)]
    overlaps = chunk.block_overlaps(offset, length)
    parts = chunk.split_by_block([b"", *pieces], overlaps)
    for overlap, part in zip(overlaps, parts, strict=True):
        start = overlap.block * BLOCK_SIZE + overlap.start - offset
        assert b"".join(part) == data[start : start + overlap.end - overlap.start]
    assert sum(overlap.end - overlap.start for overlap in overlaps) == length


@given(HEADERS, RANGES)
def test_write_plan_agrees_with_naive_model(header: ChunkHeader, span: tuple[int, int]) -> None:
    offset, length = span
    plan = chunkplan.plan_write(header, chunk.block_overlaps(offset, length))
    for block in range(4):
        start, end = block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE
        touched = offset < end and offset + length > start
        present = header.sums[block] != ABSENT
        assert bool(plan.intent >> block & 1) == (touched and present)
        assert bool(plan.absent >> block & 1) == (touched and not present)
        keeps = any(
            start <= at < min(end, header.data_end) and not offset <= at < offset + length
            for at in (start, offset - 1, offset + length, min(end, header.data_end) - 1)
        )
        assert (block in plan.merged) == (touched and present and keeps)
    assert plan.barrier == bool(plan.intent & ~header.unsynced)
    final = plan.final_header([7] * len(plan.overlaps), b"b" * 16)
    assert final.version == header.version + 1
    assert final.in_flight == 0
    assert final.data_end == max(header.data_end, offset + length)


@given(HEADERS, RANGES)
def test_clear_plan_agrees_with_naive_model(header: ChunkHeader, span: tuple[int, int]) -> None:
    start, length = span
    plan = chunkplan.plan_clear(header, start, start + length)
    for block in range(4):
        first, last = block * BLOCK_SIZE, min((block + 1) * BLOCK_SIZE, header.data_end)
        present = header.sums[block] != ABSENT
        cleared = [at for at in (first, start) if first <= at < last and 0 <= at - start < length]
        kept = [at for at in (first, start + length) if first <= at < last] and not (
            start <= first and last <= start + length
        )
        assert (block in plan.edges) == (present and bool(cleared) and bool(kept))
        if present and first >= start and (block + 1) * BLOCK_SIZE <= start + length:
            assert plan.dropped >> block & 1
    final = plan.final_header(dict.fromkeys(plan.edges, 7), b"b" * 16)
    present_after = chunk.bits(b for b in range(4) if final.sums[b] != ABSENT)
    assert final.unsynced & ~present_after == 0
    assert plan.intent_header(b"b" * 16).in_flight & ~present_after == 0


def test_only_blocks_a_crash_can_have_touched_are_suspect() -> None:
    here, there = bytes(16), b"b" * 16
    whole = HEADER_SIZE + CHUNK_SIZE
    header = _header(0b1111, CHUNK_SIZE, unsynced=0b0110)
    assert chunkplan.suspects(header, here, whole) == 0
    assert chunkplan.suspects(header, there, whole) == 0b0110
    assert chunkplan.suspects(replace(header, in_flight=0b1000), here, whole) == 0b1000
    cut = HEADER_SIZE + 2 * BLOCK_SIZE + 10
    assert chunkplan.suspects(header, here, cut) == 0b0100
