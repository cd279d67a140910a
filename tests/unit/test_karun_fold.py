"""Folding: equal output is one group, however it came, and costs what is distinct in it."""

from __future__ import annotations

import itertools
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karun.fold import DIFF_LINES_MAX, Fold, Group, diff
from karun.lines import LINE_SIZE_MAX, STDERR, STDOUT


def folded(fold: Fold, nodes: int) -> list[tuple[tuple[int, ...], bytes]]:
    return [(group.nodes, b"".join(fold.lines(group))) for group in fold.groups(range(nodes))]


def test_equal_output_is_one_group_and_the_largest_comes_first() -> None:
    fold = Fold(5)
    for node, text in enumerate([b"b\n", b"a\n", b"a\n", b"", b"a\nb\n"]):
        fold.feed(node, text)
        fold.close(node)
    assert folded(fold, 5) == [((1, 2), b"a\n"), ((0,), b"b\n"), ((3,), b""), ((4,), b"a\nb\n")]
    assert [fold.is_empty(group) for group in fold.groups(range(5))] == [False, False, True, False]


def test_only_the_nodes_asked_for_are_grouped() -> None:
    fold = Fold(3)
    assert [group.nodes for group in fold.groups([2, 0])] == [(0, 2)]


def test_a_last_line_without_newline_equals_one_with() -> None:
    fold = Fold(2)
    fold.feed(0, b"a\nb")
    fold.feed(1, b"a\nb\n")
    for node in range(2):
        fold.close(node)
    assert folded(fold, 2) == [((0, 1), b"a\nb\n")]


def test_an_exact_fold_keeps_the_missing_newline() -> None:
    fold = Fold(2, exact=True)
    fold.feed(0, b"a\nb")
    fold.feed(1, b"a\nb\n")
    for node in range(2):
        fold.close(node)
    assert [fold.of_node(node) for node in range(2)] == [b"a\nb", b"a\nb\n"]


def test_both_streams_are_merged_by_whole_lines() -> None:
    fold = Fold(1)
    fold.feed(0, b"out", STDOUT)
    fold.feed(0, b"err\nmore", STDERR)
    fold.feed(0, b"put\n", STDOUT)
    fold.close(0)
    assert folded(fold, 1) == [((0,), b"err\noutput\nmore\n")]


scripts = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from([b"a\n", b"b\n", b"a", b"c\na\n", b"", b"\n"])),
    max_size=80,
)


@given(scripts)
def test_folding_agrees_with_a_naive_model(script: list[tuple[int, bytes]]) -> None:
    fold, naive = Fold(6), [b""] * 6
    for node, data in script:
        fold.feed(node, data)
        naive[node] += data
    whole = [text if text.endswith(b"\n") or not text else text + b"\n" for text in naive]
    for node in range(6):
        fold.close(node)
    expected: dict[bytes, list[int]] = {}
    for node, text in enumerate(whole):
        expected.setdefault(text, []).append(node)
    assert {text: list(nodes) for nodes, text in folded(fold, 6)} == expected
    assert [fold.of_node(node) for node in range(6)] == whole


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=8))
def test_the_cuts_on_the_way_make_no_difference(data: bytes, cuts: list[int]) -> None:
    fold = Fold(2)
    fold.feed(0, data)
    edges = [0, *sorted(cuts), len(data)]
    for begin, end in itertools.pairwise(edges):
        fold.feed(1, data[begin:end] if end > begin else b"")
    for node in range(2):
        fold.close(node)
    assert len(fold.groups(range(2))) == 1


@pytest.mark.parametrize("size", [LINE_SIZE_MAX - 1, LINE_SIZE_MAX, LINE_SIZE_MAX + 1])
@pytest.mark.parametrize("piece", [1000, LINE_SIZE_MAX, 1 << 20])
def test_binary_output_without_newlines_is_held_in_pieces(size: int, piece: int) -> None:
    data = bytes(range(11, 256)) * (3 * size // 245 + 1)
    fold = Fold(1, exact=True)
    for begin in range(0, len(data), piece):
        fold.feed(0, data[begin : begin + piece])
    assert all(len(line) <= LINE_SIZE_MAX for line in fold.lines(fold.groups([0])[0]))
    fold.close(0)
    assert fold.of_node(0) == data


def cost(nodes: int, lines: list[bytes], *, by_line: bool = False) -> tuple[int, Fold]:
    tracemalloc.start()
    fold = Fold(nodes)
    if by_line:
        for line in lines:
            for node in range(nodes):
                fold.feed(node, line)
    else:
        for node in range(nodes):
            fold.feed(node, b"".join(lines))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size, fold


@pytest.mark.parametrize("by_line", [False, True])
def test_equal_output_of_many_nodes_costs_what_one_nodes_does(by_line: bool) -> None:
    lines = [b"line %d of the same output everywhere\n" % n for n in range(100)]
    few, _ = cost(10, lines, by_line=by_line)
    many, fold = cost(2_000, lines, by_line=by_line)
    assert fold.line_count == 100
    assert fold.edge_count <= 101
    assert many - few < 2_000 * 12  # the places of the nodes: two numbers each
    assert len(fold.groups(range(2_000))) == 1


def test_a_first_line_that_differs_does_not_multiply_the_rest() -> None:
    fold = Fold(1_000)
    for node in range(1_000):
        fold.feed(node, b"node %d\n" % node + b"".join(b"line %d\n" % n for n in range(100)))
    assert fold.line_count == 1_100
    assert fold.edge_count <= 1_001


def groups_of(*texts: bytes) -> tuple[Fold, list[Group]]:
    fold = Fold(len(texts))
    for node, text in enumerate(texts):
        fold.feed(node, text)
        fold.close(node)
    return fold, [fold.groups([node])[0] for node in range(len(texts))]


def test_a_diff_is_unified_and_names_both_sides() -> None:
    fold, (left, right) = groups_of(b"a\nb\nc\n", b"a\nx\nc\n")
    assert b"".join(diff(fold, left, right, names=("n[1-9]", "n10"))) == (
        b"--- n[1-9]\n+++ n10\n@@ -1,3 +1,3 @@\n a\n-b\n+x\n c\n"
    )


def test_a_diff_of_binary_output_loses_no_byte() -> None:
    fold, (left, right) = groups_of(b"\xff\n", b"\xfe\x00\n")
    assert diff(fold, left, right, names=("a", "b"))[-2:] == [b"-\xff\n", b"+\xfe\x00\n"]


def test_a_diff_of_huge_outputs_says_where_they_part() -> None:
    text = b"same\n" * (DIFF_LINES_MAX + 1)
    fold, (left, right) = groups_of(text, b"same\n" * 7 + b"other\n" + text)
    lines = diff(fold, left, right, names=("a", "b"))
    assert lines[-1] == b"the outputs differ from line 8 on\n"
