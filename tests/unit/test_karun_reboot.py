"""Reboots: windows, boot ids, deadlines, verdicts; the plan alone and carried out."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from karun.nodes import Names
from karun.power import Action, Ask, Order, Policy, Probe, Reboot, Verdict
from karun.reboot import reboot

OLD, NEW = "5bd3-old", "91f0-new"


def begun(plan: Reboot, now: float = 0) -> None:
    """Ask and order the nodes of the first window."""
    for action in plan.tick(now):
        assert isinstance(action, Ask)
        assert plan.asked(action.node, OLD, now)[0] == Order(action.node)
        plan.ordered(action.node, "", now)


def ends(plan: Reboot) -> list[str]:
    return [reason or verdict.value for verdict, reason in plan.verdicts()]


def test_a_node_is_up_only_under_another_boot_id() -> None:
    plan = Reboot(1, Policy())
    begun(plan)
    assert plan.tick(4) == []
    assert plan.tick(5) == [Probe(0)]
    assert plan.tick(6) == []
    plan.probed(0, OLD, 6)
    assert plan.tick(11) == [Probe(0)]
    plan.probed(0, "", 12)
    assert plan.tick(17) == [Probe(0)]
    assert not plan.is_over
    plan.probed(0, NEW, 18)
    assert plan.is_over
    assert (ends(plan), plan.exit_code()) == (["up"], 0)


def test_a_boot_missed_between_two_probes_counts() -> None:
    plan = Reboot(1, Policy())
    begun(plan)
    plan.tick(5)
    plan.probed(0, NEW, 6)
    assert ends(plan) == ["up"]


def test_the_window_is_never_wider_than_asked_and_never_idle() -> None:
    plan = Reboot(5, Policy(window=2))
    assert plan.tick(0) == [Ask(0), Ask(1)]
    assert plan.tick(1) == []
    plan.asked(0, OLD, 1)
    plan.ordered(0, "", 1)
    plan.tick(6)
    assert plan.phase_counts() == (3, 2, 0, 0)
    assert plan.probed(0, NEW, 7) == [Ask(2)]
    assert plan.phase_counts() == (2, 2, 1, 0)


def test_a_node_that_never_goes_down_is_told_from_one_that_never_comes_back() -> None:
    plan = Reboot(2, Policy(down_s=60, up_s=300))
    begun(plan)
    for now in range(5, 400, 5):
        for action in plan.tick(now):
            plan.probed(action.node, OLD if action.node == 0 else "", now + 1)
    assert ends(plan) == ["did not go down within 60 s", "did not come back within 300 s"]
    assert plan.exit_code() == 1


def test_a_probe_that_is_never_answered_ends_at_the_deadline() -> None:
    plan = Reboot(1, Policy(down_s=60, up_s=300))
    begun(plan)
    assert plan.tick(5) == [Probe(0)]
    assert plan.due() == 60
    plan.tick(60)
    assert ends(plan) == ["did not go down within 60 s"]
    assert plan.probed(0, NEW, 61) == []
    assert ends(plan) == ["did not go down within 60 s"]


def test_what_does_not_answer_before_is_left_alone_unless_power_is_switched() -> None:
    soft, hard = Reboot(1, Policy()), Reboot(1, Policy(hard=True))
    soft.tick(0)
    assert soft.asked(0, "", 1) == []
    assert ends(soft) == ["unreachable before the reboot"]
    hard.tick(0)
    assert hard.tick(15) == [Order(0)]
    hard.ordered(0, "", 16)
    hard.tick(21)
    hard.probed(0, NEW, 22)
    assert ends(hard) == ["up"]


def test_a_refusal_is_the_nodes_verdict_in_one_line() -> None:
    plan = Reboot(1, Policy())
    plan.tick(0)
    plan.asked(0, OLD, 0)
    plan.ordered(0, "sudo: a password\nis required", 1)
    assert ends(plan) == ["would not reboot (sudo: a password is required)"]


def test_word_that_never_comes_is_no_refusal() -> None:
    plan = Reboot(1, Policy())
    plan.tick(0)
    plan.asked(0, OLD, 0)
    assert plan.tick(30) == []
    assert plan.tick(35) == [Probe(0)]


@pytest.mark.parametrize(("failures_max", "begun_count"), [(0, 5), (1, 3), (5, 7)])
def test_too_many_failures_stop_the_rest(failures_max: int, begun_count: int) -> None:
    plan = Reboot(20, Policy(window=3, failures_max=failures_max))
    questions = plan.tick(0)
    asked = 0
    while questions:
        questions += plan.asked(questions.pop(0).node, "", 1)
        asked += 1
    assert asked == begun_count
    assert plan.is_over
    names = Names([f"n{rank}" for rank in range(20)])
    assert plan.summary(names) == [
        f"n[0-{begun_count - 1}]: unreachable before the reboot",
        f"n[{begun_count}-19]: not begun, too many others failed",
    ]


def test_thousands_of_deadlines_at_once_are_no_trouble() -> None:
    plan = Reboot(5_000, Policy(failures_max=5_000))
    assert len(plan.tick(0)) == 5_000
    assert plan.tick(15) == []
    assert plan.is_over


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=8),
    st.integers(0, 3),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7), st.sampled_from(["", OLD, NEW]))),
)
def test_every_node_gets_one_verdict_and_at_most_one_order(
    fates: list[int],
    window: int,
    hard: bool,
    noise: list[tuple[int, int, str]],
) -> None:
    """Fates: comes back, stays down, ignores the order, never answers at all.  Noise: answers
    that nobody asked for, which may stand for late ones."""
    plan = Reboot(len(fates), Policy(window=window, failures_max=99, hard=hard))
    orders: list[int] = []
    now = 0.0
    queue: list[Action] = []
    while not plan.is_over:
        assert now < 20_000, "it never ends"
        queue += plan.tick(now)
        if noise:
            kind, rank, text = noise.pop()
            if rank < len(fates):
                tell = (plan.asked, plan.ordered, plan.probed, plan.probed)[kind]
                queue += tell(rank, text, now)
        for action in queue:
            fate = fates[action.node]
            if isinstance(action, Order):
                orders.append(action.node)
                queue += plan.ordered(action.node, "", now)
            elif isinstance(action, Ask) and fate != 3:
                queue += plan.asked(action.node, OLD, now)
            elif isinstance(action, Probe) and fate != 3:
                boot_id = {0: NEW, 1: "", 2: OLD}[fate] if now > 20 else ""
                queue += plan.probed(action.node, boot_id, now)
        queue.clear()
        assert plan.phase_counts()[1] <= (window or len(fates))
        now += 3
    assert len(set(orders)) == len(orders)
    assert Verdict.SKIPPED not in {verdict for verdict, _ in plan.verdicts()}


@dataclass
class Cluster:
    """Nodes that take two minutes to boot; some are dead, some deaf, some hang."""

    dead: set[int] = field(default_factory=set)
    deaf: set[int] = field(default_factory=set)
    hung: set[int] = field(default_factory=set)
    booted_at: dict[int, float] = field(default_factory=dict)
    down_count_max: int = 0

    async def boot_id(self, node: int) -> str:
        if node in self.hung:
            await trio.sleep_forever()
        await trio.sleep(0.2)
        if node in self.dead:
            return ""
        booted_at = self.booted_at.get(node, -1.0)
        return f"boot-{booted_at}" if booted_at <= trio.current_time() else ""

    async def order(self, node: int) -> str:
        await trio.sleep(0.5)
        if node in self.deaf:
            return "permission denied"
        self.booted_at[node] = trio.current_time() + 120
        now = trio.current_time()
        self.down_count_max = max(
            self.down_count_max, sum(at > now for at in self.booted_at.values())
        )
        return ""


async def test_a_cluster_is_rebooted_window_by_window(autojump_clock: object) -> None:
    cluster = Cluster(dead={3}, deaf={5}, hung={7})
    changes: list[tuple[int, int, int, int]] = []
    started = trio.current_time()
    plan = await reboot(
        12,
        Policy(window=4),
        cluster,
        changed=lambda plan: changes.append(plan.phase_counts()),
    )
    assert [verdict.value for verdict, _ in plan.verdicts()] == [
        "failed" if node in (3, 5, 7) else "up" for node in range(12)
    ]
    assert plan.exit_code() == 2
    assert cluster.down_count_max <= 4
    assert changes[-1] == (0, 0, 9, 3)
    assert 3 * 120 < trio.current_time() - started < 5 * 120


async def test_a_cancelled_reboot_orders_no_more(autojump_clock: object) -> None:
    cluster = Cluster()
    with trio.move_on_after(60):
        await reboot(9, Policy(window=2), cluster)
    await trio.sleep(1000)
    assert sorted(cluster.booted_at) == [0, 1]
