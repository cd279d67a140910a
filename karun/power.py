"""Reboots in windows: who is told to reboot when, and which node came back.  Pure.

A node that answers after the order is not a node that has rebooted: it may not have gone down yet.
What tells is the boot id (/proc/sys/kernel/random/boot_id), new with every boot.  So:

    waiting -> asked for its boot id -> ordered -> probed until another boot id -> up, or failed

At most `window` nodes are between the first question and their verdict, so that the rest of the
cluster goes on working; when `failures_max` nodes have failed no others are begun, so that a kernel
that does not boot costs one window and not the cluster.

Invariants
  * every node gets exactly one verdict, the latest at its deadline;
  * a node is ordered at most once;
  * answers that come late, twice, or for a node that has its verdict change nothing.

Not here: the clock (`now`, in seconds) and the asking, ordering and probing (karun/reboot.py).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from karun.naming import Folding
from karun.results import printable

__all__ = ["Action", "Ask", "Order", "Policy", "Probe", "Reboot", "Verdict"]


class Verdict(enum.Enum):
    """What became of a node; the value is what JSON calls it."""

    UP = "up"
    FAILED = "failed"
    SKIPPED = "skipped"
    """Not begun, because too many others failed or everything was stopped."""
    UNFINISHED = "unfinished"
    """Ordered when everything was stopped: it goes on, and nobody looks."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How nodes are rebooted."""

    window: int = 0
    """Nodes at a time; 0: all."""
    failures_max: int = 0
    """Failures after which no node is begun any more; 0: as many as the window is wide."""
    hard: bool = False
    """A node that does not answer is rebooted all the same: the power is switched from outside."""
    ask_s: float = 15.0
    """From the question for the boot id to its answer."""
    order_s: float = 30.0
    """From the order to word that it was given."""
    down_s: float = 180.0
    """From the order until the node no longer answers under its old boot id."""
    up_s: float = 900.0
    """From the order until it answers under a new one."""
    probe_s: float = 5.0
    """Between two probes of a node."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask a node for its boot id, and call `asked`."""

    node: int


@dataclass(frozen=True, slots=True)
class Order:
    """Tell a node to reboot, and call `ordered`."""

    node: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask a node for its boot id, and call `probed`."""

    node: int


Action = Ask | Order | Probe


class _Phase(enum.Enum):
    WAITING = 0
    ASKED = 1
    ORDERED = 2
    PROBED = 3
    """Asked whether it is back; an answer is due."""
    RESTING = 4
    """Until the next probe."""
    OVER = 5


_UNDER_WAY = (_Phase.ASKED, _Phase.ORDERED, _Phase.PROBED, _Phase.RESTING)


class _Node:
    __slots__ = ("boot_id", "due", "is_down", "ordered_at", "phase", "reason", "verdict")

    def __init__(self) -> None:
        self.phase = _Phase.WAITING
        self.boot_id = ""
        """Before the order; empty when the node did not answer."""
        self.due = 0.0
        self.ordered_at = 0.0
        self.is_down = False
        self.verdict = Verdict.SKIPPED
        self.reason = ""


class Reboot:
    """The reboot of many nodes, by rank."""

    def __init__(self, node_count: int, policy: Policy) -> None:
        self._policy = policy
        self._nodes = [_Node() for _ in range(node_count)]
        self._window = policy.window or node_count
        self._failures_max = policy.failures_max or self._window
        self._failed_count = 0
        self._over_count = 0
        self._begun_count = 0

    @property
    def is_over(self) -> bool:
        """Whether nothing is under way and nothing will be begun."""
        return self._over_count == self._begun_count and (
            self._begun_count == len(self._nodes) or self._failed_count >= self._failures_max
        )

    def tick(self, now: float) -> list[Action]:
        """Return what is to be done now: first of all at the start, then whenever it is due."""
        actions = [action for rank in self._under_way() for action in self._advance(rank, now)]
        return actions + self._begin(now)

    def due(self) -> float | None:
        """Return when `tick` has something to do, if nothing is heard before."""
        return min((self._nodes[rank].due for rank in self._under_way()), default=None)

    def asked(self, rank: int, boot_id: str, now: float) -> list[Action]:
        """A node told its boot id before the reboot; empty: it does not answer."""
        return self._asked(rank, boot_id, now) + self._begin(now)

    def ordered(self, rank: int, refusal: str, now: float) -> list[Action]:
        """The order was given, or refused with a reason.

        A connection that breaks off is no refusal: the reboot itself breaks it.
        """
        node = self._nodes[rank]
        if node.phase is not _Phase.ORDERED:
            return []
        if refusal:
            self._fail(node, f"would not reboot ({printable(refusal)})")
        else:
            node.phase, node.due = _Phase.RESTING, now + self._policy.probe_s
        return self._begin(now)

    def probed(self, rank: int, boot_id: str, now: float) -> list[Action]:
        """A node told its boot id after the order; empty: it does not answer."""
        node = self._nodes[rank]
        if node.phase is not _Phase.PROBED:
            return []
        if boot_id and boot_id != node.boot_id:
            self._end(node, Verdict.UP, "")
        else:
            node.is_down = node.is_down or not boot_id
            node.phase, node.due = _Phase.RESTING, now + self._policy.probe_s
            self._advance(rank, now)  # nothing but a deadline can be due
        return self._begin(now)

    def phase_counts(self) -> tuple[int, int, int, int]:
        """Return how many nodes wait, are under way, are up, and failed."""
        up = self._over_count - self._failed_count
        under_way = self._begun_count - self._over_count
        return len(self._nodes) - self._begun_count, under_way, up, self._failed_count

    def verdicts(self) -> Iterator[tuple[Verdict, str]]:
        """Yield verdict and reason of each node, by rank."""
        return map(self._verdict, self._nodes)

    def exit_code(self) -> int:
        """Return 0 when all came back, 2 when some did, 1 when none did."""
        up = sum(node.verdict is Verdict.UP for node in self._nodes)
        return 0 if up == len(self._nodes) else 2 if up else 1

    def summary(self, names: Folding) -> list[str]:
        """Return a line for each kind of end but the good one, folded by reason."""
        found: dict[tuple[Verdict, str], list[int]] = {}
        for rank, end in enumerate(self.verdicts()):
            if end[0] is not Verdict.UP:
                found.setdefault(end, []).append(rank)
        return [f"{names.fold(ranks)}: {reason}" for (_, reason), ranks in found.items()]

    def _verdict(self, node: _Node) -> tuple[Verdict, str]:
        if node.phase is _Phase.OVER:
            return node.verdict, node.reason
        if node.phase in (_Phase.ORDERED, _Phase.PROBED, _Phase.RESTING):
            return Verdict.UNFINISHED, "ordered, and not yet seen to come back"
        too_many = self._failed_count >= self._failures_max
        return Verdict.SKIPPED, "not begun, too many others failed" if too_many else "not begun"

    def _under_way(self) -> Iterator[int]:
        return (rank for rank in range(self._begun_count) if self._nodes[rank].phase in _UNDER_WAY)

    def _begin(self, now: float) -> list[Action]:
        """Return questions to as many new nodes as the window has room for."""
        actions: list[Action] = []
        while (
            self._begun_count < len(self._nodes)
            and self._begun_count - self._over_count < self._window
            and self._failed_count < self._failures_max
        ):
            node = self._nodes[self._begun_count]
            node.phase, node.due = _Phase.ASKED, now + self._policy.ask_s
            actions.append(Ask(self._begun_count))
            self._begun_count += 1
        return actions

    def _asked(self, rank: int, boot_id: str, now: float) -> list[Action]:
        node = self._nodes[rank]
        if node.phase is not _Phase.ASKED:
            return []
        if not boot_id and not self._policy.hard:
            self._fail(node, "unreachable before the reboot")
            return []
        node.boot_id, node.is_down = boot_id, not boot_id
        node.phase, node.ordered_at = _Phase.ORDERED, now
        node.due = now + self._policy.order_s
        return [Order(rank)]

    def _advance(self, rank: int, now: float) -> list[Action]:
        """Do what is due for a node: give it up, or probe it again."""
        node, policy = self._nodes[rank], self._policy
        if node.phase is _Phase.ASKED and now >= node.due:
            return self._asked(rank, "", now)
        if node.phase is _Phase.ORDERED and now >= node.due:
            # Whether it was heard will be seen: the node goes down, or it does not.
            node.phase, node.due = _Phase.RESTING, now + policy.probe_s
        if node.phase not in (_Phase.RESTING, _Phase.PROBED):
            return []
        waited = now - node.ordered_at
        if waited >= policy.up_s:
            how = "did not come back" if node.is_down else "did not go down"
            self._fail(node, f"{how} within {policy.up_s:.0f} s")
        elif waited >= policy.down_s and not node.is_down:
            self._fail(node, f"did not go down within {policy.down_s:.0f} s")
        elif now >= node.due and node.phase is _Phase.RESTING:
            node.phase = _Phase.PROBED
            node.due = node.ordered_at + (policy.up_s if node.is_down else policy.down_s)
            return [Probe(rank)]
        return []

    def _fail(self, node: _Node, reason: str) -> None:
        self._failed_count += 1
        self._end(node, Verdict.FAILED, reason)

    def _end(self, node: _Node, verdict: Verdict, reason: str) -> None:
        node.phase, node.verdict, node.reason = _Phase.OVER, verdict, reason
        self._over_count += 1
