"""The launch plan: which node calls which, decided while nodes come up.  Sans-I/O.

Head and agents each have a `Caller`: a stock of ranks to call, calls under way, and children, the
nodes that it has called and that call others in turn.  Whoever is free calls next: that is the
optimum of the postal model, in which a call occupies the caller for a *gap* and makes the called
one a caller when it is *ready*.  Both are measured, and a child learns them with its work.

A child that is ready, or has nothing left, is given the part of the stock that it and the callers
it will make can call, compared with this caller and those on their way to it.  With nothing left a
caller asks its own parent.  What a slow child holds is taken back by halves when others idle.

Invariants
  * a rank is in one place: one stock, one caller's calls, up, or given up, unless its holder died;
  * a call that is overdue occupies no window, a hedge none that a fresh call could use: hosts that
    are hung or dead delay nobody;
  * every call ends: ready, failed, abandoned, or at the deadline of its stage.

The shell calls a method for each event and carries out the actions in order; it calls `tick` when
`wake_s` is reached, and passes news of ranks below (`settled`) up.  Not here: connectors, names,
messages.  Imports nothing, because agents load it before they are ready.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "ABANDON",
    "ASK",
    "CONNECT",
    "GIVE",
    "GIVE_UP",
    "RECALL",
    "RETURN",
    "STAGES",
    "Action",
    "Caller",
    "LaunchPlan",
]

CONNECT = "connect"
"""Call `rank`, as its try number `attempt`; then say `called`."""
ABANDON = "abandon"
"""End this try: its deadline is over, or the other try was quicker."""
GIVE_UP = "give up"
"""`rank` will not come up; `stage` is where it stopped."""
GIVE = "give"
"""Hand `ranks` to the child `rank`, with `times` -> its `given`."""
ASK = "ask"
"""Ask the parent for work -> its `asked`."""
RECALL = "recall"
"""Ask the child `rank` for half of what it holds -> its `recalled`."""
RETURN = "return"
"""Hand `ranks` back to the parent -> its `returned`."""

STAGES = (("tcp", 3.0), ("banner", 3.0), ("auth", 10.0), ("agent", 5.0))
"""What a call waits for, and how long.  A connector that cannot tell some of them apart is given
one stage for them all."""
RETRIED_STAGE = "banner"
"""Hung up on before a word: sshd turns callers away at random when many come at once."""

RATIO_MAX = 1000.0
"""Of ready to gap: beyond it growth is next to nothing, and its powers are beyond floats."""
SAMPLE_COUNT_MAX = 64
SAMPLE_COUNT_MIN = 8
"""Below this many there is no 95th percentile; then LATE_FACTOR medians are late."""
LATE_FACTOR = 3.0
LATE_FACTOR_MIN = 1.25
"""Of the median: where all are alike, a moment more is not late."""
PATIENCE_FACTOR = 4.0
HEDGE_PART = 10
"""At most one call in so many is hedged."""
BATCH_COUNT_MAX = 2000
RECALL_COUNT_MIN = 4
"""Held by a child; what it has given to others, or is calling, is among it."""
REATTACH_S = 2.0
"""What a lost child held is called anew after this: those it had started may come by themselves."""


class Action:
    """What the shell is to do."""

    __slots__ = ("attempt", "kind", "rank", "ranks", "stage", "times")

    def __init__(
        self,
        kind: str,
        rank: int = -1,
        *,
        attempt: int = 0,
        stage: str = "",
        ranks: Sequence[int] = (),
        times: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ) -> None:
        self.kind, self.rank, self.attempt, self.stage = kind, rank, attempt, stage
        self.ranks, self.times = ranks, times

    def __repr__(self) -> str:
        what = self.stage or (len(self.ranks) if self.ranks else self.attempt)
        return f"<{self.kind} {self.rank} {what}>"


class LaunchPlan:
    """The settings, and what is known of the times; one for each caller."""

    __slots__ = ("_growth", "_samples", "gap_s", "late_s", "ready_s", "stages", "window_count")

    def __init__(
        self,
        *,
        window_count: int = 32,
        stages: tuple[tuple[str, float], ...] = STAGES,
        times: tuple[float, float, float] = (0.01, 0.15, 0.0),
    ) -> None:
        """*times*: a guess at `gap_s`, `ready_s`, `late_s`, until a parent tells or calls are made.

        `ready_s` is the median of the ready times; after `late_s`, their 95th percentile, a call
        is late (0: not known).
        """
        self.window_count = window_count
        self.stages = stages
        self.gap_s, self.ready_s, self.late_s = times
        self._samples: list[float] = []
        self._growth = (0.0, 0.0)

    @property
    def times(self) -> tuple[float, float, float]:
        return self.gap_s, self.ready_s, self.late_s

    def learn(self, times: tuple[float, float, float]) -> None:
        """Take over what the parent knows, until this caller knows better."""
        if not self._samples:
            self.gap_s, self.ready_s, self.late_s = times

    def saw_gap(self, seconds: float) -> None:
        self.gap_s += (max(seconds, 1e-4) - self.gap_s) / 4

    def saw_ready(self, seconds: float) -> None:
        if len(self._samples) >= SAMPLE_COUNT_MAX:
            del self._samples[0]
        self._samples.append(seconds)
        ordered = sorted(self._samples)
        count = len(ordered)
        self.ready_s = ordered[count // 2]
        if count < SAMPLE_COUNT_MIN:
            self.late_s = self.late_s or LATE_FACTOR * self.ready_s
        else:
            self.late_s = max(ordered[count * 95 // 100], LATE_FACTOR_MIN * self.ready_s)

    @property
    def growth(self) -> float:
        """By how much the callers grow in one gap, in the long run: x**r == x**(r - 1) + 1."""
        ratio = min(max(1.0, self.ready_s / self.gap_s), RATIO_MAX)
        if abs(ratio - self._growth[0]) > 0.02 * ratio:
            low, high = 1.0, 2.0
            for _ in range(30):
                middle = (low + high) / 2
                if middle ** (ratio - 1) * (middle - 1) < 1:
                    low = middle
                else:
                    high = middle
            self._growth = ratio, high
        return self._growth[1]


class _Call:
    """A try to bring up a rank."""

    __slots__ = ("attempt", "began_s", "rank", "stage", "stage_s")

    def __init__(self, rank: int, attempt: int, now: float) -> None:
        self.rank, self.attempt = rank, attempt
        self.began_s = self.stage_s = now
        self.stage = 0
        """Index of what it waits for."""


class _Child:
    """A node that is up and may call others."""

    __slots__ = ("asks", "calls", "held", "may_be_recalled")

    def __init__(self) -> None:
        self.held: set[int] = set()
        """What it was given and has not come to an end, as far as is known here."""
        self.asks = self.calls = True
        self.may_be_recalled = True
        """No recall is under way, and the last one was not in vain."""


class Caller:
    """What one node, the head or an agent, does to bring up others."""

    def __init__(self, plan: LaunchPlan, *, is_head: bool) -> None:
        self.plan = plan
        self.wake_s = 1e18
        """When `tick` is due."""
        self.stock: list[int] = []
        """To be called, first from the front; children get theirs from the back."""
        self.children: dict[int, _Child] = {}
        self._is_head = is_head
        self._calls: dict[int, list[_Call]] = {}
        """The tries under way of each rank."""
        self._attempts: dict[int, int] = {}
        """Tries made of each rank that is being called."""
        self._retries: list[int] = []
        """Ranks that deserve a second try, besides those whose only one is late."""
        self._starting = False
        """A `CONNECT` is out, and `called` has not come."""
        self._asked = False
        self._connect_s = -1e9
        """When the last call was made; before a pause: never."""
        self._call_count = self._hedge_count = 0
        self._orphans: list[tuple[float, list[int]]] = []
        """What lost children held, and when it is called anew."""
        self._actions: list[Action] = []

    # ------------------------------------------------------------ events: work

    def given(
        self, ranks: Iterable[int], now: float, *, times: tuple[float, float, float] | None = None
    ) -> list[Action]:
        """Take work: from the user at the head, from the parent's `GIVE` elsewhere."""
        self._asked = False
        if times is not None:
            self.plan.learn(times)
        self.stock.extend(ranks)
        return self._go_on(now)

    def recalled(self, now: float) -> list[Action]:
        """The parent wants work back, for others that have none."""
        kept = len(self.stock) // 2
        ranks = self.stock[kept:]
        del self.stock[kept:]
        self._actions.append(Action(RETURN, ranks=ranks))
        return self._go_on(now)

    def asked(self, child: int, now: float) -> list[Action]:
        """A child has nothing left to call."""
        if child in self.children:
            self.children[child].asks = True
        return self._go_on(now)

    def returned(self, child: int, ranks: Iterable[int], now: float) -> list[Action]:
        """A child hands back half of what it has left; nothing, if that is nothing."""
        back = self._take_back(child, ranks)
        if child in self.children:
            self.children[child].may_be_recalled = back > 0
        return self._go_on(now)

    def cannot_call(self, child: int, ranks: Iterable[int], now: float) -> list[Action]:
        """A child cannot call anybody, and hands back all it has: it stays up, and idle."""
        self._take_back(child, ranks)
        if child in self.children:
            self.children[child].calls = False
        return self._go_on(now)

    def settled(self, child: int, ranks: Iterable[int], now: float) -> list[Action]:
        """Below a child these are up, or given up."""
        if child in self.children:
            self.children[child].held.difference_update(ranks)
        if self._orphans:
            done = set(ranks)
            self._orphans = [
                (due_s, [one for one in orphans if one not in done])
                for due_s, orphans in self._orphans
            ]
        return self._go_on(now)

    def lost(self, child: int, now: float) -> list[Action]:
        """A child that was up is gone; what it held is called anew, unless `rejoined` in time."""
        gone = self.children.pop(child, None)
        if gone is not None and gone.held:
            self._orphans.append((now + REATTACH_S, sorted(gone.held)))
        return self._go_on(now)

    def rejoined(self, rank: int, now: float, *, calls: bool = True) -> list[Action]:
        """A node whose caller was lost has come here by itself; it is a child now."""
        for ranks in (self.stock, self._retries, *(orphans for _, orphans in self._orphans)):
            if rank in ranks:
                ranks.remove(rank)
        for call in self._calls.get(rank, ()):
            self._actions.append(Action(ABANDON, rank, attempt=call.attempt))
        self._forget(rank)
        if rank not in self.children:
            self.children[rank] = child = _Child()
            child.calls = calls
        return self._go_on(now)

    # ------------------------------------------------------------ events: calls

    def called(self, now: float) -> list[Action]:
        """The connector of the last `CONNECT` runs: this node is free to call again."""
        self._starting = False
        return self._go_on(now)

    def reached(self, rank: int, attempt: int, stage: str, now: float) -> list[Action]:
        """A call has come through a stage."""
        call = self._find(rank, attempt)
        names = [name for name, _ in self.plan.stages]
        if call is not None and stage in names:
            call.stage = min(names.index(stage) + 1, len(names) - 1)
            call.stage_s = now
        return self._go_on(now)

    def ready(self, rank: int, attempt: int, now: float, *, calls: bool = True) -> list[Action]:
        """The agent is up; *calls*: it can bring up others."""
        call = self._find(rank, attempt)
        if call is None:  # too late: given up, or the other try was quicker
            self._actions.append(Action(ABANDON, rank, attempt=attempt))
            return self._go_on(now)
        self.plan.saw_ready(now - call.began_s)
        for other in self._calls[rank]:
            if other is not call:
                self._actions.append(Action(ABANDON, rank, attempt=other.attempt))
        self._forget(rank)
        child = self.children[rank] = _Child()
        child.calls = calls
        return self._go_on(now)

    def failed(self, rank: int, attempt: int, now: float) -> list[Action]:
        """A call has ended without an agent."""
        call = self._find(rank, attempt)
        if call is not None:
            self._end(call)
        return self._go_on(now)

    def tick(self, now: float) -> list[Action]:
        """Look at the clocks."""
        for call in [call for calls in self._calls.values() for call in calls]:
            if now >= self._deadline_s(call):
                self._actions.append(Action(ABANDON, call.rank, attempt=call.attempt))
                self._end(call)
        for due_s, orphans in self._orphans:
            if now >= due_s:
                self.stock[:0] = orphans
        self._orphans = [one for one in self._orphans if now < one[0] and one[1]]
        return self._go_on(now)

    @property
    def idle(self) -> bool:
        """Nothing to call here, and no call under way."""
        return not (self.stock or self._calls or self._retries or self._orphans)

    # ------------------------------------------------------------ what to do next

    def _go_on(self, now: float) -> list[Action]:
        late_s = self.plan.late_s
        self._call_next(late_s, now)
        waiting = [rank for rank, child in self.children.items() if child.asks and child.calls]
        while waiting and self.stock:
            # At least one: it is free now, which this caller and those on their way are not.
            self._give(waiting[0], max(1, self._share(len(waiting), now)))
            del waiting[0]
        idle = not self._starting and self._has_room(late_s, now)
        if not self.stock and (idle or waiting):
            if not self._is_head and not self._asked:
                self._asked = True
                self._actions.append(Action(ASK))
            self._recall()
        self._set_wake(late_s, now)
        actions, self._actions = self._actions, []
        return actions

    def _share(self, waiting_count: int, now: float) -> int:
        """Return how much of the stock a child gets that is free to call now.

        A caller that comes later has less time left, and calls less, by the growth per gap.
        """
        plan = self.plan
        ready_s = plan.ready_s
        callers = 1.0 + waiting_count
        for calls in self._calls.values():
            left_s = calls[0].began_s + ready_s - now
            if left_s > -ready_s:  # else nobody knows whether it comes
                callers += plan.growth ** (-max(0.0, left_s) / plan.gap_s)
        return min(BATCH_COUNT_MAX, int(len(self.stock) / callers + 0.5))

    def _give(self, rank: int, count: int) -> None:
        child = self.children[rank]
        ranks = self.stock[-count:]
        del self.stock[-count:]
        child.held.update(ranks)
        child.asks, child.may_be_recalled = False, True
        self._actions.append(Action(GIVE, rank, ranks=ranks, times=self.plan.times))

    def _call_next(self, late_s: float, now: float) -> None:
        """Call somebody, if this node is free: new ones first, then second tries."""
        if self._starting or not self._has_room(late_s, now):
            return
        if self.stock:
            rank = self.stock.pop(0)
            if self._connect_s >= 0:
                self.plan.saw_gap(now - self._connect_s)
            self._call_count += 1
            self._connect_s = now if self.stock else -1e9
        else:
            self._connect_s = -1e9
            rank = self._second_try(late_s, now)
            if rank < 0:
                return
            self._hedge_count += 1
        attempt = self._attempts[rank] = self._attempts.get(rank, 0) + 1
        self._calls.setdefault(rank, []).append(_Call(rank, attempt, now))
        self._starting = True
        self._actions.append(Action(CONNECT, rank, attempt=attempt))

    def _has_room(self, late_s: float, now: float) -> bool:
        if len(self._calls) < self.plan.window_count:
            return True
        patience_s = self._patience_s(late_s)
        current = sum(now < calls[-1].began_s + patience_s for calls in self._calls.values())
        return current < self.plan.window_count

    def _patience_s(self, late_s: float) -> float:
        """Return how long a call occupies the window.

        Longer than it takes to be late: when this host is short of processor all calls are late,
        and more of them at once would make it worse.
        """
        return max(PATIENCE_FACTOR * self.plan.ready_s, 2 * late_s)

    def _second_try(self, late_s: float, now: float) -> int:
        """Return a rank that should be called once more, or -1."""
        if self._retries:
            return self._retries.pop(0)
        if not late_s or self._hedge_count * HEDGE_PART > self._call_count + HEDGE_PART:
            return -1
        for rank, calls in self._calls.items():
            if self._attempts[rank] == 1 and now >= calls[0].began_s + late_s:
                return rank
        return -1

    def _recall(self) -> None:
        """Take work back from the child that seems to hold most."""
        found, most = -1, RECALL_COUNT_MIN - 1
        for rank, child in self.children.items():
            if child.may_be_recalled and len(child.held) > most:
                found, most = rank, len(child.held)
        if found >= 0:
            self.children[found].may_be_recalled = False
            self._actions.append(Action(RECALL, found))

    # ------------------------------------------------------------ accounts

    def _find(self, rank: int, attempt: int) -> _Call | None:
        for call in self._calls.get(rank, ()):
            if call.attempt == attempt:
                return call
        return None

    def _forget(self, rank: int) -> None:
        self._calls.pop(rank, None)
        self._attempts.pop(rank, None)

    def _end(self, call: _Call) -> None:
        """A try is over; the rank is given up if it was the last."""
        calls = self._calls[call.rank]
        calls.remove(call)
        if calls:
            return
        del self._calls[call.rank]
        stage = self.plan.stages[call.stage][0]
        if stage == RETRIED_STAGE and self._attempts[call.rank] == 1:
            self._retries.append(call.rank)
            return
        self._forget(call.rank)
        self._actions.append(Action(GIVE_UP, call.rank, stage=stage))

    def _take_back(self, child: int, ranks: Iterable[int]) -> int:
        back = list(ranks)
        self.stock.extend(back)
        if child in self.children:
            self.children[child].held.difference_update(back)
        return len(back)

    def _deadline_s(self, call: _Call) -> float:
        return call.stage_s + self.plan.stages[call.stage][1]

    def _set_wake(self, late_s: float, now: float) -> None:
        """The next deadline, or when a late call can be hedged or leaves the window."""
        wake_s = min((due_s for due_s, _ in self._orphans), default=1e18)
        patience_s = self._patience_s(late_s) if self.stock and not self._starting else 0.0
        for rank, calls in self._calls.items():
            for call in calls:
                wake_s = min(wake_s, self._deadline_s(call))
            if calls[-1].began_s + patience_s > now:
                wake_s = min(wake_s, calls[-1].began_s + patience_s)
            if late_s and self._attempts[rank] == 1:
                due_s = calls[0].began_s + late_s
                if due_s > now:
                    wake_s = min(wake_s, due_s)
        self.wake_s = wake_s
