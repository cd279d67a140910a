"""Laws of standbys: who takes a place, who has room, and that no circle can form."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.broadcast import chunkset
from common.broadcast.hop import Hop
from common.broadcast.manifest import Algorithm, Manifest
from common.broadcast.node import END, Action, HopOptions, Send
from common.broadcast.standby import places, rest, standbys
from common.broadcast.topology import Kind, Shape, Topology, build
from common.broadcast.wire import Accept, Adopt, Attach, Demote, Leave, Promote, Refuse

ID = bytes(range(16))
NOTHING = chunkset.encode(0)
TREE = build(Shape(Kind.BINARY, (12,)))
STRIPES = build(Shape(Kind.STRIPES, (12,), 2))
OPTIONS = HopOptions(window_count=3)

SHAPES = st.builds(
    Shape,
    st.sampled_from([Kind.CHAIN, Kind.BINARY, Kind.KARY, Kind.STRIPES, Kind.LAMBDA]),
    st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple),
    fanout=st.integers(2, 4),
)


def load(topology: Topology, rank: int) -> int:
    return sum(len(tree.children[rank]) for tree in topology.trees)


# ---------------------------------------------------------------- by the plan


@given(SHAPES, st.data())
def test_a_standby_is_of_the_rack_comes_later_and_is_none_of_those_ruled_out(
    shape: Shape, data: st.DataObject
) -> None:
    topology = build(shape)
    index = data.draw(st.integers(0, len(topology.trees) - 1))
    place = data.draw(st.integers(1, topology.rank_count - 1))
    without = data.draw(st.sets(st.integers(1, topology.rank_count - 1), max_size=3))
    for one in standbys(topology, index, place, without):
        assert topology.rack_of[one] == topology.rack_of[place]
        assert topology.trees[index].positions[one] > topology.trees[index].positions[place]
        assert one not in without


@pytest.mark.parametrize("topology", [TREE, STRIPES, build(Shape(Kind.KARY, (40,), 3))])
def test_the_best_standby_can_feed_whoever_is_planned_there(topology: Topology) -> None:
    for index, tree in enumerate(topology.trees):
        for place in range(1, topology.rank_count):
            if not any(tree.children[child] for child in tree.children[place]):
                continue
            best = standbys(topology, index, place, ())[0]
            elsewhere = load(topology, best) - len(tree.children[best])
            need = sum(child != best for child in tree.children[place])
            assert elsewhere + need <= places(topology, best)


@given(SHAPES, st.data())
def test_who_needs_no_place_is_sent_where_links_have_room_and_not_all_to_one(
    shape: Shape, data: st.DataObject
) -> None:
    topology = build(shape)
    index = data.draw(st.integers(0, len(topology.trees) - 1))
    guests: Counter[int] = Counter()
    free = sum(
        load(topology, one) < places(topology, one) for one in range(2, topology.rank_count)
        if topology.rack_of[one] == topology.rack_of[1]
    )  # fmt: skip
    found = [rest(topology, index, 1, (), guests) for _ in range(free)]
    assert len(set(found)) == len(found)
    assert all(load(topology, one) < places(topology, one) for one in found)
    assert 1 not in found


# ---------------------------------------------------------------- hop by hop


def hop(rank: int, topology: Topology = TREE) -> Hop:
    made = Hop(rank, topology, Manifest(ID, "x", 80, 10, Algorithm.XXH3, bytes(64)), OPTIONS)
    made.start(0.0)
    return made


def attach(rank: int, place: int | None = None, *, attempt: int = 1, feeds: int = 0) -> Attach:
    return Attach(ID, 0, attempt, NOTHING, 0, rank if place is None else place, feeds)


def source() -> Hop:
    """The root of a binary tree that feeds 1 and 2."""
    made = hop(0)
    for rank in (1, 2):
        made.message_received(rank, attach(rank, feeds=2), 0.0)
    return made


def said(actions: list[Action], kind: type) -> list[tuple[int, Any]]:
    sent = [one for one in actions if isinstance(one, Send)]
    return [(one.peer, one.message) for one in sent if isinstance(one.message, kind)]


def test_a_leaf_takes_the_place_of_a_lost_relay_and_the_orphans_are_referred_to_it() -> None:
    made = source()
    actions = made.neighbour_lost(1, "reset", 0.1)
    ((standby, promote),) = said(actions, Promote)
    assert (standby, promote.place) == (12, 1)
    assert [peer for peer, _ in said(actions, Adopt)] == [3, 4]
    waits = made.message_received(3, attach(3, attempt=2, feeds=2), 0.1)
    assert said(waits, Refuse) == said(waits, Accept) == []
    actions = made.message_received(12, attach(12, 1), 0.1)
    assert [peer for peer, _ in said(actions, Accept)] == [12]
    assert said(actions, Refuse) == [
        (3, Refuse(ID, 0, 2, 12, 1, "another took its parent's place"))
    ]
    assert set(made.downs[0].children) == {2, 12}
    late = made.message_received(4, attach(4, attempt=2, feeds=2), 0.2)
    assert [(peer, one.instead) for peer, one in said(late, Refuse)] == [(4, 12)]


def test_orphans_that_were_taken_in_before_their_standby_came_move_on_to_it() -> None:
    made = hop(0)
    made.message_received(2, attach(2, feeds=2), 0.0)
    made.message_received(3, attach(3, attempt=2, feeds=2), 0.4)  # in the place of 1, so far
    actions = made.message_received(4, attach(4, attempt=2, feeds=2), 0.4)
    assert [peer for peer, _ in said(actions, Promote)] == [12]
    actions = made.message_received(12, attach(12, 1), 0.4)
    assert {(peer, one.instead) for peer, one in said(actions, Refuse)} == {(3, 12), (4, 12)}
    assert set(made.downs[0].children) == {2, 12}


def test_when_no_standby_comes_the_orphans_are_fed_by_their_grandparent() -> None:
    made = source()
    made.neighbour_lost(1, "reset", 0.1)
    for rank in (3, 4):
        made.message_received(rank, attach(rank, attempt=2, feeds=2), 0.1)
    found: list[Action] = []
    for tenth in range(2, 7):
        found += made.tick(tenth / 10)
    assert {peer for peer, _ in said(found, Accept)} == {3, 4}


def test_who_declines_a_place_is_not_waited_for() -> None:
    made = source()
    made.neighbour_lost(1, "reset", 0.1)
    asked = [12]
    while True:
        actions = made.message_received(asked[-1], Leave(ID, 0, 0, "has a place"), 0.1)
        if not said(actions, Promote):
            break
        asked += [peer for peer, _ in said(actions, Promote)]
    assert len(asked) == len(set(asked)) == 3
    assert said(made.message_received(3, attach(3, attempt=2), 0.1), Accept)


def test_a_relay_that_was_slow_and_is_lost_then_is_not_replaced_twice() -> None:
    made = source()
    made.neighbour_lost(1, "reset", 0.1)
    made.message_received(12, attach(12, 1), 0.1)
    made.message_received(1, attach(1, attempt=2), 0.2)
    assert said(made.neighbour_lost(1, "reset", 0.3), Promote) == []


def test_a_node_takes_one_place_nearer_to_the_source_and_asks_who_offered_it() -> None:
    made = hop(12)
    made.message_received(5, Accept(ID, 0, 1, 0), 0.0)
    actions = made.message_received(0, Promote(ID, 0, 1, "slow"), 0.1)
    assert [peer for peer, _ in said(actions, Leave)] == [5]
    ((peer, asked),) = said(actions, Attach)
    assert (peer, asked.place) == (0, 1)
    assert said(made.message_received(0, Promote(ID, 0, 2, "slow"), 0.2), Leave)


@pytest.mark.parametrize("place", [END, 0, 12])
def test_a_place_that_is_not_nearer_to_the_source_is_declined(place: int) -> None:
    made = hop(11)
    actions = made.message_received(5, Promote(ID, 0, place, ""), 0.1)
    assert said(actions, Leave)
    assert said(actions, Attach) == []


def test_in_its_new_place_a_standby_feeds_who_comes_before_its_own_one() -> None:
    made = hop(12)
    assert said(made.message_received(3, attach(3, attempt=2), 0.1), Refuse)
    made.message_received(0, Promote(ID, 0, 1, "slow"), 0.1)
    assert said(made.message_received(3, attach(3, attempt=3), 0.2), Accept)
    assert said(made.message_received(1, attach(1, attempt=2), 0.2), Refuse)


def test_a_standby_gives_away_whom_it_could_not_feed_as_well() -> None:
    made = hop(6, STRIPES)  # feeds one child in the first tree, and may feed two
    made.message_received(12, attach(12), 0.0)
    actions = made.message_received(0, Promote(ID, 0, 1, "slow"), 0.1)
    assert [peer for peer, _ in said(actions, Refuse)] == [12]
    assert made.downs[0].children == {}


def test_a_slow_relay_goes_to_the_end_and_feeds_nobody() -> None:
    made = hop(1)
    made.message_received(0, Accept(ID, 0, 1, 0), 0.0)
    actions = made.message_received(0, Demote(ID, 0, 11, "slow"), 0.1)
    ((peer, asked),) = said(actions, Attach)
    assert (peer, asked.place) == (11, END)
    assert said(made.message_received(3, attach(3, attempt=2), 0.2), Refuse)
    assert said(made.message_received(0, Promote(ID, 0, 2, ""), 0.3), Leave)


def test_anybody_feeds_who_is_at_the_end_but_those_who_are_there_too() -> None:
    leaf = hop(12)
    assert said(leaf.message_received(1, attach(1, END, attempt=2), 0.1), Accept)
    other = hop(1)
    other.message_received(0, Accept(ID, 0, 1, 0), 0.0)
    other.message_received(0, Demote(ID, 0, 11, "slow"), 0.1)
    assert said(other.message_received(2, attach(2, END, attempt=2), 0.2), Refuse)


def test_a_node_with_children_is_not_sent_to_the_end() -> None:
    made = hop(1)
    made.message_received(3, attach(3), 0.0)
    actions = made.message_received(0, Refuse(ID, 0, 1, 12, 12, "full"), 0.1)
    assert 12 not in [peer for peer, _ in said(actions, Attach)]


def test_a_node_that_comes_back_is_fed_where_there_is_room() -> None:
    made = source()
    made.neighbour_lost(1, "reset", 0.1)
    made.message_received(12, attach(12, 1), 0.1)
    ((_, refusal),) = said(made.message_received(1, attach(1, attempt=1000), 1.0), Refuse)
    assert refusal.instead == refusal.place == 11
