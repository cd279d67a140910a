"""Laws of topologies: everyone exactly once, no cycles, full links, optimal lambda trees."""

from __future__ import annotations

import functools
import heapq

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.broadcast.topology import SOURCE, Kind, Shape, Topology, Tree, build, rack_order
from common.errors import KaError

RACKS = st.lists(st.integers(1, 12), min_size=1, max_size=6).map(tuple)
SHAPES = st.builds(
    lambda kind, racks, own, fanout, gap, more: Shape(
        kind, (0, *racks) if own else racks, fanout, gap, gap + more
    ),
    st.sampled_from(Kind),
    RACKS,
    st.booleans(),
    st.integers(1, 6),
    st.integers(1, 20),
    st.integers(0, 300),
)


def racks_of(topology: Topology) -> list[int]:
    return [0] + [rack for rack, size in enumerate(topology.shape.racks) for _ in range(size)]


def crossings(topology: Topology, tree: Tree) -> list[int]:
    """The rack entered by each edge between racks."""
    rack = racks_of(topology)
    return [
        rack[rank]
        for rank, parent in enumerate(tree.parents)
        if parent >= 0 and rack[rank] != rack[parent]
    ]


@given(SHAPES)
def test_every_rank_is_reached_once_and_never_from_itself(shape: Shape) -> None:
    topology = build(shape)
    for tree in (*topology.trees, topology.control):
        fed = sorted(child for children in tree.children for child in children)
        assert fed == list(range(1, topology.rank_count))
        for rank in fed:
            assert rank in tree.children[tree.parents[rank]]
            assert list(tree.ancestors(rank))[-1] == SOURCE
            assert tree.depths[rank] == len(list(tree.ancestors(rank)))


@given(SHAPES)
def test_a_parent_has_a_lower_position_than_its_children(shape: Shape) -> None:
    for tree in build(shape).trees:
        assert sorted(tree.positions) == list(range(len(tree.parents)))
        assert tree.positions[SOURCE] == 0
        for rank in range(1, len(tree.parents)):
            assert tree.positions[tree.parents[rank]] < tree.positions[rank]


@given(SHAPES)
def test_each_tree_enters_each_rack_once(shape: Shape) -> None:
    topology = build(shape)
    small = min(size for size in topology.shape.racks if size)
    if shape.kind is Kind.FLAT or (shape.kind is Kind.STRIPES and small < shape.fanout):
        return  # flat knows no racks; racks too small to relay every stripe are joined
    for tree in topology.trees:
        entered = crossings(topology, tree)
        assert len(entered) == len(set(entered)) == len(set(racks_of(topology))) - 1


@given(RACKS, st.integers(1, 6))
def test_with_stripes_no_receiver_sends_more_than_it_receives(
    racks: tuple[int, ...], stripe_count: int
) -> None:
    topology = build(Shape(Kind.STRIPES, racks, stripe_count))
    count = len(topology.trees)
    assert count == min(stripe_count, sum(racks))
    for rank in range(topology.rank_count):
        assert sum(len(tree.children[rank]) for tree in topology.trees) <= count
    assert all(len(tree.children[SOURCE]) == 1 for tree in topology.trees)


@given(st.integers(1, 200), st.integers(1, 6))
def test_stripes_are_interior_disjoint_but_for_spares_that_feed_leaves(
    receivers: int, stripe_count: int
) -> None:
    topology = build(Shape(Kind.STRIPES, (receivers,), stripe_count))
    spare_count = 0
    for rank in range(1, topology.rank_count):
        relaying = [tree for tree in topology.trees if tree.children[rank]]
        if len(relaying) > 1:
            spare_count += 1
            assert not any(tree.children[c] for tree in relaying for c in tree.children[rank])
    assert spare_count < max(2, len(topology.trees))
    if stripe_count == 2:
        assert spare_count == 0


@given(st.integers(2, 2000))
def test_two_stripes_stay_shallow(receivers: int) -> None:
    topology = build(Shape(Kind.STRIPES, (receivers,), 2))
    assert max(tree.depth for tree in topology.trees) <= receivers.bit_length() + 1


@given(st.integers(1, 300))
def test_binomial_needs_as_many_rounds_as_the_count_has_bits(receivers: int) -> None:
    tree = build(Shape(Kind.BINOMIAL, (receivers,))).trees[0]
    informed = {SOURCE: 0}
    for rank in sorted(range(receivers + 1), key=lambda one: tree.positions[one]):
        for turn, child in enumerate(tree.children[rank]):
            informed[child] = informed[rank] + turn + 1
    # A relay's turns begin when it is informed, so rounds are the sum of turns.
    assert max(informed.values()) == receivers.bit_length()


def test_the_control_tree_is_shallow_whatever_the_data_do() -> None:
    assert build(Shape(Kind.CHAIN, (10_000,))).control.depth == 4


def test_k_ary_trees_have_logarithmic_depth() -> None:
    assert build(Shape(Kind.BINARY, (1022,))).trees[0].depth == 9
    assert build(Shape(Kind.KARY, (4 + 16 + 64,), 4)).trees[0].depth == 3


def postal_time(tree: Tree, gap: int, ready: int) -> int:
    """When the last rank can call, everyone calling its children one after the other."""
    last = 0
    waiting = [(0, SOURCE)]
    while waiting:
        now, rank = heapq.heappop(waiting)
        last = max(last, now)
        for turn, child in enumerate(tree.children[rank]):
            heapq.heappush(waiting, (now + turn * gap + ready, child))
    return last


@functools.cache
def best_postal_time(receivers: int, gap: int, ready: int) -> int:
    """Try every tree: a first child, how many are behind it, and the rest."""
    if receivers == 0:
        return 0
    return min(
        max(
            ready + best_postal_time(behind, gap, ready),
            gap + best_postal_time(receivers - 1 - behind, gap, ready)
            if receivers - 1 - behind
            else 0,
        )
        for behind in range(receivers)
    )


@settings(deadline=None)
@given(st.integers(1, 24), st.integers(1, 5), st.integers(0, 40))
def test_lambda_trees_are_as_quick_as_the_best_of_all_trees(
    receivers: int, gap: int, more: int
) -> None:
    shape = Shape(Kind.LAMBDA, (receivers,), gap_us=gap, ready_us=gap + more)
    found = postal_time(build(shape).trees[0], gap, gap + more)
    assert found == best_postal_time(receivers, gap, gap + more)


def test_lambda_is_binomial_at_one_end_and_flat_at_the_other() -> None:
    binomial = build(Shape(Kind.LAMBDA, (63,), gap_us=1, ready_us=1)).trees[0]
    assert postal_time(binomial, 1, 1) == 6
    flat = build(Shape(Kind.LAMBDA, (63,), gap_us=1, ready_us=1000)).trees[0]
    assert flat.depth == 1


@given(SHAPES, st.data())
def test_a_foster_parent_lives_and_comes_earlier(shape: Shape, data: st.DataObject) -> None:
    topology = build(shape)
    lost = data.draw(st.sets(st.integers(1, topology.rank_count - 1)))
    for tree in topology.trees:
        fed = set()
        for rank in set(range(topology.rank_count)) - lost:
            successors = tree.successors(rank, lost)
            assert not lost & set(successors)
            for one in successors:
                assert tree.foster(one, lost) == rank
                assert tree.positions[rank] < tree.positions[one]
            fed |= set(successors)
        assert fed == set(range(1, topology.rank_count)) - lost


def test_chain_reparents_past_two_dead_neighbours() -> None:
    tree = build(Shape(Kind.CHAIN, (6,))).trees[0]
    assert tree.foster(4, {2, 3}) == 1
    assert tree.successors(1, {2, 3}) == [4]


def test_nodes_are_ordered_rack_by_rack_and_keep_their_order_within() -> None:
    assert rack_order(["b", "a", "b", "c", "a"]) == [0, 2, 1, 4, 3]


@pytest.mark.parametrize(
    ("racks", "fanout", "gap", "ready"),
    [((), 2, 1, 1), ((0,), 2, 1, 1), ((3, 0), 2, 1, 1), ((3, -1), 2, 1, 1), ((3,), 0, 1, 1),
     ((3,), 65, 1, 1), ((3,), 2, 0, 1), ((3,), 2, 2, 1)],
)  # fmt: skip
def test_an_impossible_shape_is_refused(
    racks: tuple[int, ...], fanout: int, gap: int, ready: int
) -> None:
    with pytest.raises(KaError):
        Shape(Kind.CHAIN, racks, fanout, gap, ready)
