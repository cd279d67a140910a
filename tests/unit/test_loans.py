"""Loans: the last chunks of a tree that is behind come by one that is done."""

from __future__ import annotations

from typing import Any

import pytest

from common.broadcast import chunkset
from common.broadcast.hop import Hop
from common.broadcast.loans import LACK_COUNT_MIN, LEND_COUNT_MAX
from common.broadcast.manifest import Algorithm, Manifest
from common.broadcast.node import Action, HopOptions, Send, SendChunk
from common.broadcast.topology import Kind, Shape, build
from common.broadcast.wire import Accept, Ack, Alive, Attach, Lack, Leave, Lend, Spare, Want
from common.errors import KaError

ID = bytes(16)
STRIPES = build(Shape(Kind.STRIPES, (8,), 2))
"""Tree 0: 1 (2 3), 2 (4 5), 3 (6 7), 4 (8).  Tree 1: 5 (6 7), 6 (8 1), 7 (2 3), 8 (4)."""
CONTROL = 2
COUNT = 16
TREE_0, TREE_1 = 0x5555, 0xAAAA


def node(rank: int, have: int, parents: tuple[int, int], chunk_count: int = COUNT) -> Hop:
    """A node whose parents have everything."""
    sums = bytes(8 * chunk_count)
    manifest = Manifest(ID, "x", chunk_count * 10, 10, Algorithm.XXH3, sums)
    made = Hop(rank, STRIPES, manifest, HopOptions(window_count=8), have=have)
    made.start(0.0)
    for tree, parent in enumerate(parents):
        made.message_received(parent, Accept(ID, tree, 1, chunk_count // 2), 0.0)
    made.message_received(0, Accept(ID, CONTROL, 1, 0), 0.0)
    return made


def borrower() -> Hop:
    """Rank 6, which lacks one chunk of tree 1, and all of tree 0."""
    return node(6, TREE_1 & ~(1 << 15), (3, 5))


def messages(actions: list[Action], kind: type) -> list[tuple[int, list[int]]]:
    """Return to whom such messages go, and of which chunks they tell."""
    sent = [one for one in actions if isinstance(one, Send) and type(one.message) is kind]
    found: list[Any] = [(one.peer, one.message) for one in sent]
    return [(peer, [*chunkset.indexes(chunkset.decode(it.chunks, 1024))]) for peer, it in found]


def acks(actions: list[Action]) -> list[tuple[int, int]]:
    sent = (one for one in actions if isinstance(one, Send) and type(one.message) is Ack)
    return [(one.peer, one.message.chunk) for one in sent]


def test_who_has_all_of_a_tree_says_there_what_it_lacks_and_once() -> None:
    made = borrower()
    actions = made.chunk_received(5, 15, True, 0.1)
    assert messages(actions, Lack) == [(5, [0, 2, 4, 6, 8, 10, 12, 14])]
    assert messages(made.chunk_received(3, 0, True, 0.2), Lack) == []


def test_for_a_few_chunks_nobody_is_asked() -> None:
    made = node(6, (TREE_1 | TREE_0) & ~(1 << 15), (3, 5))
    lacking = [0, 2, 4, 6][: LACK_COUNT_MIN - 1]
    made.node.have &= ~chunkset.from_indexes(lacking)
    assert messages(made.chunk_received(5, 15, True, 0.1), Lack) == []


def test_what_is_lent_the_other_parent_need_not_send_and_the_lender_has_the_ack() -> None:
    made = borrower()
    made.chunk_received(5, 15, True, 0.1)
    lend = Lend(ID, 1, chunkset.encode(1 << 12 | 1 << 14))
    assert messages(made.message_received(5, lend, 0.2), Spare) == [(3, [12, 14])]
    assert not messages(made.chunk_received(5, 14, True, 0.3), Leave)
    assert acks(made.sink_wrote(14, 0.3)) == [(5, 14)]


def test_a_chunk_that_comes_by_both_ways_is_acknowledged_to_both() -> None:
    made = borrower()
    made.chunk_received(5, 15, True, 0.1)
    made.message_received(5, Lend(ID, 1, chunkset.encode(1 << 14)), 0.2)
    made.chunk_received(3, 14, True, 0.3)
    made.chunk_received(5, 14, True, 0.3)
    assert acks(made.sink_wrote(14, 0.4)) == [(3, 14), (5, 14)]
    assert made.duplicate_count == 1
    # and later, when it is in the sink: a loan is remembered
    assert acks(made.chunk_received(5, 14, True, 0.5)) == [(5, 14)]


@pytest.mark.parametrize("how", ["the lender is slow", "another is the parent now"])
def test_a_loan_that_does_not_come_is_asked_for_where_it_belongs(how: str) -> None:
    made = borrower()
    made.chunk_received(5, 15, True, 0.1)
    made.message_received(5, Lend(ID, 1, chunkset.encode(1 << 12 | 1 << 14)), 0.2)
    if how == "another is the parent now":
        made.message_received(5, Leave(ID, 1, 1, "over"), 0.3)
        assert messages(made.tick(0.3), Want) == [(3, [12, 14])]
        return
    made.chunk_received(5, 12, True, 0.5)
    for step in range(6, 21):
        made.bytes_arrived(3, step / 10)  # the other parent goes on
        made.message_received(0, Alive(ID, CONTROL, 8, 2), step / 10)
        made.message_received(5, Alive(ID, 1, 8, 2), step / 10)
        assert messages(made.tick(step / 10), Want) == []
    actions = made.tick(2.05)
    assert messages(actions, Want) == [(3, [14])]
    assert messages(actions, Lack) == []  # it is not asked again
    assert messages(made.tick(2.15), Want) == []


def test_half_of_what_is_lacking_is_lent_the_latest_first_of_what_is_there() -> None:
    made = node(5, 0xFFFF & ~(1 << 14), (2, 0))
    made.message_received(6, Attach(ID, 1, 1, chunkset.encode(TREE_1), 0, 6, 2), 0.0)
    lack = Lack(ID, 1, chunkset.encode(TREE_0))
    actions = made.message_received(6, lack, 0.1)
    assert messages(actions, Lend) == [(6, [6, 8, 10, 12])]
    assert [one.chunk for one in actions if isinstance(one, SendChunk)] == [6, 8, 10, 12]
    assert made.downs[1].has_sent(6, 12)
    made.message_received(6, Ack(ID, 12), 0.2)
    assert not made.downs[1].has_sent(6, 12)


def test_what_is_on_its_way_by_the_same_tree_is_lent_on_and_passed_on_while_it_comes() -> None:
    made = node(5, TREE_1, (2, 0))
    made.message_received(6, Attach(ID, 1, 1, chunkset.encode(TREE_1), 0, 6, 2), 0.0)
    assert messages(made.tick(0.1), Lack) == [(0, [0, 2, 4, 6, 8, 10, 12, 14])]
    made.message_received(0, Lend(ID, 1, chunkset.encode(1 << 14)), 0.1)
    lack = Lack(ID, 1, chunkset.encode(TREE_0))
    assert messages(made.message_received(6, lack, 0.2), Lend) == [(6, [14])]
    assert SendChunk(6, 14) in made.chunk_begins(0, 14, 0.3)


def test_what_a_child_need_not_be_sent_is_not_sent() -> None:
    made = node(3, 0, (1, 7))
    made.message_received(6, Attach(ID, 0, 1, chunkset.encode(0), 0, 6, 0), 0.0)
    made.message_received(6, Spare(ID, 0, chunkset.encode(1 << 12)), 0.1)
    assert SendChunk(6, 12) not in made.chunk_received(1, 12, True, 0.2)
    assert SendChunk(6, 14) in made.chunk_received(1, 14, True, 0.2)
    made.message_received(6, Want(ID, 0, chunkset.encode(1 << 12)), 0.3)
    assert made.downs[0].has_sent(6, 12)


def test_a_loan_that_nobody_asked_for_changes_nothing() -> None:
    made = borrower()
    lend = Lend(ID, 1, chunkset.encode(TREE_0))
    assert messages(made.message_received(5, lend, 0.1), Spare) == []
    made.chunk_received(5, 15, True, 0.2)
    assert messages(made.message_received(5, lend, 0.3), Spare)
    assert messages(made.message_received(5, lend, 0.4), Spare) == []  # nor is it prolonged


def test_of_another_tree_a_child_may_want_only_what_it_was_lent() -> None:
    made = node(5, 0xFFFF, (2, 0))
    made.message_received(6, Attach(ID, 1, 1, chunkset.encode(TREE_1), 0, 6, 2), 0.0)
    made.message_received(6, Lack(ID, 1, chunkset.encode(0b10101)), 0.1)
    again = made.message_received(6, Want(ID, 1, chunkset.encode(TREE_0)), 0.2)
    assert [one.chunk for one in again if isinstance(one, SendChunk)] == [4]


def test_a_loan_is_bounded() -> None:
    made = node(5, (1 << 1024) - 1, (2, 0), 1024)
    made.message_received(6, Attach(ID, 1, 1, chunkset.encode(0), 0, 6, 2), 0.0)
    lack = Lack(ID, 1, chunkset.encode((1 << 1024) - 1))
    ((_peer, lent),) = messages(made.message_received(6, lack, 0.1), Lend)
    assert len(lent) == LEND_COUNT_MAX


def test_a_message_of_no_data_tree_and_chunks_that_do_not_exist_change_nothing() -> None:
    made = borrower()
    everything = chunkset.encode((1 << COUNT) - 1)
    for message in (Lack(ID, CONTROL, everything), Lend(ID, CONTROL, everything)):
        assert messages(made.message_received(0, message, 0.1), Lend) == []
    assert made.loans.ups_of(0) == [made.ups[0]]
    with pytest.raises(KaError):
        made.message_received(5, Lend(ID, 1, chunkset.encode(1 << COUNT)), 0.1)
