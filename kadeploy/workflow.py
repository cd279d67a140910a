"""The workflow of a deployment: what each node does next, decided without clock, disk or network.

Sans-I/O.  `head.py` feeds events in (`finished`, `tick`, `release`) and carries out the actions
that come out; what changed is fetched with `take_changes` and must be on stable storage before the
actions are carried out: then a head that is killed goes on where it was.

Every node is on its own: one that fails holds up nobody.  Only a step that is done `together` waits
for others, and no longer than its `gather_ms`.

Invariants
  * a node has at most one running step, told by its ticket; results with an old ticket are void;
  * a window never holds more nodes than its count;
  * a node that is restored in a running step begins that step again and loses no try by it;
  * a verdict is final.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from kadeploy.steps import Implementation, MicroStep, Workflow

__all__ = [
    "Action",
    "Cancel",
    "Deployment",
    "NodeState",
    "Run",
    "Status",
    "StepRecord",
]


class Status(enum.Enum):
    WAITING = "waiting"
    """For a window, for others, or only for the next look."""
    RUNNING = "running"
    HELD = "held"
    """At a breakpoint."""
    DEPLOYED = "deployed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class NodeState:
    """Where a node is.  This is all that is stored of it."""

    name: str
    macro: int = 0
    implementation: int = 0
    attempt: int = 0
    """Tries of this implementation used up."""
    step: int = 0
    step_attempt: int = 0
    status: Status = Status.WAITING
    reason: str = ""
    """Why the last try failed; of a failed node, its verdict."""
    released: bool = False
    """Its breakpoint is behind it."""

    @property
    def ended(self) -> bool:
        return self.status in (Status.DEPLOYED, Status.FAILED)


@dataclass(frozen=True, slots=True)
class Run:
    """Start a micro-step; answer each node's ticket with `finished`."""

    step: MicroStep
    tickets: Mapping[str, int]
    """By node."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Its time is over: stop what was started with this ticket."""

    node: str
    ticket: int


Action = Run | Cancel


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One try of one step of one node, for the history."""

    node: str
    macro: str
    implementation: str
    step: str
    attempt: int
    started_ms: int
    ended_ms: int
    ok: bool
    reason: str
    """Why it failed; or what there is to say of one that did not."""


class Deployment:
    """All nodes of one deployment.  Times are the head's monotonic milliseconds."""

    def __init__(self, workflow: Workflow, nodes: Iterable[NodeState]) -> None:
        workflow.validate()
        self._workflow = workflow
        self._nodes = {node.name: node for node in nodes}
        self._windows = {window.name: window for window in workflow.windows}
        self._entered: dict[str, list[int]] = {name: [] for name in self._windows}
        self._tickets: dict[str, int] = {}
        self._next_ticket = 1
        self._started_ms: dict[str, int] = {}
        self._deadline_ms: dict[str, int] = {}
        self._waiting_since_ms: dict[str, int] = {}
        self._changed: set[str] = set(self._nodes)
        self._records: list[StepRecord] = []
        for node in list(self._nodes.values()):
            if node.status is Status.RUNNING:
                self._put(replace(node, status=Status.WAITING))

    # ------------------------------------------------------------ to look at

    @property
    def nodes(self) -> Mapping[str, NodeState]:
        return self._nodes

    @property
    def ended(self) -> bool:
        return all(node.ended for node in self._nodes.values())

    @property
    def idle(self) -> bool:
        """Nothing will happen by itself: all have ended or are held."""
        return all(node.ended or node.status is Status.HELD for node in self._nodes.values())

    def step_of(self, node: NodeState) -> MicroStep:
        return self._implementation(node).steps[node.step]

    def macro_name(self, node: NodeState) -> str:
        return self._workflow.macros[node.macro].macro.value

    def take_changes(self) -> tuple[list[NodeState], list[StepRecord]]:
        """Return what is to be stored since the last call."""
        changed = [self._nodes[name] for name in sorted(self._changed)]
        records, self._records = self._records, []
        self._changed = set()
        return changed, records

    def next_tick_ms(self, now_ms: int) -> int | None:
        """Return when `tick` has something to do at the latest; None: only events can matter."""
        times = list(self._deadline_ms.values())
        for node in self._nodes.values():
            if node.status is not Status.WAITING:
                continue
            step = self.step_of(node)
            since = self._waiting_since_ms.get(node.name, now_ms)
            if step.together:
                times.append(since + step.gather_ms)
            window = self._windows.get(step.window)
            if window is not None and window.pause_ms:
                recent = self._recent(step.window, now_ms)
                if len(recent) >= window.count:
                    times.append(recent[-window.count] + window.pause_ms)
        return max(now_ms, min(times)) if times else None

    # ------------------------------------------------------------ events

    def tick(self, now_ms: int) -> list[Action]:
        """Let time pass: end what is overdue, start what may start."""
        actions: list[Action] = []
        overdue = [name for name, at in self._deadline_ms.items() if at <= now_ms]
        for name in overdue:
            ticket = self._tickets[name]
            actions.append(Cancel(name, ticket))
            self._end(name, now_ms, ok=False, reason="no end in time")
        return actions + self._start(now_ms)

    def finished(
        self,
        node: str,
        ticket: int,
        now_ms: int,
        *,
        ok: bool,
        reason: str = "",
        final: bool = False,
    ) -> list[Action]:
        """Take a step's result.  An old ticket's is void.  *final*: no other try would help."""
        if self._tickets.get(node) != ticket:
            return []
        self._end(node, now_ms, ok=ok, reason=reason, final=final)
        return self._start(now_ms)

    def release(self, nodes: Iterable[str], now_ms: int) -> list[Action]:
        """Let held nodes go on."""
        for name in nodes:
            node = self._nodes[name]
            if node.status is Status.HELD:
                self._put(replace(node, status=Status.WAITING, released=True))
        return self._start(now_ms)

    def give_up(self, nodes: Iterable[str], now_ms: int, reason: str) -> list[Action]:
        """Fail nodes for a reason from outside (an operator's abort)."""
        actions: list[Action] = []
        for name in nodes:
            node = self._nodes[name]
            if node.ended:
                continue
            if name in self._tickets:
                actions.append(Cancel(name, self._tickets[name]))
                self._record(name, now_ms, ok=False, reason=reason)
            self._put(replace(node, status=Status.FAILED, reason=reason))
        return actions + self._start(now_ms)

    # ------------------------------------------------------------ inside

    def _implementation(self, node: NodeState) -> Implementation:
        return self._workflow.macros[node.macro].implementations[node.implementation]

    def _put(self, node: NodeState) -> None:
        self._nodes[node.name] = node
        self._changed.add(node.name)
        if node.status is not Status.WAITING:
            self._waiting_since_ms.pop(node.name, None)

    def _record(self, name: str, now_ms: int, *, ok: bool, reason: str) -> None:
        node = self._nodes[name]
        self._records.append(
            StepRecord(
                name,
                self.macro_name(node),
                self._implementation(node).name,
                self.step_of(node).name,
                node.step_attempt,
                self._started_ms.pop(name),
                now_ms,
                ok,
                reason,
            )
        )
        del self._tickets[name], self._deadline_ms[name]

    def _end(self, name: str, now_ms: int, *, ok: bool, reason: str, final: bool = False) -> None:
        node = self._nodes[name]
        step = self.step_of(node)
        self._record(name, now_ms, ok=ok, reason=reason)
        if ok or (step.ignore_failure and node.step_attempt >= step.retries):
            self._put(self._after_success(node))
        else:
            reason = f"{step.name}: {reason}"
            failed = replace(node, status=Status.FAILED, reason=reason)
            self._put(failed if final else self._after_failure(node, step, reason))

    def _after_success(self, node: NodeState) -> NodeState:
        going = replace(node, status=Status.WAITING, step_attempt=0, released=False)
        if node.step + 1 < len(self._implementation(node).steps):
            return replace(going, step=node.step + 1)
        if node.macro + 1 < len(self._workflow.macros):
            return replace(going, macro=node.macro + 1, implementation=0, attempt=0, step=0)
        return replace(node, status=Status.DEPLOYED, reason="")

    def _after_failure(self, node: NodeState, step: MicroStep, reason: str) -> NodeState:
        again = replace(node, status=Status.WAITING, reason=reason)
        if node.step_attempt < step.retries:
            return replace(again, step_attempt=node.step_attempt + 1)
        again = replace(again, step=0, step_attempt=0, released=False)
        if node.attempt < self._implementation(node).retries:
            return replace(again, attempt=node.attempt + 1)
        if node.implementation + 1 < len(self._workflow.macros[node.macro].implementations):
            return replace(again, implementation=node.implementation + 1, attempt=0)
        return replace(node, status=Status.FAILED, reason=reason)

    def _recent(self, window: str, now_ms: int) -> list[int]:
        pause_ms = self._windows[window].pause_ms
        self._entered[window] = [at for at in self._entered[window] if at > now_ms - pause_ms]
        return self._entered[window]

    def _room(self, window_name: str, now_ms: int) -> int:
        window = self._windows[window_name]
        inside = sum(
            self.step_of(self._nodes[name]).window == window_name for name in self._tickets
        )
        room = window.count - inside
        if window.pause_ms:
            room = min(room, window.count - len(self._recent(window_name, now_ms)))
        return max(0, room)

    def _start(self, now_ms: int) -> list[Action]:
        """Start every waiting node that nothing keeps."""
        groups: dict[tuple[int, int, int], list[NodeState]] = {}
        for node in self._nodes.values():
            if node.status is not Status.WAITING:
                continue
            if self.step_of(node).name in self._workflow.breakpoints and not node.released:
                self._put(replace(node, status=Status.HELD))
                continue
            self._waiting_since_ms.setdefault(node.name, now_ms)
            groups.setdefault((node.macro, node.implementation, node.step), []).append(node)
        actions: list[Action] = []
        rooms: dict[str, int] = {}
        # Who is furthest goes first: it frees its windows and its place in the chain sooner.
        for key in sorted(groups, reverse=True):
            waiting = groups[key]
            step = self.step_of(waiting[0])
            if step.together and not self._gathered(key, waiting, step, now_ms):
                continue
            if step.window:
                room = rooms.setdefault(step.window, self._room(step.window, now_ms))
                waiting = waiting[:room]
                rooms[step.window] -= len(waiting)
            if waiting:
                actions += self._run(step, waiting, now_ms)
        return actions

    def _gathered(
        self,
        key: tuple[int, int, int],
        waiting: Sequence[NodeState],
        step: MicroStep,
        now_ms: int,
    ) -> bool:
        first = min(self._waiting_since_ms[node.name] for node in waiting)
        if now_ms >= first + step.gather_ms:
            return True
        return not any(
            node.status in (Status.WAITING, Status.RUNNING)
            and (node.macro, node.implementation, node.step) < key
            for node in self._nodes.values()
        )

    def _run(self, step: MicroStep, nodes: Sequence[NodeState], now_ms: int) -> list[Action]:
        tickets: dict[str, int] = {}
        for node in nodes:
            tickets[node.name] = self._tickets[node.name] = self._next_ticket
            self._next_ticket += 1
            self._started_ms[node.name] = now_ms
            self._deadline_ms[node.name] = now_ms + step.deadline_ms(len(self._nodes))
            self._put(replace(node, status=Status.RUNNING))
            if step.window:
                self._entered[step.window].append(now_ms)
        if step.together:
            return [Run(step, tickets)]
        return [Run(step, {name: ticket}) for name, ticket in tickets.items()]
