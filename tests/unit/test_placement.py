"""Laws of choosing chains for new files."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from common.errors import Code
from nfsp.mds.placement import Placement, check_rule, format_layout, parse_layout
from nfsp.model import Chain, ClusterMap, Iod, Layout
from tests.support.space import may_refuse, refused

ANY = Layout(1 << 20, 0, 1, ())


def map_of(states: dict[int, str], chains: dict[int, tuple[int, ...]]) -> ClusterMap:
    return ClusterMap(
        1,
        tuple(Iod(iod, "", "", state) for iod, state in states.items()),
        tuple(Chain(chain, 1, iods) for chain, iods in chains.items()),
    )


def single(count: int) -> ClusterMap:
    numbers = range(1, count + 1)
    return map_of(dict.fromkeys(numbers, "up"), {number: (number,) for number in numbers})


@given(st.integers(1, 300), st.integers(0, 255), st.integers(1, 1 << 62))
def test_file_gets_as_many_different_chains_as_it_is_wide(count: int, width: int, ino: int) -> None:
    layout = Placement(ANY, single(count)).choose(ANY._replace(stripe_width=width), ino)
    assert layout.stripe_width == len(layout.chains) == len(set(layout.chains))
    assert layout.stripe_width == min(width or 255, count, 255)


def test_consecutive_files_start_on_different_chains() -> None:
    placement = Placement(ANY, single(5))
    for rule in (ANY, ANY._replace(stripe_width=1), ANY._replace(stripe_width=3)):
        first = Counter(placement.choose(rule, ino).chains[0] for ino in range(100, 150))
        assert set(first.values()) == {10}


def test_only_chains_whose_iods_are_all_up_are_used() -> None:
    states = {1: "up", 2: "draining", 3: "gone", 4: "up"}
    chains = {1: (1,), 2: (2,), 3: (3,), 4: (4,), 5: (5,), 6: ()}
    placement = Placement(ANY, map_of(states, chains))
    assert set(placement.choose(ANY, 7).chains) == {1, 4}


def test_chains_keep_as_many_replicas_as_the_rule_says() -> None:
    states = {1: "up", 2: "up", 3: "draining"}
    placement = Placement(ANY, map_of(states, {1: (1,), 2: (1, 2), 3: (2, 3)}))
    assert placement.choose(ANY._replace(replicas=2), 7).chains == (2,)
    assert placement.choose(ANY, 7).chains == (1,)


def test_no_usable_chain_is_enospc() -> None:
    placement = Placement(ANY, map_of({1: "gone"}, {1: (1,)}))
    with refused(Code.ENOSPC):
        placement.choose(ANY, 7)


def test_rule_that_names_chains_is_followed_without_those_that_are_down() -> None:
    placement = Placement(ANY, map_of({1: "up", 2: "gone", 3: "up"}, {n: (n,) for n in (1, 2, 3)}))
    assert placement.choose(ANY._replace(chains=(2, 3)), 7).chains == (3,)


def test_many_rules_keep_the_memory_bounded() -> None:
    placement = Placement(ANY, single(3))
    for number in range(5000):
        placement.choose(ANY._replace(chunk_size=65536 + number), 1)
    assert len(placement._pools) <= 1024


@given(
    st.integers(2, 256).map(lambda blocks: blocks * 32768),
    st.integers(0, 255),
    st.integers(1, 8),
    st.lists(st.integers(0, (1 << 32) - 1), unique=True, max_size=255),
)
def test_layout_text_survives_a_round_trip(
    chunk_size: int, width: int, replicas: int, chains: list[int]
) -> None:
    rule = Layout(chunk_size, min(width, len(chains)) if chains else width, replicas, tuple(chains))
    check_rule(rule)
    assert parse_layout(format_layout(rule), ANY) == rule


@given(st.binary(max_size=80) | st.text(" =,0123chunk_sizewaplty", max_size=80).map(str.encode))
def test_any_text_is_a_layout_or_einval(text: bytes) -> None:
    with may_refuse(Code.EINVAL):
        check_rule(parse_layout(text, ANY))


def test_layout_text_takes_what_it_leaves_out_from_the_default() -> None:
    default = Layout(65536, 2, 1, (4, 5))
    assert parse_layout(b" \n", default) == default
    assert parse_layout(b"stripe_width=1", default) == Layout(65536, 1, 1, (4, 5))
    assert parse_layout(b"chains=", default) == Layout(65536, 0, 1, ())
