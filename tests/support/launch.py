"""A simulated launch: callers, hosts and the messages between them, in virtual time.

A call occupies its caller for `gap_s`; the called host's agent is ready `ready_s` after the call
began, if the host is healthy.  Messages take `latency_s`.  Checked at the end: everybody healthy
is up, once; everybody else is given up, by name.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from karun.launch_plan import (
    Action,
    Caller,
    LaunchPlan,
)

__all__ = ["Launch", "Site", "optimum_s"]

HEAD = 0


def optimum_s(count: int, gap_s: float, ready_s: float) -> float:
    """Return when the last of *count* nodes is ready in the postal model."""
    free_s, last_s = [0.0], 0.0
    for _ in range(count):
        now = free_s[0]
        last_s = now + ready_s
        heapq.heapreplace(free_s, now + gap_s)
        heapq.heappush(free_s, last_s)
    return last_s


@dataclass(frozen=True, slots=True)
class Site:
    """What there is to launch on."""

    count: int
    gap_s: float = 0.01
    ready_s: float = 0.15
    jitter: float = 0.0
    """Ready times differ by up to this part."""
    latency_s: float = 0.0005
    hung: frozenset[int] = frozenset()
    """Accept the connection and never say a word."""
    dead: frozenset[int] = frozenset()
    """Do not even answer."""
    refusing: frozenset[int] = frozenset()
    """Fail at once."""
    tardy: frozenset[int] = frozenset()
    """The first try takes ten times as long."""
    lame: frozenset[int] = frozenset()
    """Come up well, and then call twenty times as slowly."""
    mute: frozenset[int] = frozenset()
    """Come up, and cannot call anybody."""
    mortal: dict[int, float] = field(default_factory=dict)
    """Die so long after they came up; what they have called dies with them."""

    @property
    def hopeless(self) -> frozenset[int]:
        return self.hung | self.dead | self.refusing


class Launch:
    """One run."""

    def __init__(self, site: Site, seed: int = 1, **settings: Any) -> None:
        self.site = site
        self.now = 0.0
        self.up_s: dict[int, float] = {}
        """By rank: when it was first ready."""
        self.given_up: dict[int, str] = {}
        self.connect_count = 0
        self.abandoned: set[tuple[int, int]] = set()
        self._rng = random.Random(seed)
        self._settings = settings
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._event_count = 0
        self._callers = {HEAD: Caller(LaunchPlan(**settings), is_head=True)}
        self._parents: dict[int, int] = {}
        self._ticks: dict[int, float] = {}

    def run(self) -> Launch:
        self._on(HEAD, "given", range(1, self.site.count + 1))
        while self._heap:
            self.now, _, call, arguments = heapq.heappop(self._heap)
            call(*arguments)
        everybody = set(range(1, self.site.count + 1))
        assert set(self.up_s) == everybody - self.site.hopeless
        assert set(self.given_up) == self.site.hopeless
        assert all(caller.idle for caller in self._callers.values())
        return self

    @property
    def seconds(self) -> float:
        return max(self.up_s.values())

    def _at(self, time_s: float, call: Callable[..., None], *arguments: Any) -> None:
        self._event_count += 1
        heapq.heappush(self._heap, (time_s, self._event_count, call, arguments))

    def _on(self, rank: int, event: str, *arguments: Any, **keywords: Any) -> None:
        caller = self._callers.get(rank)
        if caller is None:  # it has died
            return
        for action in getattr(caller, event)(*arguments, self.now, **keywords):
            self._do(rank, action)
        if caller.wake_s < min(self._ticks.get(rank, 1e18), 1e17):
            self._ticks[rank] = caller.wake_s
            self._at(max(caller.wake_s, self.now), self._tick, rank)

    def _tick(self, rank: int) -> None:
        self._ticks.pop(rank, None)
        self._on(rank, "tick")

    def _later(self, rank: int, event: str, *arguments: Any) -> None:
        self._at(self.now + self.site.latency_s, self._on, rank, event, *arguments)

    def _do(self, rank: int, action: Action) -> None:
        match action.kind:
            case "connect":
                self._connect(rank, action.rank, action.attempt)
            case "give":
                self._at(self.now + self.site.latency_s, self._take, action.rank, action)
            case "ask":
                self._later(self._parents[rank], "asked", rank)
            case "recall":
                self._later(action.rank, "recalled")
            case "return":
                self._later(self._parents[rank], "returned", rank, action.ranks)
            case "give up":
                self.given_up[action.rank] = action.stage
                self._settle(rank, [action.rank])
            case "abandon":
                self.abandoned.add((action.rank, action.attempt))
            case other:
                raise AssertionError(other)

    def _take(self, rank: int, action: Action) -> None:
        if rank in self.site.mute:
            self._later(self._parents[rank], "cannot_call", rank, action.ranks)
        elif rank in self._callers:
            self._on(rank, "given", action.ranks, times=action.times)

    def _settle(self, caller: int, ranks: Iterable[int]) -> None:
        """Pass news up: each ancestor hears it from the child it came through."""
        delay_s = 0.0
        while caller != HEAD:
            parent = self._parents[caller]
            delay_s += self.site.latency_s
            self._at(self.now + delay_s, self._on, parent, "settled", caller, list(ranks))
            caller = parent

    def _connect(self, caller: int, rank: int, attempt: int) -> None:
        site = self.site
        self.connect_count += 1
        gap_s = site.gap_s * (20 if caller in site.lame else 1)
        self._at(self.now + gap_s, self._on, caller, "called")
        began_s = self.now
        ready_s = site.ready_s * (1 + site.jitter * self._rng.uniform(-1, 1))
        if rank in site.tardy and attempt == 1:
            ready_s *= 10
        if rank in site.refusing:
            self._at(began_s + 0.002, self._on, caller, "failed", rank, attempt)
        elif rank in site.hung:
            self._at(began_s + 0.002, self._on, caller, "reached", rank, attempt, "tcp")
        elif rank not in site.dead:
            self._at(began_s + ready_s, self._ready, caller, rank, attempt)

    def _ready(self, caller: int, rank: int, attempt: int) -> None:
        if (rank, attempt) in self.abandoned or caller not in self._callers:
            return
        assert rank not in self._callers, f"{rank} is up twice"
        self._parents[rank] = caller
        self.up_s.setdefault(rank, self.now)
        self._callers[rank] = Caller(LaunchPlan(**self._settings), is_head=False)
        if rank in self.site.mortal:
            self._at(self.now + self.site.mortal[rank], self._die, rank)
        self._settle(caller, [rank])
        self._on(caller, "ready", rank, attempt)

    def _die(self, rank: int) -> None:
        """A node dies, and its whole subtree, which has no other way to the head."""
        parent = self._parents[rank]
        doomed = {rank}
        for one in sorted(self._parents, key=lambda one: self.up_s[one]):
            if self._parents[one] in doomed:
                doomed.add(one)
        for one in doomed:
            self._callers.pop(one, None)
        self._later(parent, "lost", rank)
