"""Laws of striping: it agrees with a naive model that deals bytes out one by one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nfsp.model import BLOCK_SIZE, Layout
from nfsp.striping import (
    block_spans,
    column_cut,
    columns_used,
    data_size_max,
    file_offset,
    pieces,
    place_of,
)

CHUNK_SIZES = st.sampled_from([1, 2, 3, 5])
"""Striping cares for no chunk size in particular; small ones make small models."""
SMALL = st.builds(
    lambda chunk_size, width: Layout(chunk_size, width, 1, tuple(range(width))),
    CHUNK_SIZES,
    st.integers(1, 4),
)
LARGE = st.builds(
    lambda chunk_size, width: Layout(chunk_size, width, 1, ()),
    st.sampled_from([65536, 1 << 20, 98304]),
    st.integers(1, 255),
)
OFFSETS = st.integers(0, 80)


def naive(layout: Layout, size: int) -> list[tuple[int, int, int]]:
    """Deal *size* bytes out like cards: the place of each."""
    places = []
    column = row = inside = 0
    for _ in range(size):
        places.append((column, row, inside))
        inside += 1
        if inside == layout.chunk_size:
            inside, column = 0, column + 1
        if column == layout.stripe_width:
            column, row = 0, row + 1
    return places


@given(SMALL, OFFSETS)
def test_place_of_agrees_with_naive_model(layout: Layout, offset: int) -> None:
    assert place_of(layout, offset) == naive(layout, offset + 1)[-1]


@given(SMALL, OFFSETS, OFFSETS)
def test_pieces_agree_with_naive_model(layout: Layout, offset: int, length: int) -> None:
    places = []
    expected_offset = offset
    for piece in pieces(layout, offset, length):
        assert piece.file_offset == expected_offset
        assert 0 < piece.length <= layout.chunk_size - piece.offset
        expected_offset += piece.length
        for inside in range(piece.offset, piece.offset + piece.length):
            places.append((piece.column, piece.row, inside))
    assert places == naive(layout, offset + length)[offset:]


@given(SMALL, OFFSETS, st.integers(0, 4))
def test_columns_used_agrees_with_naive_model(layout: Layout, size: int, column: int) -> None:
    used = {column for column, _, _ in naive(layout, size)}
    assert used == set(range(columns_used(layout, size)))


@given(SMALL, OFFSETS)
def test_column_cut_parts_the_bytes_before_the_size_from_those_behind(
    layout: Layout, size: int
) -> None:
    for offset, (column, row, inside) in enumerate(naive(layout, size + 60)):
        assert ((row, inside) >= column_cut(layout, size, column)) == (offset >= size)


@given(LARGE, st.integers(0, (1 << 63) - 1))
def test_file_offset_is_the_inverse_of_place_of(layout: Layout, offset: int) -> None:
    assert file_offset(layout, *place_of(layout, offset)) == offset


@given(LARGE, st.integers(0, (1 << 63) - 1), st.integers(0, 1 << 23))
def test_pieces_of_large_offsets_cover_the_extent_in_order(
    layout: Layout, offset: int, length: int
) -> None:
    position = offset
    for piece in pieces(layout, offset, length):
        assert piece.file_offset == position
        assert (piece.column, piece.row, piece.offset) == place_of(layout, position)
        assert piece.offset + piece.length <= layout.chunk_size
        position += piece.length
    assert position == offset + length


@given(st.integers(0, 1 << 23), st.integers(0, 1 << 20))
def test_block_spans_cover_the_length_and_cross_no_block_border(offset: int, length: int) -> None:
    position = 0
    for start, stop in block_spans(offset, length):
        assert start == position < stop
        assert (offset + start) // BLOCK_SIZE == (offset + stop - 1) // BLOCK_SIZE
        assert stop == length or (offset + stop) % BLOCK_SIZE == 0
        position = stop
    assert position == length


@given(LARGE)
def test_all_data_with_their_headers_fit_into_files_of_16_tib(layout: Layout) -> None:
    _column, row, _inside = place_of(layout, data_size_max(layout) - 1)
    assert (row + 1) * (layout.chunk_size + 4096) < 16 << 40
