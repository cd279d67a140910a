"""Member and Roster against each other, over a way that loses, repeats and breaks.

The law: whatever happens to the way, every order is obeyed once and in turn, and every event
counts once and in turn.
"""

from __future__ import annotations

import random
from collections.abc import Collection

from hypothesis import given
from hypothesis import strategies as st

from karun.agent import frames
from karun.agent.member import WINDOW_SIZE, Member
from karun.roster import Roster, State

Way = list[tuple[str, bytes]]


class World:
    """One node of two, the head, and what is under way between them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.roster = Roster(2)
        self.member = Member(0, b"incarn01")
        self.down: Way = []
        self.up: Way = [("attach", self.member.attach(frames.HEAD, b""))]
        self.ordered: list[int] = []
        self.obeyed: list[int] = []
        self.heard: list[int] = []
        self.told = 0

    def order(self, ranks: Collection[int] | None = None) -> None:
        number, payload = self.roster.order(frames.COMMAND, "x", ranks=ranks)
        self.ordered.append(number)
        # One to a node alone goes where its way led last; that may be another way by now.
        if ranks is None or self.rng.random() < 0.9:
            self.down.append(("order", payload))

    def order_it(self) -> None:
        self.order([0])

    def order_the_other(self) -> None:
        self.roster.order(frames.COMMAND, "x", ranks=[1])

    def tell(self) -> None:
        self.told += 1
        payload = self.member.event(frames.OUTPUT, 1, 1, b"%d" % self.told)
        if payload is not None:
            self.up.append(("event", payload))

    def breaks(self) -> None:
        """The way breaks: what is on it is lost but for a part of it, and another one is found."""
        del self.down[self.rng.randint(0, len(self.down)) :]
        del self.up[self.rng.randint(0, len(self.up)) :]
        self.up.append(("attach", self.member.attach(frames.HEAD, b"")))

    def repeats(self) -> None:
        for way in (self.up, self.down):
            if way:
                way.append(self.rng.choice(way))

    def deliver_down(self) -> None:
        if self.down:
            kind, payload = self.down.pop(0)
            if kind == "order":
                order = self.member.order(payload)
                if order:
                    self.obeyed.append(order[0])
            elif kind == "welcome":
                self.up += [("event", event) for event in self.member.welcome(payload)]
            else:
                self.member.ack(frames.number(frames.unpack(payload)[0]))

    def deliver_up(self) -> None:
        if self.up:
            kind, payload = self.up.pop(0)
            if kind == "attach":
                welcome, answer, orders = self.roster.attach(0, payload)
                assert welcome
                self.down += [("welcome", answer), *(("order", order) for order in orders)]
                return
            event = self.roster.event(0, payload)
            if event:
                self.heard.append(int(event[1][2]))
                ack = self.roster.ack_due(0)
                if ack:
                    self.down.append(("ack", ack))


STEPS = (
    "order", "order_it", "order_the_other", "tell", "breaks", "repeats",
    *("deliver_down", "deliver_up") * 3,
)  # fmt: skip


@given(st.lists(st.sampled_from(STEPS), max_size=120), st.integers(0, 2**32))
def test_orders_and_events_count_once_and_in_turn(steps: list[str], seed: int) -> None:
    world = World(seed)
    for step in steps:
        getattr(world, step)()
    world.breaks()
    while world.up or world.down:
        world.deliver_up()
        world.deliver_down()
    assert world.obeyed == world.ordered
    assert world.heard == list(range(1, world.told + 1))


def test_what_is_not_acknowledged_fills_the_window_and_an_ack_empties_it() -> None:
    member = Member(0, b"i")
    while not member.full:
        member.event(frames.OUTPUT, 1, 1, bytes(64 << 10))
    member.ack(100)
    assert not member.full
    assert WINDOW_SIZE >= 4 * (64 << 10)


def test_empty_events_fill_the_window_too() -> None:
    member = Member(0, b"i")
    for _ in range(WINDOW_SIZE // 64):
        member.event(frames.OUTPUT, 1, 1, b"")
    assert member.full


def test_a_second_incarnation_is_refused_and_obeys_nothing() -> None:
    roster = Roster(1)
    first, second = Member(0, b"first"), Member(0, b"second")
    assert roster.attach(0, first.attach(frames.HEAD, b""))[0]
    welcome, answer, orders = roster.attach(0, second.attach(frames.HEAD, b""))
    assert (welcome, orders) == (False, [])
    assert second.refused(answer)
    assert not first.refused(answer)
    _number, order = roster.order(frames.COMMAND)
    assert second.order(order) is None


def test_a_node_that_was_given_up_is_refused() -> None:
    roster = Roster(1)
    member = Member(0, b"i")
    roster.attach(0, member.attach(frames.HEAD, b""))
    roster.fail(0)
    assert not roster.attach(0, member.attach(frames.HEAD, b""))[0]


def attach(roster: Roster, rank: int, parent: int) -> None:
    roster.attach(rank, Member(rank, b"%d" % rank).attach(parent, b""))


def test_with_a_relay_all_below_it_lose_their_way() -> None:
    roster = Roster(5)
    for rank, parent in enumerate([frames.HEAD, 0, 1, 1, frames.HEAD]):
        attach(roster, rank, parent)
    assert sorted(roster.lost(1, 0, 1)) == [1, 2, 3]
    assert list(roster.in_state(State.DETACHED)) == [1, 2, 3]


def test_a_child_that_has_another_parent_by_now_is_not_lost() -> None:
    roster = Roster(3)
    for rank, parent in enumerate([frames.HEAD, 0, 1]):
        attach(roster, rank, parent)
    attach(roster, 2, 0)
    assert roster.lost(2, 1, 1) == []
    assert roster.lost(1, 0, 1) == [1]


def test_a_child_that_is_missed_by_its_parent_after_it_came_back_to_it_is_not_lost() -> None:
    roster = Roster(2)
    attach(roster, 0, frames.HEAD)
    child = Member(1, b"1")
    for _ in range(2):
        roster.attach(1, child.attach(0, b""))
    assert roster.lost(1, 0, 1) == []
    assert roster.lost(1, 0, 2) == [1]


def test_orders_that_all_have_obeyed_are_forgotten() -> None:
    roster = Roster(1)
    member = Member(0, b"i")
    member.welcome(roster.attach(0, member.attach(frames.HEAD, b""))[1])
    for number in range(500):
        order = member.order(roster.order(frames.COMMAND, bytes(1000))[1])
        assert order is not None
        event = member.event(frames.EXITED, number, 0, 0)
        assert event is not None
        roster.event(0, event)
    assert len(roster._log) < 130


def test_orders_to_others_are_neither_sent_to_a_node_nor_kept_for_it() -> None:
    roster = Roster(2)
    idle, busy = Member(0, b"idle"), Member(1, b"busy")
    for member in idle, busy:
        member.welcome(roster.attach(member.rank, member.attach(frames.HEAD, b""))[1])
    for number in range(500):
        order = busy.order(roster.order(frames.COMMAND, bytes(1000), ranks=[1])[1])
        assert order is not None
        event = busy.event(frames.EXITED, number, 0, 0)
        assert event is not None
        roster.event(1, event)
    assert len(roster._log) < 130
    _number, to_all = roster.order(frames.COMMAND)
    assert roster.attach(0, idle.attach(frames.HEAD, b""))[2] == [to_all]


def test_what_is_ordered_of_a_node_alone_is_kept_until_it_has_obeyed() -> None:
    roster = Roster(2)
    away = Member(0, b"away")
    roster.attach(0, away.attach(frames.HEAD, b""))
    own = roster.order(frames.COMMAND, ranks=[0])[1]
    for _ in range(200):
        roster.order(frames.COMMAND, ranks=[1])
    roster.fail(1)
    assert roster.attach(0, away.attach(frames.HEAD, b""))[2] == [own]
