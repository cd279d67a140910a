"""Striping: which column, row and place in a chunk hold which bytes of a file.  Pure.

Chunk i of a file (bytes [i * chunk_size, (i + 1) * chunk_size)) is row i // stripe_width of
column i % stripe_width.  All rows of one column are stored in one chunk file on each iod of the
column's chain.  Nobody is ever asked where a byte lives: it is computed from the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from nfsp.model import BLOCK_SIZE, COLUMN_SIZE_MAX, Layout

__all__ = ["Piece", "block_spans", "columns_used", "data_size_max", "pieces", "place_of"]


class Piece(NamedTuple):
    """The part of an extent that falls into one chunk."""

    column: int
    row: int
    offset: int
    """Bytes from the start of the chunk."""
    length: int
    file_offset: int


def place_of(layout: Layout, offset: int) -> tuple[int, int, int]:
    """Return (column, row, offset in the chunk) of byte *offset* of a file."""
    index, inside = divmod(offset, layout.chunk_size)
    row, column = divmod(index, layout.stripe_width)
    return column, row, inside


def data_size_max(layout: Layout) -> int:
    """Return where a file's data must end, whatever its size."""
    return layout.stripe_width * (COLUMN_SIZE_MAX // layout.chunk_size) * layout.chunk_size


def pieces(layout: Layout, offset: int, length: int) -> Iterator[Piece]:
    """Cut the extent (offset, length) at chunk borders, in file order."""
    end = offset + length
    while offset < end:
        column, row, inside = place_of(layout, offset)
        size = min(layout.chunk_size - inside, end - offset)
        yield Piece(column, row, inside, size, offset)
        offset += size


def columns_used(layout: Layout, size: int) -> int:
    """Return how many columns (0 .. n-1) can hold data of a file of *size* bytes."""
    return min(layout.stripe_width, -(-size // layout.chunk_size))


def column_cut(layout: Layout, size: int, column: int) -> tuple[int, int]:
    """Return (row, offset in the chunk) where a column ends in a file of *size* bytes.

    Everything of the column at or behind that place lies at or behind *size*.
    """
    last_column, row, inside = place_of(layout, size)
    if column < last_column:
        return row + 1, 0
    if column == last_column:
        return row, inside
    return row, 0


def file_offset(layout: Layout, column: int, row: int, offset: int) -> int:
    """Return the file offset of a place in a column: the inverse of `place_of`."""
    return (row * layout.stripe_width + column) * layout.chunk_size + offset


def block_spans(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut (offset, length) inside a chunk at block borders: pairs (start, stop), relative to
    *offset*, one for each block touched."""
    start = 0
    while start < length:
        stop = min(length, start + BLOCK_SIZE - (offset + start) % BLOCK_SIZE)
        yield start, stop
        start = stop
