"""Balance: which of the source's trees waits for another."""

from __future__ import annotations

import pytest

from common.broadcast.balance import LEAD_COUNT_MAX, PATIENCE_S, Balance


class Tree:
    def __init__(self, unsent_count: int, acked_s: float = 5.0) -> None:
        self.unsent = unsent_count
        self.acked_s = acked_s
        self.acked_count = 0
        self.settled_s = 0.0
        self.pumped_s = -1.0

    def unsent_count(self) -> int:
        return self.unsent

    def pump(self, now: float) -> None:
        self.pumped_s = now


def while_a_relay_is_replaced(now: float) -> tuple[Tree, Tree, Balance]:
    """Return a tree, one 20 chunks behind it that gets a new relay until 5.5, and their balance."""
    ahead, behind = Tree(100), Tree(120)
    behind.settled_s = 5.5
    balance = Balance([ahead, behind], 0.0)
    assert not balance.holds(ahead, now)
    return ahead, behind, balance


@pytest.mark.parametrize(
    ("lead", "silent_s", "waits"),
    [
        (LEAD_COUNT_MAX, 0.0, False),
        (LEAD_COUNT_MAX + 1, 0.0, True),
        (LEAD_COUNT_MAX + 1, 2 * PATIENCE_S, False),
    ],
    ids=["a little ahead", "too far ahead", "of one that stands still"],
)
def test_who_is_ahead_waits_for_who_moves(lead: int, silent_s: float, waits: bool) -> None:
    ahead, behind = Tree(10), Tree(10 + lead, 5.0 - silent_s)
    balance = Balance([ahead, behind], 0.0)
    assert balance.holds(ahead, 5.0) is waits
    assert not balance.holds(behind, 5.0)


def test_beside_one_that_stands_still_a_tree_goes_on_as_fast_as_before_and_no_faster() -> None:
    ahead, behind = Tree(100), Tree(100, acked_s=4.0)
    ahead.acked_count = 100  # in 5 s: 20 a second
    balance = Balance([ahead, behind], 0.0)
    assert not balance.holds(ahead, 5.0)
    ahead.unsent -= LEAD_COUNT_MAX + 10
    assert balance.holds(ahead, 5.4)
    assert not balance.holds(ahead, 5.6)


def test_a_lead_won_while_a_relay_was_replaced_is_kept_and_neither_won_again_nor_lost() -> None:
    ahead, behind, balance = while_a_relay_is_replaced(5.4)
    behind.acked_s = ahead.acked_s = 6.0
    assert not balance.holds(ahead, 6.0)
    behind.unsent = 120 + LEAD_COUNT_MAX + 1
    assert balance.holds(ahead, 6.0)
    assert not balance.holds(behind, 6.0)
    behind.unsent = 120 - LEAD_COUNT_MAX
    assert not balance.holds(behind, 6.0)
    behind.unsent -= 1  # it was given more of the link
    assert balance.holds(behind, 6.0)
    assert not balance.holds(ahead, 6.0)


def test_a_new_relay_is_not_given_what_the_others_need_to_keep_their_lead() -> None:
    ahead, behind, balance = while_a_relay_is_replaced(5.1)
    behind.unsent = 120 - LEAD_COUNT_MAX
    assert not balance.holds(ahead, 5.1)
    assert not balance.holds(behind, 5.1)
    behind.unsent -= 1
    assert not balance.holds(ahead, 5.1)
    assert balance.holds(behind, 5.1)


def test_who_is_behind_does_not_wait_for_who_is_done() -> None:
    ahead, behind, balance = while_a_relay_is_replaced(5.4)
    behind.acked_s = ahead.acked_s = 6.0
    ahead.unsent, behind.unsent = 0, 10
    assert not balance.holds(behind, 6.0)


def test_an_ack_in_one_tree_lets_the_others_go_on() -> None:
    trees = [Tree(10), Tree(20)]
    Balance(trees, 0.0).pump(6.0)
    assert [tree.pumped_s for tree in trees] == [6.0, 6.0]
