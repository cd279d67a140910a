"""The workflow automaton: retries, fall-backs, windows, gathering, breakpoints, restarts."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import KaError
from kadeploy.steps import (
    Hook,
    Implementation,
    Macro,
    MacroStep,
    MicroStep,
    Options,
    When,
    Window,
    Workflow,
    default_workflow,
    with_hooks,
)
from kadeploy.workflow import Cancel, Deployment, NodeState, Run, Status


def step(name: str, **changes: object) -> MicroStep:
    return replace(MicroStep(name, name, 1000), **changes)  # type: ignore[arg-type]


def flow(*implementations: Implementation, **changes: object) -> Workflow:
    made = Workflow((MacroStep(Macro.BROADCAST_ENV, implementations),))
    return replace(made, **changes)  # type: ignore[arg-type]


def started(actions: list[object]) -> list[tuple[str, list[str]]]:
    return [(one.step.name, list(one.tickets)) for one in actions if isinstance(one, Run)]


class Driver:
    """Answers the steps by hand."""

    def __init__(self, workflow: Workflow, *names: str) -> None:
        self.deployment = Deployment(workflow, [NodeState(name) for name in names])
        self.tickets: dict[str, int] = {}
        self.log: list[tuple[str, list[str]]] = []
        self.take(self.deployment.tick(0))

    def take(self, actions: list[object]) -> None:
        self.log += started(actions)
        for one in actions:
            if isinstance(one, Run):
                self.tickets.update(one.tickets)

    def finish(self, name: str, now_ms: int = 0, *, ok: bool = True, reason: str = "no") -> None:
        ticket = self.tickets[name]
        self.take(
            list(self.deployment.finished(name, ticket, now_ms, ok=ok, reason="" if ok else reason))
        )

    def status(self, name: str) -> Status:
        return self.deployment.nodes[name].status


def test_a_node_goes_through_all_steps_and_is_deployed() -> None:
    driver = Driver(flow(Implementation("a", (step("one"), step("two")))), "n1")
    driver.finish("n1")
    driver.finish("n1")
    assert driver.log == [("one", ["n1"]), ("two", ["n1"])]
    assert driver.status("n1") is Status.DEPLOYED


def test_tries_of_a_step_then_of_its_implementation_then_the_next_one() -> None:
    first = Implementation("a", (step("one", retries=1),), retries=1)
    second = Implementation("b", (step("other"),))
    driver = Driver(flow(first, second), "n1")
    for _ in range(4):
        driver.finish("n1", ok=False)
    assert [name for name, _ in driver.log] == ["one"] * 4 + ["other"]
    driver.finish("n1", ok=False, reason="disk is gone")
    assert driver.status("n1") is Status.FAILED
    assert driver.deployment.nodes["n1"].reason.endswith("disk is gone")


def test_what_is_final_fails_a_node_without_another_try() -> None:
    driver = Driver(flow(Implementation("a", (step("one", retries=5),), retries=5)), "n1")
    (ticket,) = driver.tickets.values()
    list(driver.deployment.finished("n1", ticket, 0, ok=False, reason="too small", final=True))
    assert driver.status("n1") is Status.FAILED
    assert driver.deployment.nodes["n1"].reason == "one: too small"


def test_node_failing_microstep_leaves_others_deploying() -> None:
    driver = Driver(flow(Implementation("a", (step("one"), step("two")))), "n1", "n2")
    driver.finish("n1", ok=False)
    driver.finish("n2")
    driver.finish("n2")
    assert driver.status("n1") is Status.FAILED
    assert driver.status("n2") is Status.DEPLOYED


def test_a_step_out_of_time_is_cancelled_and_its_late_result_is_void() -> None:
    driver = Driver(flow(Implementation("a", (step("one"), step("two")))), "n1")
    assert driver.deployment.next_tick_ms(0) == 1000
    (cancel,) = driver.deployment.tick(1000)
    assert cancel == Cancel("n1", driver.tickets["n1"])
    driver.finish("n1", 1001)
    assert driver.status("n1") is Status.FAILED
    assert "no end in time" in driver.deployment.nodes["n1"].reason


def test_time_grows_with_the_nodes_where_told() -> None:
    driver = Driver(flow(Implementation("a", (step("one", per_node_ms=10),))), "n1", "n2")
    assert driver.deployment.next_tick_ms(0) == 1020


def test_a_window_holds_its_count_and_no_more() -> None:
    workflow = flow(Implementation("a", (step("boot", window="w"),)), windows=(Window("w", 2),))
    driver = Driver(workflow, "n1", "n2", "n3")
    assert driver.log == [("boot", ["n1"]), ("boot", ["n2"])]
    driver.finish("n2")
    assert driver.log[-1] == ("boot", ["n3"])


def test_a_window_pauses_between_its_batches() -> None:
    workflow = flow(
        Implementation("a", (step("boot", window="w", timeout_ms=9000),)),
        windows=(Window("w", 2, pause_ms=5000),),
    )
    driver = Driver(workflow, "n1", "n2", "n3")
    driver.finish("n1", 100)
    driver.finish("n2", 100)
    assert len(driver.log) == 2
    assert driver.deployment.next_tick_ms(100) == 5000
    driver.take(list(driver.deployment.tick(5000)))
    assert driver.log[-1] == ("boot", ["n3"])


def test_a_broadcast_waits_for_all_that_are_on_their_way() -> None:
    parts = (step("one"), step("send", together=True, gather_ms=500))
    driver = Driver(flow(Implementation("a", parts)), "n1", "n2", "n3")
    driver.finish("n1")
    driver.finish("n2", ok=False)
    assert driver.log[-1] != ("send", ["n1"])
    driver.finish("n3")
    assert driver.log[-1] == ("send", ["n1", "n3"])


def test_a_broadcast_waits_no_longer_than_told_and_late_ones_get_their_own() -> None:
    parts = (step("one", timeout_ms=9000), step("send", together=True, gather_ms=500))
    driver = Driver(flow(Implementation("a", parts)), "n1", "n2")
    driver.finish("n1", 100)
    assert driver.deployment.next_tick_ms(100) == 600
    driver.take(list(driver.deployment.tick(600)))
    assert driver.log[-1] == ("send", ["n1"])
    driver.finish("n2", 700)
    assert driver.log[-1] == ("send", ["n2"])


def test_nodes_are_held_at_a_breakpoint_until_released() -> None:
    workflow = flow(Implementation("a", (step("one"), step("two"))), breakpoints=("two",))
    driver = Driver(workflow, "n1")
    driver.finish("n1")
    assert driver.status("n1") is Status.HELD
    assert driver.deployment.idle
    driver.take(list(driver.deployment.release(["n1"], 0)))
    driver.finish("n1")
    assert driver.status("n1") is Status.DEPLOYED


def test_a_breakpoint_or_a_hook_at_no_step_is_refused() -> None:
    with pytest.raises(KaError, match="no step 'nowhere'"):
        Deployment(flow(Implementation("a", (step("one"),)), breakpoints=("nowhere",)), [])
    with pytest.raises(KaError, match="no step 'nowhere'"):
        with_hooks(default_workflow(Options()), [Hook("nowhere", When.AFTER, ("true",))])


def test_hooks_go_before_after_and_instead() -> None:
    base = flow(Implementation("a", (step("one"), step("two"))))
    hooks = [
        Hook("one", When.BEFORE, ("a",)),
        Hook("one", When.AFTER, ("b",), ignore_failure=True),
        Hook("two", When.INSTEAD, ("c",)),
    ]
    driver = Driver(with_hooks(base, hooks), "n1")
    driver.finish("n1")
    driver.finish("n1")
    driver.finish("n1", ok=False)  # the hook after, whose failure is ignored
    driver.finish("n1")
    assert [name for name, _ in driver.log] == ["before-one", "one", "after-one", "instead-two"]
    assert driver.status("n1") is Status.DEPLOYED


def test_a_given_up_node_is_cancelled_and_says_why() -> None:
    driver = Driver(flow(Implementation("a", (step("one"),))), "n1")
    actions = driver.deployment.give_up(["n1"], 5, "aborted by root")
    assert actions == [Cancel("n1", driver.tickets["n1"])]
    assert driver.deployment.nodes["n1"].reason == "aborted by root"


def test_a_restored_node_begins_its_step_again_and_loses_no_try() -> None:
    workflow = flow(Implementation("a", (step("one"), step("two", retries=1))))
    state = NodeState("n1", step=1, step_attempt=1, status=Status.RUNNING)
    deployment = Deployment(workflow, [state])
    assert started(list(deployment.tick(0))) == [("two", ["n1"])]
    assert deployment.nodes["n1"].step_attempt == 1


@given(st.integers(0, 2**32), st.integers(1, 12))
def test_whatever_happens_every_node_ends_with_a_verdict(seed: int, count: int) -> None:
    """Results at random times, some never; the head restored from its records in between."""
    rng = random.Random(seed)
    workflow = default_workflow(
        Options(image_count=2, reboot_window=3, reboot_pause_ms=2000, kexec=True)
    )
    deployment = Deployment(workflow, [NodeState(f"n{index}") for index in range(count)])
    stored: dict[str, NodeState] = {}
    pending: list[tuple[int, str, int, bool]] = []
    now_ms = 0
    actions = list(deployment.tick(now_ms))
    for _ in range(20_000):
        changed, _ = deployment.take_changes()
        stored.update((node.name, node) for node in changed)
        for one in actions:
            if isinstance(one, Run):
                for name, ticket in one.tickets.items():
                    if rng.random() < 0.95:
                        at = now_ms + rng.randrange(1, 30_000)
                        pending.append((at, name, ticket, rng.random() < 0.8))
        inside = sum(
            node.status is Status.RUNNING and deployment.step_of(node).window == "reboot"
            for node in deployment.nodes.values()
        )
        assert inside <= 3
        if deployment.ended:
            break
        if rng.random() < 0.02:
            deployment = Deployment(workflow, stored.values())
            pending = []
            actions = list(deployment.tick(now_ms))
            continue
        tick_ms = deployment.next_tick_ms(now_ms)
        pending.sort()
        if pending and (tick_ms is None or pending[0][0] <= tick_ms):
            at, name, ticket, ok = pending.pop(0)
            now_ms = max(now_ms, at)
            actions = list(deployment.finished(name, ticket, now_ms, ok=ok, reason="chance"))
        else:
            assert tick_ms is not None, "nothing would ever happen again"
            now_ms = tick_ms
            actions = list(deployment.tick(now_ms))
    assert deployment.ended
    assert all(node.reason for node in stored.values() if node.status is Status.FAILED)
