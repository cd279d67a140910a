"""The head: carries out a deployment's workflow, and remembers it before it acts.

Position: workflow.py (what next) -> this (when, and stored) -> deploying.py (how).

Concurrency
  * one task runs the loop: results in, automaton, one commit, actions out;
  * one task for each started step; it hands in results by `_Running.report` and never touches the
    automaton;
  * results that come while a commit is made wait for the next turn, so commits are batched.
The commit is made in the loop itself, without a thread: nothing may happen before it has.

A head that is killed is started again on the same store: running steps begin again.

Operators' cancels come through the store, so that any process can ask for one: looked for once in
`LOOK_S`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import trio

from common import log
from common.errors import Code, KaError
from kadeploy.steps import MicroStep
from kadeploy.store import Store
from kadeploy.workflow import Action, Cancel, Deployment, NodeState, Run, StepRecord

__all__ = ["Head", "Report", "Steps"]

LOOK_S = 1.0
_logger = log.get("kadeploy.head")


class Report(Protocol):
    """Says of a node what went wrong; empty: it is done, and *note* may say more of it.

    Once for a node; later calls are void.
    """

    def __call__(self, node: str, fault: str, note: str = "", /) -> None: ...


class Steps(Protocol):
    """Carries out micro-steps on nodes."""

    async def run(self, step: MicroStep, nodes: Sequence[str], report: Report) -> None:
        """Do a step to nodes; report each, or raise for all not yet reported: KaError, or a bug.

        Cancelled when the time is over: what was begun on a node must be safe to begin again.
        """


@dataclass(slots=True)
class _Running:
    """A started step: who is in it."""

    tickets: Mapping[str, int]
    scope: trio.CancelScope
    open: set[str] = field(default_factory=set)


class _Result(NamedTuple):
    node: str
    ticket: int
    fault: str
    final: bool
    note: str


class Head:
    def __init__(
        self,
        store: Store,
        number: int,
        deployment: Deployment,
        steps: Steps,
        *,
        release: Sequence[str] = (),
        on_change: Callable[[Sequence[NodeState], Sequence[StepRecord]], None] | None = None,
    ) -> None:
        """*release*: nodes held at a breakpoint that may go on."""
        self._store = store
        self._number = number
        self._deployment = deployment
        self._steps = steps
        self._release = release
        self._on_change = on_change
        self._results: list[_Result] = []
        self._wake = trio.Event()
        self._running: dict[int, _Running] = {}

    async def run(self) -> None:
        """Go on until every node has a verdict or is held."""
        offset_ms = time.time_ns() // 1_000_000 - _now_ms()
        async with trio.open_nursery() as nursery:
            actions = self._cancelled() + self._deployment.release(self._release, _now_ms())
            while True:
                self._save(offset_ms)
                for action in actions:
                    self._carry_out(action, nursery)
                if self._deployment.idle:
                    break
                actions = await self._next_actions()
        if self._deployment.ended:
            self._store.end(self._number, _now_ms() + offset_ms)

    def _save(self, offset_ms: int) -> None:
        nodes, records = self._deployment.take_changes()
        if not nodes and not records:
            return
        self._store.save(self._number, nodes, records, _now_ms() + offset_ms, offset_ms)
        for one in records:
            if not one.ok:
                _logger.warning(
                    "step.failed", node=one.node, step=one.step, how=one.implementation,
                    attempt=one.attempt, reason=one.reason,
                )  # fmt: skip
        if self._on_change is not None:
            self._on_change(nodes, records)

    async def _next_actions(self) -> list[Action]:
        now_ms = _now_ms()
        next_ms = self._deployment.next_tick_ms(now_ms)
        wait_s = LOOK_S if next_ms is None else (next_ms - now_ms) / 1000
        with trio.move_on_after(min(wait_s, LOOK_S)):
            await self._wake.wait()
        self._wake = trio.Event()
        results, self._results = self._results, []
        now_ms = _now_ms()
        actions: list[Action] = []
        for one in results:
            running = self._running.pop(one.ticket, None)
            if running is not None:
                running.open.discard(one.node)
            actions += self._deployment.finished(
                one.node,
                one.ticket,
                now_ms,
                ok=not one.fault,
                reason=one.fault or one.note,
                final=one.final,
            )
        return actions + self._cancelled() + self._deployment.tick(now_ms)

    def _cancelled(self) -> list[Action]:
        actions: list[Action] = []
        for node, reason in self._store.cancels(self._number).items():
            if self._deployment.nodes[node].ended:
                continue
            actions += self._deployment.give_up([node], _now_ms(), reason)
        return actions

    def _carry_out(self, action: Action, nursery: trio.Nursery) -> None:
        if isinstance(action, Cancel):
            running = self._running.pop(action.ticket, None)
            if running is not None:
                running.open.discard(action.node)
                # A broadcast goes on for the others.
                if not running.open:
                    running.scope.cancel()
            return
        running = _Running(action.tickets, trio.CancelScope(), set(action.tickets))
        for ticket in action.tickets.values():
            self._running[ticket] = running
        nursery.start_soon(self._run_step, action, running)

    async def _run_step(self, action: Run, running: _Running) -> None:
        left = dict(running.tickets)
        final = False

        def report(node: str, fault: str, note: str = "", /) -> None:
            ticket = left.pop(node, None)
            if ticket is not None:
                self._results.append(_Result(node, ticket, fault, final, note))
                self._wake.set()

        fault = "it ended without a word about this node"
        with running.scope:
            try:
                await self._steps.run(action.step, list(left), report)
            except KaError as error:
                fault = str(error)
                final = action.step.refusal_is_final and error.code is Code.USAGE
            except Exception as error:  # a bug, which must not end what goes on elsewhere
                _logger.error("step.broken", step=action.step.name, exc_info=error)
                fault = f"internal error: {error!r:.200}"
        if running.scope.cancelled_caught:
            fault = "cancelled"
        for node in list(left):
            report(node, fault)


def _now_ms() -> int:
    return int(trio.current_time() * 1000)
