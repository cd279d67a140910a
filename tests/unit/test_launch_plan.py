"""The launch plan: as quick as the best tree, and hosts that do not come up delay nobody."""

from __future__ import annotations

import inspect
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from karun import launch_plan
from karun.launch_plan import STAGES, Action, Caller, LaunchPlan
from tests.support.launch import Launch, Site, optimum_s

GAP_S, READY_S = 0.01, 0.15
COUNTS = [225, 1000, 10_000]


def one_in(part: int, count: int, seed: int) -> frozenset[int]:
    return frozenset(random.Random(seed).sample(range(1, count + 1), count // part))


def bound_s(count: int, share: float = 1.15) -> float:
    return share * optimum_s(count, GAP_S, READY_S)


def kinds(actions: list[Action]) -> list[tuple[str, int]]:
    return [(action.kind, action.rank) for action in actions]


# ---------------------------------------------------------------- whole launches


@pytest.mark.parametrize("count", [1, 2, 32, *COUNTS])
def test_a_launch_is_near_the_optimum_of_the_postal_model(count: int) -> None:
    launch = Launch(Site(count)).run()
    assert launch.seconds <= bound_s(count, 1.05)
    assert launch.connect_count == count


@pytest.mark.parametrize("count", COUNTS)
def test_hung_and_dead_hosts_delay_nobody(count: int) -> None:
    hung = one_in(100, count, seed=1)
    dead = one_in(100, count, seed=2) - hung
    launch = Launch(Site(count, hung=hung, dead=dead)).run()
    assert launch.seconds <= bound_s(count)
    assert {launch.given_up[rank] for rank in hung} == {"banner"}
    assert {launch.given_up[rank] for rank in dead} == {"tcp"}
    assert launch.now < 10


def test_hosts_that_are_hung_first_of_all_delay_nobody() -> None:
    first = frozenset(range(1, 11))
    assert Launch(Site(225, hung=first)).run().seconds <= bound_s(235) + 10 * GAP_S


@pytest.mark.parametrize("seed", range(3))
def test_ready_times_that_differ_by_a_third_are_made_up_for(seed: int) -> None:
    assert Launch(Site(1000, jitter=0.3), seed).run().seconds <= bound_s(1000, 1.2)


def test_a_late_host_is_called_again_and_the_quicker_try_counts() -> None:
    tardy = one_in(100, 1000, seed=3)
    launch = Launch(Site(1000, tardy=tardy)).run()
    # Late after 3 * READY_S at the latest; the second try takes READY_S.
    assert launch.seconds <= bound_s(1000) + 4 * READY_S
    assert launch.connect_count == 1000 + len(tardy)


def test_second_tries_are_few_however_many_hosts_are_late() -> None:
    launch = Launch(Site(1000, tardy=frozenset(range(1, 1001, 2)))).run()
    assert launch.connect_count < 1300


def test_hosts_that_refuse_are_named_at_once() -> None:
    refusing = one_in(50, 1000, seed=4)
    launch = Launch(Site(1000, refusing=refusing)).run()
    assert launch.seconds <= bound_s(1000)
    assert set(launch.given_up) == refusing


@pytest.mark.parametrize("lame", [frozenset({1}), frozenset({2, 3}), one_in(100, 1000, seed=5)])
def test_what_slow_callers_hold_is_taken_back_by_those_who_idle(lame: frozenset[int]) -> None:
    """Each holds an eighth of all, and takes 0.2 s for a call: alone it would take 25 s."""
    assert Launch(Site(1000, lame=lame)).run().seconds <= bound_s(1000, 1.3)


def test_nodes_that_cannot_call_give_their_work_back() -> None:
    assert Launch(Site(1000, mute=one_in(10, 1000, seed=6))).run().seconds <= bound_s(1000)


def test_where_nobody_can_call_the_head_calls_all() -> None:
    everybody = frozenset(range(1, 101))
    launch = Launch(Site(100, mute=everybody)).run()
    assert launch.seconds == pytest.approx(99 * GAP_S + READY_S, rel=0.05)


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.2])
def test_what_a_dead_relay_held_is_called_anew(after_s: float) -> None:
    launch = Launch(Site(1000, mortal={1: after_s, 7: after_s})).run()
    assert launch.seconds < bound_s(1000) * 2 + launch_plan.REATTACH_S


def test_a_window_of_ten_costs_little() -> None:
    assert Launch(Site(1000), window_count=10).run().seconds <= bound_s(1000)


ODD = st.frozensets(st.integers(1, 60), max_size=12)


@settings(max_examples=60)
@given(ODD, ODD, ODD, ODD, ODD, ODD, st.integers(0, 10**6), st.integers(1, 8))
def test_whatever_hosts_do_each_is_up_once_or_given_up_by_name(
    hung: frozenset[int], dead: frozenset[int], refusing: frozenset[int], lame: frozenset[int],
    mute: frozenset[int], mortal: frozenset[int], seed: int, window_count: int,
) -> None:  # fmt: skip
    rng = random.Random(seed)
    site = Site(
        60, jitter=0.5, hung=hung, dead=dead - hung, refusing=refusing - hung - dead, lame=lame,
        mute=mute, mortal={rank: rng.random() for rank in mortal - mute},
    )  # fmt: skip
    Launch(site, seed, window_count=window_count).run()  # it checks


# ---------------------------------------------------------------- one caller


def started(count: int, **settings: object) -> tuple[Caller, list[Action]]:
    caller = Caller(LaunchPlan(**settings), is_head=True)  # type: ignore[arg-type]
    return caller, caller.given(range(1, count + 1), 0.0)


def test_calls_are_made_one_after_the_other_while_there_is_room() -> None:
    caller, actions = started(3, window_count=2)
    assert kinds(actions) == [("connect", 1)]
    assert kinds(caller.called(0.01)) == [("connect", 2)]
    assert kinds(caller.called(0.02)) == []
    assert kinds(caller.failed(1, 1, 0.03)) == [("give up", 1), ("connect", 3)]


def test_a_window_full_of_silent_hosts_opens_after_a_while() -> None:
    caller, _ = started(3, window_count=2)
    caller.called(0.01)
    caller.called(0.02)
    assert 0.3 < caller.wake_s < 1
    assert kinds(caller.tick(caller.wake_s)) == [("connect", 3)]


def test_each_stage_has_its_deadline() -> None:
    caller, _ = started(1)
    caller.called(0.01)
    assert caller.wake_s == STAGES[0][1]
    caller.reached(1, 1, "tcp", 1.0)
    caller.reached(1, 1, "banner", 1.5)
    assert caller.wake_s == 1.5 + STAGES[2][1]
    actions = caller.tick(caller.wake_s)
    assert [(action.kind, action.stage) for action in actions] == [
        ("abandon", ""),
        ("give up", "auth"),
    ]
    assert caller.idle


def test_a_connector_that_tells_nothing_has_one_stage() -> None:
    caller, _ = started(1, stages=(("connect", 7.0), ("agent", 5.0)))
    caller.called(0.01)
    assert caller.wake_s == 7.0
    caller.reached(1, 1, "connect", 6.0)
    assert caller.wake_s == 11.0


def test_who_is_hung_up_on_before_a_word_is_called_once_more() -> None:
    caller, _ = started(1)
    caller.called(0.01)
    caller.reached(1, 1, "tcp", 0.02)
    (again,) = caller.failed(1, 1, 0.03)
    assert (again.kind, again.rank, again.attempt) == ("connect", 1, 2)
    caller.called(0.04)
    caller.reached(1, 2, "tcp", 0.05)
    assert kinds(caller.failed(1, 2, 0.06)) == [("give up", 1)]


def test_a_call_that_was_given_up_is_refused_when_it_comes_after_all() -> None:
    caller, _ = started(1)
    caller.called(0.01)
    caller.tick(3.0)
    assert kinds(caller.ready(1, 1, 3.1)) == [("abandon", 1)]


def test_a_child_learns_the_times_with_its_work() -> None:
    caller, _ = started(100)
    caller.called(0.02)
    actions = caller.ready(1, 1, 0.3)
    (give,) = [action for action in actions if action.kind == "give"]
    assert give.times[1] == pytest.approx(0.3)
    assert give.times[2] == pytest.approx(0.9)
    child = Caller(LaunchPlan(), is_head=False)
    child.given(give.ranks, 0.4, times=give.times)
    assert child.plan.times == give.times


def test_calls_that_cost_the_caller_nothing_are_planned_too() -> None:
    caller, _ = started(1000, times=(0.01, 2.0, 0.0))
    for rank in range(1, 21):
        caller.called(rank * 1e-6)
    (give,) = [one for one in caller.ready(1, 1, 60.0) if one.kind == "give"]
    assert 0 < len(give.ranks) < 1000


def test_orphans_that_come_back_by_themselves_are_not_called_again() -> None:
    caller, _ = started(40)
    caller.called(0.01)
    (give,) = [one for one in caller.ready(1, 1, 0.15) if one.kind == "give"]
    assert len(give.ranks) > 2
    first, second, *others = give.ranks
    caller.settled(1, [first], 0.3)
    caller.lost(1, 0.4)
    caller.rejoined(second, 0.5)
    before = set(caller.stock)
    caller.tick(0.4 + launch_plan.REATTACH_S)
    assert set(caller.stock) - before == set(others)


def test_who_comes_by_itself_is_called_no_more() -> None:
    caller, _ = started(3, window_count=1)
    assert kinds(caller.rejoined(1, 0.1, calls=False)) == [("abandon", 1)]
    assert not [one for one in caller.failed(1, 1, 0.2) if one.kind == "give up"]


def test_who_comes_by_itself_is_given_no_work_if_it_cannot_call() -> None:
    caller, _ = started(40, window_count=1)
    assert not [one for one in caller.rejoined(1, 0.1, calls=False) if one.kind == "give"]
    assert [one for one in caller.rejoined(2, 0.1) if one.kind == "give"]


def test_the_module_loads_nothing_else() -> None:
    root = Path(__file__).parents[2]
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r}); import karun; before = set(sys.modules);"
        "import karun.launch_plan; print(*sorted(set(sys.modules) - before))"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    loaded = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert set(loaded) <= {"__future__", "karun.launch_plan"}


def test_the_document_names_every_event_and_action() -> None:
    text = (Path(__file__).parents[2] / "docs" / "launch.md").read_text()
    _, events, actions = re.split(r"^## (?:Events|Actions)$", text, flags=re.MULTILINE)
    methods = {
        name
        for name, one in vars(Caller).items()
        if inspect.isfunction(one) and not name.startswith("_")
    }
    constants = {name for name in launch_plan.__all__ if name.isupper()} - {"STAGES"}
    assert set(re.findall(r"^\| `(\w+)`", events, re.MULTILINE)) == methods
    assert set(re.findall(r"^\| `(\w+)`", actions, re.MULTILINE)) == constants
