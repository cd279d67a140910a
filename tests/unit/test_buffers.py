"""The buffer pool: exact sizes, reuse, a bound, and no buffer lent twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.buffers import BufferPool


@given(st.integers(0, 40_000) | st.sampled_from((1 << 24, (1 << 24) + 1)))
def test_a_view_has_exactly_the_size_asked_for(size: int) -> None:
    view = BufferPool().take(size)
    assert len(view) == size
    assert not view.readonly


def test_a_buffer_given_back_is_lent_again() -> None:
    pool = BufferPool()
    first = pool.take(5000)
    buffer = first.obj
    pool.give(first)
    assert pool.take(8192).obj is buffer
    assert pool.take(8192).obj is not buffer


def test_a_view_cannot_be_used_after_it_was_given_back() -> None:
    pool = BufferPool()
    view = pool.take(10)
    pool.give(view)
    with pytest.raises(ValueError):
        view[0] = 1


def test_a_buffer_given_back_twice_is_found() -> None:
    pool = BufferPool()
    view = pool.take(10)
    part = view[2:5]
    pool.give(view)
    with pytest.raises(ValueError):
        pool.give(view)
    with pytest.raises(AssertionError):
        pool.give(part)
    assert pool.take(10).obj is not pool.take(10).obj


def test_the_pool_is_bounded() -> None:
    pool = BufferPool(size_max=3 * 4096)
    views = [pool.take(4096) for _ in range(10)]
    for view in views:
        pool.give(view)
    assert pool.size == 3 * 4096
    huge = pool.take((1 << 24) + 1)
    assert isinstance(huge.obj, bytearray)
    assert len(huge.obj) == (1 << 24) + 1, "no rounding beyond the classes"
    pool.give(huge)
    assert pool.size == 3 * 4096


@given(st.lists(st.integers(0, 20_000) | st.none(), max_size=60))
def test_no_two_borrowers_share_memory(steps: list[int | None]) -> None:
    pool = BufferPool(size_max=64 * 1024)
    lent: list[memoryview] = []
    for step in steps:
        if step is None:
            if lent:
                pool.give(lent.pop(0))
        else:
            lent.append(pool.take(step))
        assert len({id(view.obj) for view in lent}) == len(lent)
        assert 0 <= pool.size <= 64 * 1024
