"""Calls of one node of the tree: carries out its launch plan (karun/launch_plan.py).

The plan decides whom to call, whom to give work to, whom to give up; here calls are made, and what
comes of them is told to the plan, to neighbours, and for nodes that are given up to the owner.
Work goes from parent to child and back in frames between the two; names go with ranks.

Rules of its own:
  * a host that is short of processor makes no second tries, and its deadlines stretch with the
    time that calls take: logins cost processor here, and more of them only make all late;
  * a node that cannot call onwards (no key there, no route), which it knows after VAIN_COUNT calls
    in vain and none that succeeded, hands everything back, the vain ones too;
  * a head that does not know whether its nodes can call lets one try first: `trial`.
"""

from __future__ import annotations

import os
from time import monotonic

from karun.launch_plan import (
    ABANDON,
    ASK,
    CONNECT,
    GIVE,
    GIVE_UP,
    RECALL,
    RETURN,
    Action,
    Caller,
    LaunchPlan,
)  # fmt: skip

from . import frames
from .caller import AGENT_S, NO_PYTHON, Call
from .setup import ALWAYS, NEVER, Dialling

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .channel import Channel
    from .loop import Loop, Timer

NOT_FOUND = 127
VAIN_COUNT = 2
READY_GUESS_S = 5.0
"""Before the first node is ready: a window full of logins over ssh, on two cores."""
BUSY_PER_CORE = 4
"""Runnable processes from which on a host is short of processor."""
STRETCH = 4
"""A deadline is at least so many median times of those that came up."""
AGAIN_COUNT = 3
AGAIN_S = 0.5
PASSING = (b"kex_exchange_identification", b"Connection reset by peer", b"Connection closed by")
"""What ssh says when sshd turns callers away because many come at once."""


class Dialer:
    """What one node calls."""

    def __init__(
        self,
        loop: Loop,
        dialling: Dialling,
        archive: bytes,
        *,
        is_head: bool,
        connected: Callable[[Call, Channel, bytes], None],
        failed: Callable[[int, str, bytes, int], None],
        down: Callable[[int, int, bytes], bool],
        up: Callable[[int, bytes], None],
    ) -> None:
        """*connected* gets the channel of a call; *failed(rank, "stage:reason", words, status)* a
        node that is given up; *down(rank, kind, payload)* sends to a child, *up* to the parent."""
        self._loop = loop
        self._dialling, self._archive = dialling, archive
        self._connected, self._failed, self._down, self._up = connected, failed, down, up
        self._is_head = is_head
        self._plan = LaunchPlan(
            window_count=dialling.window,
            stages=(("connect", dialling.connect_s), ("agent", AGENT_S)),
            times=(0.01, READY_GUESS_S, 0.0),
        )
        self._caller = Caller(self._plan, is_head=is_head)
        self._cores = len(os.sched_getaffinity(0))
        self._names: dict[int, str] = {}
        self._calls: dict[tuple[int, int], Call] = {}
        self._troubles: dict[int, tuple[str, bytes, int]] = {}
        self._again: dict[int, int] = {}
        self._vain: list[int] = []
        self._succeeded = False
        self._trial: int | None = None
        self._env = dict(os.environ)
        self._timer: Timer | None = None

    # Events.

    def take(
        self, nodes: list[tuple[int, str]], times: tuple[float, float, float] | None = None
    ) -> None:
        """Take nodes to call; *times* is what the parent knows of calls."""
        self._names.update(nodes)
        self._do(self._caller.given([rank for rank, _ in nodes], monotonic(), times=times))

    def call_of(self, channel: Channel) -> Call | None:
        """Return the call under way whose channel this is."""
        return next((call for call in self._calls.values() if call.channel is channel), None)

    def attached(self, call: Call, *, calls: bool) -> bool:
        """A called node is there, and *calls* if it can; False: it is not wanted any more."""
        self._adapt()
        self._succeeded = True
        call.settled()
        del self._calls[call.rank, call.attempt]
        wanted = call.rank not in self._caller.children
        actions = self._caller.ready(
            call.rank, call.attempt, monotonic(), calls=calls and self._may_call(call.rank)
        )
        self._do([action for action in actions if action.kind != ABANDON or wanted])
        for rank in self._vain if self._succeeded else ():
            self._report(rank)
        self._vain = []
        self._settled([call.rank])
        return wanted

    def came(self, rank: int, *, calls: bool) -> None:
        """A node that has lost its parent is our child (it may say so again); *calls* if it can.

        We may be that parent: it was set up, and left before we had read a word of it.
        """
        for call in [call for call in self._calls.values() if call.rank == rank and call.channel]:
            del self._calls[call.rank, call.attempt]
            call.outrun()
        calls = calls and rank not in self._caller.children and self._may_call(rank)
        self._do(self._caller.rejoined(rank, monotonic(), calls=calls))

    def seen(self, child: int, rank: int) -> None:
        """Below a child a node is there."""
        if child == self._trial:
            self._trial_succeeded()
        self._do(self._caller.settled(child, [rank], monotonic()))

    def lost(self, child: int) -> None:
        if child == self._trial and not self._dialling.is_proved:
            self._trial = None
        self._do(self._caller.lost(child, monotonic()))

    def recalled(self) -> None:
        """The parent wants some back."""
        self._do(self._caller.recalled(monotonic()))

    def told(self, child: int, kind: int, payload: bytes) -> None:
        """Take what a child says about work."""
        now = monotonic()
        ranks = [frames.number(field) for field in frames.unpack(payload)]
        ranks = [rank for rank in ranks if rank in self._names]
        if kind == frames.ASK:
            self._do(self._caller.asked(child, now))
        elif kind == frames.RETURN:
            self._do(self._caller.returned(child, ranks, now))
        elif kind == frames.SETTLED:
            self._do(self._caller.settled(child, ranks, now))
            self._settled(ranks)
        elif kind == frames.CANNOT:
            if child == self._trial:
                self._dialling.tree = NEVER
            self._do(self._caller.cannot_call(child, ranks, now))

    def stop(self) -> None:
        """End all calls."""
        if self._timer is not None:
            self._timer.cancel()
        self._caller.stock.clear()
        for call in list(self._calls.values()):
            call.abandon()
        self._calls.clear()

    # Who may call.

    def _may_call(self, rank: int) -> bool:
        if self._dialling.tree in (ALWAYS, NEVER):
            return self._dialling.tree == ALWAYS
        if self._trial is None and self._caller.stock:
            self._trial = rank
            return True
        return False

    def _trial_succeeded(self) -> None:
        self._trial = None
        self._dialling.tree = ALWAYS
        for child in self._caller.children.values():
            child.calls = True

    # Actions.

    def _do(self, actions: Iterable[Action]) -> None:
        queue = list(actions)
        while queue:
            queue += self._carry_out(queue.pop(0)) or ()
        if self._timer is not None:
            self._timer.cancel()
        if self._caller.wake_s < 1e17:
            wait_s = max(0.0, self._caller.wake_s - monotonic())
            self._timer = self._loop.at(wait_s, self._tick)

    def _tick(self) -> None:
        self._adapt()
        self._do(self._caller.tick(monotonic()))

    def _carry_out(self, action: Action) -> list[Action] | None:
        kind, rank = action.kind, action.rank
        if kind == CONNECT:
            self._connect(rank, action.attempt, search=False)
            return self._caller.called(monotonic())
        if kind == ABANDON:
            call = self._calls.pop((rank, action.attempt), None)
            if call is not None:
                self._troubles[rank] = (f"{call.stage}:timeout", call.tail, -1)
                call.abandon()
        elif kind == GIVE_UP:
            self._give_up(rank)
        elif kind == GIVE:
            nodes = [field for one in action.ranks for field in (one, self._names[one])]
            times = (int(seconds * 1e6) for seconds in action.times)
            payload = frames.pack(self._dialling.encode(), frames.pack(*nodes), *times)
            self._down(rank, frames.CALL, payload)
        elif kind == RECALL:
            self._down(rank, frames.RECALL, b"")
        elif kind == ASK:
            self._up(frames.ASK, b"")
        elif kind == RETURN:
            self._up(frames.RETURN, frames.pack(*action.ranks))
        return None

    def _adapt(self) -> None:
        """Fit the plan to how busy this host is."""
        plan, count = self._plan, len(self._calls)
        plan.window_count = self._dialling.window
        if not self._caller.stock and _runnable() > BUSY_PER_CORE * self._cores:
            plan.window_count = min(count, plan.window_count)
        least_s = STRETCH * plan.ready_s
        plan.stages = (
            ("connect", max(self._dialling.connect_s, least_s)), ("agent", max(AGENT_S, least_s))
        )  # fmt: skip

    def _connect(self, rank: int, attempt: int, *, search: bool) -> None:
        name = self._names[rank]
        call = Call(self._loop, rank, name, self._archive, self._ready, self._call_failed)
        call.attempt, call.searched, call.reached = attempt, search, self._reached
        self._calls[rank, attempt] = call
        call.start(self._dialling.command(name, search=search), self._env)
        self._adapt()

    def _reached(self, call: Call) -> None:
        self._do(self._caller.reached(call.rank, call.attempt, "connect", monotonic()))

    def _ready(self, call: Call, channel: Channel, early: bytes) -> None:
        self._connected(call, channel, early)

    def _call_failed(self, call: Call, reason: str) -> None:
        key = (call.rank, call.attempt)
        if self._calls.pop(key, None) is None:
            return
        missing = call.status >= 0 and os.waitstatus_to_exitcode(call.status) == NOT_FOUND
        if missing and self._dialling.lined:
            reason = "agent:" + NO_PYTHON
        if reason.endswith(NO_PYTHON) and self._dialling.lined and not call.searched:
            self._connect(call.rank, call.attempt, search=True)
            return
        again = self._again.get(call.rank, 0)
        if any(sign in call.tail for sign in PASSING) and again < AGAIN_COUNT:
            self._again[call.rank] = again + 1
            # It keeps its place in the window, and its deadline.
            self._calls[key] = call
            self._loop.at(AGAIN_S * (again + 1), lambda: self._try_again(key))
            return
        self._troubles[call.rank] = (reason, call.tail, call.status)
        self._do(self._caller.failed(call.rank, call.attempt, monotonic()))

    def _try_again(self, key: tuple[int, int]) -> None:
        if key in self._calls:
            self._connect(*key, search=False)

    # Nodes that do not come up.

    def _give_up(self, rank: int) -> None:
        if self._is_head or self._succeeded:
            self._report(rank)
            return
        self._vain.append(rank)
        if len(self._vain) >= VAIN_COUNT or self._caller.idle:
            ranks = [*self._vain, *self._caller.stock, *(one for one, _ in self._calls)]
            self._vain = []
            self.stop()
            self._up(frames.CANNOT, frames.pack(*dict.fromkeys(ranks)))

    def _report(self, rank: int) -> None:
        self._failed(rank, *self._troubles.pop(rank, ("connect:failed", b"", -1)))
        self._settled([rank])

    def _settled(self, ranks: list[int]) -> None:
        if not self._is_head and ranks:
            self._up(frames.SETTLED, frames.pack(*ranks))


def _runnable() -> int:
    """Return how many processes of this host run or would like to."""
    try:
        with open("/proc/loadavg", "rb", buffering=0) as file:
            return int(file.read(100).split()[3].split(b"/")[0])
    except (OSError, IndexError, ValueError):
        return 0
