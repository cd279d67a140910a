"""Broadcasts in simulation: everyone healthy gets every byte, whatever happens to the others.

Each run checks safety and liveness itself (`common.broadcast.simulator`).  One seed of the day is
random: it is printed, with its scenario, when it fails.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.broadcast.cost import Network, predict
from common.broadcast.hop import Hop
from common.broadcast.node import HopOptions
from common.broadcast.outcome import Verdict
from common.broadcast.pace import Paces
from common.broadcast.scenario import Fault, FaultKind, Scenario
from common.broadcast.simulator import Breach, Outcome
from common.broadcast.topology import Kind, Shape, build
from tests.support.simulate import play, run_seed, trace_of

RATE = 25e6
"""200 Mbit/s."""
NODES = 24
CHAIN = Shape(Kind.CHAIN, (NODES,))
TREE = Shape(Kind.BINARY, (NODES,))
STRIPES = Shape(Kind.STRIPES, (NODES,), 2)
ONE_FAULT = Scenario(CHAIN, chunk_count=192, link_rate=RATE, calm_s=2)
"""An ideal of two seconds, so that there is time for a fault in the middle."""
WINDOW = HopOptions().window_count


def after_a_fault(shape: Shape, *faults: Fault, **options: float) -> Scenario:
    calm_s = max(2.0, *(fault.until_s for fault in faults))
    patient = replace(
        HopOptions(expected_rate=RATE, lost_grace_s=calm_s),
        **options,  # type: ignore[arg-type]
    )
    return replace(ONE_FAULT, shape=shape, faults=faults, calm_s=calm_s, options=patient)


# ---------------------------------------------------------------- nothing wrong


@pytest.mark.parametrize("kind", list(Kind))
def test_without_faults_each_chunk_travels_once_to_each_node(kind: Kind) -> None:
    found = play(Scenario(Shape(kind, (5, 9, 10)), chunk_count=40))
    assert found.chunks_sent == 40 * NODES
    assert found.duplicate_count == 0
    assert found.summary.exit_code == 0
    assert found.summary.notes == {}


@pytest.mark.parametrize("shape", [CHAIN, TREE, STRIPES, Shape(Kind.FLAT, (NODES,))])
def test_the_cost_model_predicts_what_the_simulator_measures(shape: Shape) -> None:
    found = play(Scenario(shape, chunk_count=200, link_rate=RATE))
    network = Network(RATE, RATE, latency_s=0.0002, hop_overhead_s=0, hop_cpu_rate=1e12)
    disks_s = 200 * (1 << 18) / 4e8 / 4  # reading it back
    expected_s = predict(build(shape), 200 << 18, 1 << 18, network).seconds + disks_s
    assert found.seconds == pytest.approx(expected_s, rel=0.05)


@pytest.mark.parametrize("kind", [Kind.CHAIN, Kind.KARY, Kind.LAMBDA, Kind.STRIPES])
def test_each_chunk_crosses_a_slow_uplink_between_two_racks_once(kind: Kind) -> None:
    racks = Shape(kind, (12, 12), fanout=2)
    slow = Scenario(racks, chunk_count=192, link_rate=RATE, uplink_rate=RATE / 5)
    slow = replace(slow, options=HopOptions(expected_rate=RATE))
    found = play(slow)
    assert found.crossing_count == 192
    assert found.summary.notes == {}
    assert found.seconds < 1.1 * 192 * slow.chunk_size / slow.uplink_rate


@given(st.lists(st.integers(0, (1 << 24) - 1), min_size=9, max_size=9))
@settings(max_examples=20)
def test_what_nodes_have_already_does_not_travel(have: list[int]) -> None:
    found = play(Scenario(Shape(Kind.KARY, (9,)), chunk_count=24), have=dict(enumerate(have, 1)))
    assert found.summary.exit_code == 0
    assert found.chunks_sent == sum(24 - chunks.bit_count() for chunks in have)


def test_an_empty_transfer_ends_at_once() -> None:
    assert play(Scenario(CHAIN, chunk_count=0)).summary.exit_code == 0


def test_a_rate_limit_holds() -> None:
    limited = Scenario(CHAIN, link_rate=RATE, options=HopOptions(rate_limit=RATE / 4))
    found = play(limited)
    ideal_s = 64 * (1 << 18) / (RATE / 4)
    assert ideal_s * 0.9 < found.seconds < ideal_s * 1.3


# ---------------------------------------------------------------- one fault


@pytest.mark.parametrize("rank", [1, NODES // 2, NODES], ids=["first", "middle", "last"])
@pytest.mark.parametrize("shape", [CHAIN, TREE, STRIPES], ids=["chain", "tree", "stripes"])
@pytest.mark.parametrize("kind", [FaultKind.KILL, FaultKind.POWER_OFF, FaultKind.SINK_FULL])
def test_one_node_lost_costs_that_node_alone(kind: FaultKind, shape: Shape, rank: int) -> None:
    found = play(after_a_fault(shape, Fault(kind, rank, at_s=0.9)))
    assert set(found.summary.others) == {rank}
    assert found.summary.exit_code == 2
    assert found.longest_stall_s < 2
    # Only what was under way to the lost node and from it is sent twice.
    assert found.chunks_sent <= 192 * NODES + 4 * WINDOW
    expected = Verdict.FAILED if kind is FaultKind.SINK_FULL else Verdict.LOST
    assert found.summary.others[rank].verdict is expected


@pytest.mark.parametrize("rank", [1, NODES // 2, NODES], ids=["first", "middle", "last"])
@pytest.mark.parametrize("shape", [CHAIN, TREE, STRIPES], ids=["chain", "tree", "stripes"])
@pytest.mark.parametrize("kind", [FaultKind.PAUSE, FaultKind.CUT, FaultKind.SINK_HANGS])
def test_a_node_that_stops_for_a_while_holds_up_nobody(
    kind: FaultKind, shape: Shape, rank: int
) -> None:
    parent = build(shape).trees[0].parents[rank]
    fault = Fault(kind, rank, at_s=0.9, until_s=4.5, other=parent)
    found = play(after_a_fault(shape, fault))
    assert found.summary.exit_code == 0
    assert found.longest_stall_s < 2
    assert found.chunks_sent <= 192 * NODES + 6 * WINDOW


def test_two_dead_neighbours_are_passed_within_two_seconds() -> None:
    faults = (Fault(FaultKind.POWER_OFF, 11, 0.9), Fault(FaultKind.POWER_OFF, 12, 0.9))
    found = play(after_a_fault(CHAIN, *faults))
    assert set(found.summary.others) == {11, 12}
    assert found.longest_stall_s < 2


def test_a_node_that_never_starts_is_named_and_passed() -> None:
    found = play(after_a_fault(CHAIN, Fault(FaultKind.POWER_OFF, 5, at_s=0.0)))
    assert set(found.summary.others) == {5}
    assert "did not attach" in found.summary.others[5].reason


@pytest.mark.parametrize("shape", [CHAIN, TREE, STRIPES], ids=["chain", "tree", "stripes"])
def test_a_late_joiner_gets_everything(shape: Shape) -> None:
    late = Fault(FaultKind.POWER_OFF, 3, at_s=0.0, until_s=1.5)
    found = play(after_a_fault(shape, late))
    assert found.summary.exit_code == 0
    assert found.chunks_sent <= 192 * NODES + 5 * WINDOW


def test_a_node_that_returns_is_sent_only_what_it_lacks() -> None:
    back = Fault(FaultKind.KILL, 12, at_s=1.5, until_s=3.0)
    found = play(after_a_fault(CHAIN, back))
    assert found.summary.exit_code == 0
    assert found.chunks_sent <= 192 * NODES + 5 * WINDOW


@pytest.mark.parametrize("at_s", [0, 3], ids=["from the start", "later"])
@pytest.mark.parametrize("rank", [1, 6, 12], ids=["first", "middle", "last"])
@pytest.mark.parametrize("kind", [Kind.CHAIN, Kind.BINARY, Kind.STRIPES])
def test_a_node_throttled_to_a_twentieth_does_not_slow_the_others(
    kind: Kind, rank: int, at_s: float
) -> None:
    found, alone = with_and_without(Fault(FaultKind.SLOW, rank, at_s), kind)
    assert found.seconds < 1.04 * alone.seconds
    assert set(found.summary.others) == {rank}
    leaves = {one for one, note in found.summary.notes.items() if "made a leaf" in note}
    assert leaves <= {rank}
    assert found.chunks_sent <= 256 * 12 + 2 * WINDOW
    feeds_as_planned(found, kind)


@pytest.mark.parametrize("rank", [1, 6, 12], ids=["first", "middle", "last"])
@pytest.mark.parametrize("kind", [Kind.CHAIN, Kind.BINARY, Kind.STRIPES])
def test_when_a_node_is_lost_nobody_feeds_more_than_links_are_planned_for(
    kind: Kind, rank: int
) -> None:
    found, alone = with_and_without(Fault(FaultKind.POWER_OFF, rank, at_s=3), kind)
    assert found.seconds < 1.04 * alone.seconds
    feeds_as_planned(found, kind)


def test_a_standby_whose_own_parent_is_slow_next_does_not_offer_itself_to_itself() -> None:
    whole = Scenario(
        Shape(Kind.STRIPES, (8,), 2), chunk_count=256, chunk_size=1 << 20, link_rate=RATE,
        options=HopOptions(expected_rate=RATE, deadline_s=40),
        faults=(Fault(FaultKind.SLOW, 1, at_s=1.0), Fault(FaultKind.SLOW, 2, at_s=4.0)),
    )  # fmt: skip
    assert set(play(whole).summary.others) == {1, 2}


def with_and_without(fault: Fault, kind: Kind) -> tuple[Outcome, Outcome]:
    """Copy 256 MiB to twelve nodes at 200 Mbit/s."""
    whole = Scenario(
        Shape(kind, (12,), 2), chunk_count=256, chunk_size=1 << 20, link_rate=RATE,
        options=HopOptions(expected_rate=RATE),
    )  # fmt: skip
    alone = play(whole)
    impatient = replace(whole.options, deadline_s=1.2 * alone.seconds)
    return play(replace(whole, faults=(fault,), options=impatient)), alone


def feeds_as_planned(found: Outcome, kind: Kind) -> None:
    planned = build(Shape(kind, (12,), 2)).relay_count
    assert max(found.fed_counts.values()) <= planned


def test_one_chunk_in_ten_damaged_on_the_wire_is_sent_again() -> None:
    found = play(replace(ONE_FAULT, damaged_share=0.1))
    assert found.summary.exit_code == 0
    assert found.damaged_count > 192
    assert found.chunks_sent <= 192 * NODES + found.damaged_count + 8 * WINDOW * NODES


def test_what_the_sink_spoils_is_found_when_read_back() -> None:
    patient = HopOptions(verify_count_max=10)
    found = play(replace(ONE_FAULT, spoilt_share=0.02, options=patient))
    assert found.summary.exit_code == 0
    assert found.chunks_sent > 192 * NODES


def test_a_sink_that_spoils_everything_fails_by_name() -> None:
    found_out = HopOptions(verify_count_max=2)
    with pytest.raises(Breach, match="read back damaged"):
        play(replace(ONE_FAULT, spoilt_share=0.5, options=found_out))


def test_the_source_ends_at_its_deadline_and_says_who_is_missing() -> None:
    hopeless = replace(ONE_FAULT, link_rate=RATE / 50, options=HopOptions(deadline_s=3))
    summary = play(hopeless).summary
    assert summary.exit_code == 1
    assert {entry.reason for entry in summary.others.values()} == {"did not report in time"}


def test_everybody_dead_is_exit_code_1() -> None:
    faults = tuple(Fault(FaultKind.KILL, rank, 0.5) for rank in range(1, NODES + 1))
    assert play(after_a_fault(CHAIN, *faults)).summary.exit_code == 1


# ---------------------------------------------------------------- anything


def deaths(rng: random.Random) -> Scenario:
    """Some nodes are gone for good, alone or with the next, while others have their troubles."""
    count, chunk_count = rng.randint(3, 14), rng.randint(40, 120)
    kind = rng.choice((Kind.CHAIN, Kind.BINARY, Kind.KARY, Kind.STRIPES, Kind.LAMBDA))
    rate = 125e6 / rng.randint(3, 10)
    ideal_s = chunk_count * (1 << 18) / rate
    faults: dict[int, Fault] = {}
    for _ in range(rng.randint(1, 3)):
        rank, at_s = rng.randint(1, count), rng.uniform(0.1, 1.2) * ideal_s
        for one in range(rank, min(count, rank + rng.randint(0, 1)) + 1):
            how = rng.choice((FaultKind.KILL, FaultKind.POWER_OFF))
            faults.setdefault(one, Fault(how, one, at_s))
    troubles = []
    for _ in range(rng.randint(0, 3)):
        rank, at_s = rng.randint(1, count), rng.uniform(0, ideal_s)
        how = rng.choice((FaultKind.PAUSE, FaultKind.CUT, FaultKind.SLOW, FaultKind.SINK_HANGS))
        until_s = 0.0 if how is FaultKind.SLOW else at_s + rng.uniform(0.1, 2)
        other = (rank + rng.randint(1, count)) % (count + 1) if how is FaultKind.CUT else -1
        troubles.append(Fault(how, rank, at_s, until_s, other))
    return Scenario(
        Shape(kind, (count,), fanout=2),
        chunk_count=chunk_count,
        link_rate=rate,
        faults=(*faults.values(), *troubles),
        calm_s=1.5 * ideal_s + 3,
        options=HopOptions(expected_rate=rate, lost_grace_s=3, quiet_s=60, verify_count_max=6),
    )


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_whoever_is_gone_for_good_is_lost_and_not_waited_for(first: int) -> None:
    for seed in range(first, first + 50):
        scenario = deaths(random.Random(seed))
        print(f"seed {seed}: {scenario}")
        found = play(scenario, seed)
        verdicts = {entry.verdict for entry in found.summary.others.values()}
        assert verdicts <= {Verdict.LOST}
        assert found.ended_s < max(scenario.calm_s, *found.finished_s.values(), 0) + 8


@pytest.mark.parametrize("seed", range(25))
def test_with_random_faults_all_healthy_nodes_finish(seed: int) -> None:
    run_seed(seed, receivers=30, chunks=32)


@pytest.mark.parametrize(
    ("seed", "receivers", "chunks"),
    [(5267, 37, 87), (90353, 43, 93), (90162, 32, 82), (500247, 47, 67)],
    ids=[
        "a parent started again, and never heard the question",
        "the same",
        "a slow lender",
        "the question went with a connection that another tree gave up",
    ],
)
def test_seeds_that_have_failed_once_do_not_again(seed: int, receivers: int, chunks: int) -> None:
    run_seed(seed, receivers=receivers, chunks=chunks, kind=Kind.STRIPES)


def test_with_the_random_faults_of_the_day_all_healthy_nodes_finish() -> None:
    run_seed(random.SystemRandom().randrange(10**9), receivers=60, chunks=24)


@pytest.mark.parametrize(
    ("seed", "kind"),
    [(1, Kind.CHAIN), (2, Kind.KARY), (2, Kind.LAMBDA), (3, Kind.STRIPES)],
)
def test_a_thousand_nodes_with_random_faults_finish(seed: int, kind: Kind) -> None:
    run_seed(seed, receivers=1000, chunks=8, kind=kind)


def test_a_seed_replays() -> None:
    first, second = (run_seed(7, receivers=40, chunks=16)[1] for _ in range(2))
    assert first == second


# ---------------------------------------------------------------- the simulator itself


def test_the_simulator_catches_a_hop_that_claims_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Hop.sink_verified
    monkeypatch.setattr(Hop, "sink_verified", lambda hop, bad, now: honest(hop, (), now))
    with pytest.raises(Breach, match="has wrong bytes"):
        play(replace(ONE_FAULT, spoilt_share=0.02))


def test_the_simulator_catches_a_hop_that_forgets_its_orphans(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Hop, "_lose_the_silent", lambda hop, now: None)
    monkeypatch.setattr(Paces, "is_stuck", lambda paces, peer, pace, now: False)
    dead = Fault(FaultKind.POWER_OFF, 5, 0.5)
    with pytest.raises(Breach, match="is healthy, and"):
        play(after_a_fault(CHAIN, dead, stall_s=1e9, slow_fraction=0.0, quiet_s=9))


def test_a_chain_of_four_heals_as_the_document_says() -> None:
    silent = Fault(FaultKind.POWER_OFF, 2, at_s=0.5)
    scenario = Scenario(Shape(Kind.CHAIN, (4,)), link_rate=RATE / 2, faults=(silent,))
    lines = [line for line in trace_of(scenario) if "WriteChunk" not in line]
    begin = next(index for index, line in enumerate(lines) if "Adopt" in line)
    document = Path(__file__).parents[2] / "docs" / "broadcast.md"
    (block,) = re.findall(r"```trace\n(.*?)```", document.read_text(), re.DOTALL)
    assert lines[begin:] == block.splitlines()
