"""Balance: which of the source's trees waits for another."""

from __future__ import annotations

import pytest

from common.broadcast.balance import LEAD_COUNT_MAX, PATIENCE_S, Balance


class Tree:
    def __init__(self, lacking_count: int, acked_s: float) -> None:
        self._lacking_count = lacking_count
        self.acked_s = acked_s
        self.pumped_s = -1.0

    def lacking_count(self) -> int:
        return self._lacking_count

    def pump(self, now: float) -> None:
        self.pumped_s = now


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
    ahead, behind = Tree(10, 5.0), Tree(10 + lead, 5.0 - silent_s)
    balance = Balance([ahead, behind])
    assert balance.holds(ahead, 5.0) is waits
    assert not balance.holds(behind, 5.0)


def test_an_ack_in_one_tree_lets_the_others_go_on() -> None:
    trees = [Tree(10, 5.0), Tree(20, 5.0)]
    Balance(trees).pump(6.0)
    assert [tree.pumped_s for tree in trees] == [6.0, 6.0]
