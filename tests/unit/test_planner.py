"""The planner picks what the literature says, and its times agree with the textbook's formulas."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.broadcast.cost import (
    CHUNK_S,
    CHUNK_SIZES,
    FILL_SHARE,
    PIECE_S,
    PIECE_SIZES,
    Network,
    ideal_s,
    piece_size,
    predict,
)
from common.broadcast.planner import Plan, Request, make_plan
from common.broadcast.topology import Kind, Shape, build
from common.errors import KaError

GBIT = 125e6
GIB = 1 << 30


def network(rate: float = GBIT, uplink_rate: float = 0.0) -> Network:
    return Network(rate, rate, uplink_rate=uplink_rate)


def plan(size: int, receivers: int, rate: float = GBIT, **other: object) -> Plan:
    return make_plan(Request(size, (receivers,), network(rate), **other))  # type: ignore[arg-type]


def seconds(kind: Kind, size: int, receivers: int, chunk_size: int, net: Network) -> float:
    return predict(build(Shape(kind, (receivers,))), size, chunk_size, net).seconds


@given(st.integers(1, 200), st.integers(1, 64))
def test_a_chain_takes_as_many_steps_as_it_has_nodes_and_chunks(
    receivers: int, chunk_count: int
) -> None:
    net = Network(1e6, 1e6, latency_s=0, hop_overhead_s=0.001, hop_cpu_rate=1e18)
    step_s = 0.001 + 1000 / 1e6
    found = seconds(Kind.CHAIN, 1000 * chunk_count, receivers, 1000, net)
    assert found == pytest.approx((receivers - 1 + chunk_count) * step_s)


@given(st.integers(1, 100))
def test_flat_sends_everything_once_for_each_receiver(receivers: int) -> None:
    net = Network(1e6, 1e6, latency_s=0, hop_overhead_s=0, hop_cpu_rate=1e18)
    assert seconds(Kind.FLAT, 10**6, receivers, 10**5, net) == pytest.approx(receivers)


def test_a_whole_file_down_a_binomial_tree_takes_a_round_for_each_bit() -> None:
    net = Network(1e6, 1e6, latency_s=0, hop_overhead_s=0, hop_cpu_rate=1e18)
    assert seconds(Kind.BINOMIAL, 10**6, 255, 10**6, net) == pytest.approx(8)


@pytest.mark.parametrize("uplink_rate", [0.0, GBIT / 100])
@pytest.mark.parametrize("rate", [GBIT / 10, GBIT, 10 * GBIT])
def test_a_chunk_is_as_large_as_the_narrowest_link_allows(rate: float, uplink_rate: float) -> None:
    found = make_plan(Request(GIB, (20, 20), network(rate, uplink_rate), kind=Kind.CHAIN))
    largest = CHUNK_S * (uplink_rate or rate)
    fit = [size for size in CHUNK_SIZES if size <= largest]
    assert found.chosen.chunk_size == (fit or CHUNK_SIZES)[-1 if fit else 0]


@given(st.integers(1, 200))
def test_a_long_chain_costs_a_piece_for_each_node_not_a_chunk(receivers: int) -> None:
    net = Network(1e6, 1e6, latency_s=0, hop_overhead_s=0, hop_cpu_rate=1e18)
    chunk_size = 4 * PIECE_SIZES[-1]
    size = 10 * chunk_size
    piece = piece_size(receivers, size, 1e6)
    found = seconds(Kind.CHAIN, size, receivers, chunk_size, net)
    assert found == pytest.approx(((receivers - 1) * piece + size) / 1e6)


@given(st.integers(1, 10_000), st.integers(0, 1 << 40), st.floats(0, 1e10))
def test_waiting_for_pieces_costs_little_where_pieces_can_be_so_small(
    depth: int, size: int, rate: float
) -> None:
    piece = piece_size(depth, size, rate)
    assert piece in PIECE_SIZES
    # Half of it would do no better by one rule, or break the other.
    if piece > PIECE_SIZES[0]:
        assert piece // 2 * depth < FILL_SHARE * size or piece // 2 < PIECE_S * rate


@given(
    st.integers(0, 40).map(lambda bits: 1 << bits),
    st.integers(1, 300),
    st.sampled_from([12.5e6, GBIT, 10 * GBIT]),
)
def test_no_plan_beats_the_narrowest_link(size: int, receivers: int, rate: float) -> None:
    found = plan(size, receivers, rate)
    for choice in (found.chosen, *found.alternatives):
        assert choice.cost.seconds >= found.ideal_s * 0.999


@given(st.integers(0, 40).map(lambda bits: 1 << bits), st.integers(1, 300))
def test_the_choice_is_within_a_tenth_of_the_quickest(size: int, receivers: int) -> None:
    found = plan(size, receivers)
    times = [choice.cost.seconds for choice in found.alternatives]
    assert times == sorted(times)
    assert found.chosen.cost.seconds <= 1.1001 * min(times)


@pytest.mark.parametrize(
    ("size", "receivers", "rate", "kind"),
    [
        (GIB, 1, GBIT, Kind.FLAT),
        (GIB, 24, GBIT, Kind.CHAIN),
        (4 * GIB, 225, GBIT, Kind.CHAIN),
        (10 * GIB, 1000, GBIT, Kind.CHAIN),
        (GIB, 1000, 10 * GBIT, Kind.STRIPES),
        (10 * GIB, 10_000, GBIT, Kind.STRIPES),
        (1024, 1000, GBIT, Kind.LAMBDA),
        (100_000, 225, GBIT, Kind.LAMBDA),
    ],
)
def test_the_choice_follows_size_count_and_link(
    size: int, receivers: int, rate: float, kind: Kind
) -> None:
    assert plan(size, receivers, rate).chosen.shape.kind is kind


def test_a_slow_uplink_is_crossed_once_and_sets_the_pace() -> None:
    net = network(uplink_rate=GBIT / 4)
    found = make_plan(Request(GIB, (20,) * 10, net))
    assert found.chosen.shape.kind is Kind.CHAIN
    assert found.chosen.cost.bottleneck == "a rack's uplink"
    ideal = ideal_s((20,) * 10, GIB, net)
    assert found.chosen.cost.seconds < 1.1 * ideal
    flat = next(one for one in found.alternatives if one.shape.kind is Kind.FLAT)
    assert flat.cost.seconds > 100 * ideal


def test_multicast_is_chosen_on_a_shared_medium_and_considered_nowhere_else() -> None:
    shared = plan(GIB, 50, shared_medium=True)
    assert shared.chosen.shape.kind is Kind.MULTICAST
    assert "shared medium" in shared.reason
    assert shared.chosen.cost.seconds < 1.1 * shared.ideal_s
    assert shared.chosen.chunk_size <= 256 * 1024
    switched = plan(GIB, 50)
    kinds = {one.shape.kind for one in (switched.chosen, *switched.alternatives)}
    assert Kind.MULTICAST not in kinds


def test_a_little_is_not_worth_a_multicast_pass() -> None:
    assert plan(100_000, 3, shared_medium=True).chosen.shape.kind is not Kind.MULTICAST
    assert plan(100_000, 1, shared_medium=True).chosen.shape.kind is not Kind.MULTICAST


@pytest.mark.parametrize("kind", list(Kind))
def test_what_was_asked_for_is_planned_and_compared(kind: Kind) -> None:
    found = plan(GIB, 225, kind=kind)
    assert found.chosen.shape.kind is kind
    assert found.reason.startswith("asked for")
    assert ("slower than" in found.reason) == (kind is not Kind.STRIPES)
    assert "\n" not in found.reason


def test_a_processor_slower_than_the_link_is_named() -> None:
    net = Network(10 * GBIT, 10 * GBIT, hop_cpu_rate=GBIT)
    found = make_plan(Request(GIB, (100,), net))
    assert "processor" in found.chosen.cost.bottleneck


@pytest.mark.parametrize(
    "arguments",
    [
        {"up_rate": 0.0, "down_rate": 1.0},
        {"up_rate": 1.0, "down_rate": 1.0, "latency_s": -1.0},
        {"up_rate": 1.0, "down_rate": 1.0, "multicast_loss": 1.0},
    ],
)
def test_an_impossible_network_is_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(KaError):
        Network(**arguments)
