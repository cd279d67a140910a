"""Content: where the bytes of an image are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.broadcast.image import Content, Entry, EntryKind

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=4)


def entry(number: int, lengths: list[int]) -> Entry:
    """Return a file with a hole behind each range."""
    starts = [sum(lengths[:index]) + 10 * index for index in range(len(lengths))]
    ranges = tuple(zip(starts, lengths, strict=True))
    return Entry(b"%d" % number, EntryKind.FILE, 0, 0, 0, 0, 1000, ranges)


@given(files=st.lists(LENGTHS, min_size=1, max_size=4), data=st.data())
def test_what_lies_together_is_one_piece_and_nothing_else_is(
    files: list[list[int]], data: st.DataObject
) -> None:
    content = Content([entry(number, lengths) for number, lengths in enumerate(files)])
    offset = data.draw(st.integers(0, content.size - 1))
    length = data.draw(st.integers(1, content.size - offset))
    pieces = list(content.pieces(offset, length))
    assert content.piece(offset, length) == (pieces[0] if len(pieces) == 1 else None)
    assert sum(piece.length for piece in pieces) == length
