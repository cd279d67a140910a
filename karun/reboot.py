"""Carries out a reboot plan: asks, orders and probes nodes, and waits for the deadlines.

The plan decides (karun/power.py); how a node is asked and ordered is the caller's `Hands`: over
ssh, or a power switch.  An answer that never comes is the plan's deadline, not a hang: each
question is cancelled when the plan has no more use for it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from karun.power import Action, Ask, Order, Policy, Reboot

__all__ = ["Hands", "reboot"]

TICK_S = 0.25
"""Between two looks at the deadlines, each of which costs a few milliseconds for 10,000 nodes."""


class Hands(Protocol):
    """What reaches the nodes.  Neither may raise for a node that does not answer."""

    async def boot_id(self, node: int) -> str:
        """Return a node's boot id; empty when it does not answer."""

    async def order(self, node: int) -> str:
        """Have a node reboot; return why it was refused, or nothing.

        A connection that breaks off is no refusal.
        """


async def reboot(
    node_count: int,
    policy: Policy,
    hands: Hands,
    *,
    changed: Callable[[Reboot], None] = lambda plan: None,
) -> Reboot:
    """Reboot nodes and return the plan with its verdicts.

    *changed* is called after every answer, to show how far it is.  When this is cancelled no more
    is ordered; what was ordered goes on.
    """
    plan = Reboot(node_count, policy)
    over = trio.Event()

    async def carry_out(nursery: trio.Nursery, action: Action) -> None:
        if isinstance(action, Order):
            refusal = await _before(policy.order_s, hands.order, action.node)
            found = plan.ordered(action.node, refusal, trio.current_time())
        elif isinstance(action, Ask):
            boot_id = await _before(policy.ask_s, hands.boot_id, action.node)
            found = plan.asked(action.node, boot_id, trio.current_time())
        else:
            boot_id = await _before(policy.ask_s, hands.boot_id, action.node)
            found = plan.probed(action.node, boot_id, trio.current_time())
        start(nursery, found)
        changed(plan)

    def start(nursery: trio.Nursery, actions: list[Action]) -> None:
        for action in actions:
            nursery.start_soon(carry_out, nursery, action)
        if plan.is_over:
            over.set()

    async with trio.open_nursery() as nursery:
        while not plan.is_over:
            start(nursery, plan.tick(trio.current_time()))
            with trio.move_on_after(TICK_S):
                await over.wait()
        nursery.cancel_scope.cancel()
    return plan


async def _before(seconds: float, ask: Callable[[int], Awaitable[str]], node: int) -> str:
    """Return the answer, or nothing when the time is up."""
    with trio.move_on_after(seconds):
        return await ask(node)
    return ""
