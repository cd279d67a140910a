"""Deployments begun, carried out and cancelled: the one way, for commands and for the REST API.

Position: cli.py, serve.py -> this -> head.py with a deployer.

A deployment belongs to the store, not to who began it: any process on the head may carry it out,
one at a time, and any may cancel nodes of it.  No two that are carried out have a node in common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import Code, KaError
from kadeploy import descriptions
from kadeploy.deploying import Deployer, Target
from kadeploy.environment import OsKind
from kadeploy.head import Head, Steps
from kadeploy.settings import Settings
from kadeploy.steps import Workflow, default_workflow, with_hooks
from kadeploy.store import EnvironmentRow, Store
from kadeploy.workflow import Deployment, NodeState, Status, StepRecord

__all__ = ["MakeSteps", "OnChange", "Request", "begin", "cancel", "carry_out", "target_of"]

MakeSteps = Callable[[Target, Settings, Sequence[str]], Steps]
OnChange = Callable[[Sequence[NodeState], Sequence[StepRecord]], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What is wanted."""

    environment: str
    nodes: Sequence[str]
    version: int | None = None
    missing: bool = False
    """Leave out nodes that have it already."""
    breakpoints: tuple[str, ...] = ()
    user: str = ""
    """Who asked by the REST API; empty: a command."""


def target_of(settings: Settings, row: EnvironmentRow, token: str) -> Target:
    path = Path(row.path)
    environment = descriptions.parse_environment(row.text, path)
    return Target(environment, path.parent, descriptions.read_nodes(settings.nodes), token)


def begin(store: Store, settings: Settings, request: Request, now_ms: int) -> int | None:
    """Record a deployment; return its number, None when all nodes have it.

    Raises USAGE for what cannot be done, BUSY when another deployment has one of the nodes: before
    anything is begun.
    """
    row = store.environment(request.environment, request.version)
    names = list(request.nodes)
    if request.missing:
        names = [one for one in names if store.has(one) != (row.name, row.version)]
        if not names:
            return None
    if not names:
        raise KaError(Code.USAGE, "no nodes named")
    target = target_of(settings, row, "")
    target.stored_sizes()
    Deployer(target, settings, names)
    workflow = _workflow(settings, target, request.breakpoints)
    workflow.validate()
    store.require_free(names)
    content = {
        "breakpoints": list(request.breakpoints),
        "user": request.user,
        "outline": workflow.outline(),
    }
    return store.begin(row, content, names, now_ms)


def _workflow(settings: Settings, target: Target, breakpoints: Sequence[str]) -> Workflow:
    count = len(list(target.environment.images()))
    powered = any(node.power for node in target.nodes.nodes)
    asked = target.environment.default_system.os is OsKind.LINUX
    options = replace(settings.workflow, image_count=count, powered=powered, asked=asked)
    workflow = with_hooks(default_workflow(options), settings.hook)
    return replace(workflow, breakpoints=tuple(breakpoints))


async def carry_out(
    store: Store,
    settings: Settings,
    number: int,
    *,
    release: bool,
    on_begun: Callable[[], None] = lambda: None,
    on_change: OnChange | None = None,
    make_steps: MakeSteps = Deployer,
) -> list[NodeState]:
    """Be the head of a deployment until its nodes have verdicts or are held; return them.

    *release*: held nodes go on.  Raises BUSY when another process is its head, or that of another
    deployment with one of its nodes; USAGE when its steps are others now: where a node is, is kept
    as a place among them.
    *on_begun* is called when nothing can be refused any more.
    """
    with store.claim(number):
        row = store.deployment(number)
        environment = store.environment(row.environment, row.version)
        token = f"{row.environment} {row.version} deployment {number}"
        target = target_of(settings, environment, token)
        states = store.nodes(number)
        store.require_free([node.name for node in states if not node.ended], number)
        held = [node.name for node in states if node.status is Status.HELD]
        workflow = _workflow(settings, target, row.request.get("breakpoints", ()))
        outline = workflow.outline()
        if row.request.get("outline", outline) != outline:
            raise KaError(
                Code.USAGE,
                f"deployment {number} was begun with other steps: set hooks, kexec and power as"
                " they were, or cancel it and begin anew",
            )
        steps = make_steps(target, settings, [node.name for node in states])
        head = Head(
            store,
            number,
            Deployment(workflow, states),
            steps,
            release=held if release else (),
            on_change=on_change,
        )
        on_begun()
        await head.run()
        return store.nodes(number)


def cancel(store: Store, number: int, names: Sequence[str], reason: str, now_ms: int) -> None:
    """Give nodes up, whether a head is at work or not; raises USAGE when it has ended.

    No nodes are refused: a shell's variable that was never set must not end what all do.
    """
    if store.deployment(number).ended_ms is not None:
        raise KaError(Code.USAGE, f"deployment {number} has ended")
    if not names:
        raise KaError(Code.USAGE, "no nodes named")
    states = store.nodes(number)
    strange = set(names) - {node.name for node in states}
    if strange:
        raise KaError(Code.USAGE, f"not in deployment {number}: {min(strange)}")
    store.ask_cancel(number, names, reason)
    if store.claimed(number):
        return  # its head sees to it
    with store.claim(number):
        given_up = [
            replace(node, status=Status.FAILED, reason=reason)
            for node in states
            if node.name in names and not node.ended
        ]
        store.save(number, given_up, (), now_ms)
        if all(node.ended for node in store.nodes(number)):
            store.end(number, now_ms)
