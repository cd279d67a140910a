"""A hop during a multicast pass: it is there, it is fed by nobody, and afterwards lacks nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest

from common.broadcast import chunkset
from common.broadcast.hop import Hop
from common.broadcast.manifest import Algorithm, Manifest
from common.broadcast.node import Action, HopOptions, Send, SendChunk, WriteChunk
from common.broadcast.outcome import Ledger
from common.broadcast.scenario import Scenario, draw
from common.broadcast.simulator import Simulation
from common.broadcast.topology import SOURCE, Kind, Shape, build
from common.broadcast.wire import Accept, Ack, Adopt, Alive, Attach, Finish, PassOver, Report
from common.errors import KaError

ID = bytes(range(16))
CHUNKS = 8
SHAPE = build(Shape(Kind.MULTICAST, (40,)))
DATA, CONTROL = 0, 1
NOTHING = chunkset.encode(0)
MANIFEST = Manifest(ID, "x", CHUNKS * 10, 10, Algorithm.XXH3, bytes(8 * CHUNKS))


def hop(rank: int, **more: Any) -> tuple[Hop, list[Action]]:
    made = Hop(rank, SHAPE, MANIFEST, HopOptions(), passing=True, **more)
    return made, made.start(0.0)


def said(actions: list[Action], kind: type) -> list[tuple[int, Any]]:
    sent = [one for one in actions if isinstance(one, Send) and isinstance(one.message, kind)]
    return [(one.peer, one.message) for one in sent]


def attach(tree: int, peer: int) -> Attach:
    return Attach(ID, tree, 1, NOTHING, 0, peer, 0)


def relay() -> Hop:
    """Rank 2 with its control parent, a node that chains to it, and one that reports to it."""
    made, _ = hop(2)
    made.message_received(SOURCE, Accept(ID, CONTROL, 1, 0), 0.0)
    made.message_received(33, attach(CONTROL, 33), 0.0)
    return made


def test_during_the_pass_a_node_has_a_control_parent_only() -> None:
    made, actions = hop(3, have=0b101)
    assert [(peer, one.tree) for peer, one in said(actions, Attach)] == [(SOURCE, CONTROL)]
    for tick in range(1, 50):
        actions = made.tick(tick / 10)
        assert all(one.tree == CONTROL for _, one in said(actions, Attach))


def test_what_a_node_lacks_goes_up_with_its_word_that_it_listens() -> None:
    made, _ = hop(3, have=0b101)
    made.message_received(SOURCE, Accept(ID, CONTROL, 1, 0), 0.0)
    ((peer, report),) = said(made.tick(0.1), Report)
    ledger = Ledger(40, CHUNKS)
    ledger.merge(report)
    assert (peer, ledger.ready, ledger.lacking) == (SOURCE, 1 << 3, 0b11111010)


@pytest.mark.parametrize(
    "fields", [(b"\x01\xff\xff\xff\xff\xff\xff", NOTHING), (NOTHING, b"\x01\xff\xff")]
)
def test_a_report_of_nodes_or_chunks_that_do_not_exist_is_refused(
    fields: tuple[bytes, bytes],
) -> None:
    with pytest.raises(KaError):
        Ledger(40, CHUNKS).merge(Report(ID, NOTHING, NOTHING, [], [], *fields))


def test_when_the_pass_is_over_control_children_are_told_and_the_rest_is_asked_for() -> None:
    made = relay()
    heard = made.chunk_heard(4, 1.0)
    assert heard == [WriteChunk(4)]
    actions = made.message_received(SOURCE, PassOver(ID), 2.0)
    assert said(actions, PassOver) == [(33, PassOver(ID))]
    ((peer, attach),) = said(actions, Attach)
    assert (peer, attach.tree, attach.have) == (1, DATA, chunkset.encode(1 << 4))
    assert made.node.ledger.summary().notes == {2: "multicast did not bring 88 % of the data"}


def test_who_reports_to_a_node_later_is_told_at_once() -> None:
    made = relay()
    made.pass_over(2.0)
    actions = made.message_received(34, attach(CONTROL, 34), 3.0)
    assert said(actions, PassOver) == [(34, PassOver(ID))]


def test_nobody_but_the_control_parent_can_end_the_pass() -> None:
    made = relay()
    made.message_received(33, PassOver(ID), 1.0)
    assert made.passing.is_on


def test_a_child_whose_pass_is_over_first_is_fed_what_there_is() -> None:
    made = relay()
    made.chunk_heard(4, 1.0)
    made.sink_wrote(4, 1.0)
    actions = made.message_received(3, attach(DATA, 3), 1.0)
    assert SendChunk(3, 4) in actions
    made.message_received(3, Ack(ID, 4), 1.0)
    made.pass_over(1.1)
    for tick in range(12, 40):
        made.message_received(3, Alive(ID, DATA, 1, 0), tick / 10)
        offers = said(made.tick(tick / 10), Adopt)
        assert all(one.tree == CONTROL for _, one in offers)  # its children have not lost it
    assert made.downs[DATA].children.keys() == {3}


def test_a_chunk_that_comes_both_ways_is_acknowledged_to_who_sent_it() -> None:
    made = relay()
    made.pass_over(1.0)
    made.message_received(1, Accept(ID, DATA, 2, 0), 1.0)
    made.message_received(1, Accept(ID, DATA, 1, 0), 1.0)
    made.chunk_heard(4, 1.1)
    assert not said(made.chunk_received(1, 4, True, 1.2), Ack)
    assert said(made.sink_wrote(4, 1.3), Ack) == [(1, Ack(ID, 4))]


def test_a_chunk_that_is_heard_twice_or_after_the_end_is_dropped() -> None:
    made = relay()
    assert made.chunk_heard(4, 1.0) == [WriteChunk(4)]
    assert made.chunk_heard(4, 1.0) == []
    made.message_received(SOURCE, Finish(ID), 1.0)
    assert made.chunk_heard(5, 1.0) == []


# ---------------------------------------------------------------- many hops, with faults


class Passing(Simulation):
    """Every node hears a share of the chunks until the pass is over; half of them hear the end."""

    def __init__(self, scenario: Scenario, rng: random.Random) -> None:
        super().__init__(scenario, rng)
        self.heard_count = 0
        over_s = rng.uniform(0.2, 2.0)
        self._at(over_s, self._end, SOURCE, 0)
        for rank, machine in enumerate(self._machines):
            machine.hop = Hop(rank, self._topology, self._manifest, scenario.options, passing=True)
            if rank != SOURCE:
                self._let_hear(rank, rng.choice([0.0, 0.5, 0.99, 1.0]), over_s, rng)

    def _let_hear(self, rank: int, share: float, over_s: float, rng: random.Random) -> None:
        for chunk in range(self.scenario.chunk_count):
            if rng.random() < share:
                self._at(rng.uniform(0.1, over_s), self._hear, rank, chunk)
        if rng.random() < 0.5:
            self._at(over_s + 0.001, self._end, rank, 0)

    def _hear(self, rank: int, chunk: int) -> None:
        machine = self._machines[rank]
        if machine.alive and not machine.paused and machine.hop.passing.is_on:
            self.heard_count += not machine.hop.node.have >> chunk & 1
            self._on(rank, machine.life, lambda hop: hop.chunk_heard(chunk, self.now))

    def _end(self, rank: int, life: int) -> None:
        self._on(rank, life, lambda hop: hop.pass_over(self.now))


@pytest.mark.parametrize("seed", range(12))
def test_with_random_faults_in_and_after_a_pass_all_healthy_nodes_finish(seed: int) -> None:
    rng = random.Random(seed)
    scenario = draw(rng, receiver_count=30, chunk_count=24, kind=Kind.MULTICAST)
    print(f"seed {seed}: {scenario}")
    Passing(scenario, rng).run()


def test_what_was_heard_does_not_travel_again() -> None:
    scenario = Scenario(Shape(Kind.MULTICAST, (30,)), 64, 1 << 16)
    for seed in range(5):
        simulation = Passing(scenario, random.Random(seed))
        found = simulation.run()
        assert found.summary.exit_code == 0
        assert found.chunks_sent == 30 * 64 - simulation.heard_count
