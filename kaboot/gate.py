"""The gate: how many machines may load kernels at once, so that a whole room can be switched on.

Pure; `now_s` is an argument.  A machine that asks for something to load is let in while fewer than
`window` others load; else it is told to ask again.  Whoever waits longest is let in first.  A
place is free again when the machine reports that its system runs, or after `hold_s`: a machine
that died while loading must not keep the others out.

A window of 0 lets everybody in.  Machines that boot from their disks never come here.
After a restart of the server the gate is empty: at worst one window too many are let in.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DELAY_S", "Gate", "Verdict"]

DELAY_S = 5
PATIENCE_S = 4 * DELAY_S
"""A machine that waits and has not asked for this long is taken for switched off."""
QUEUE_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a machine may load; if not, after how long it may ask again, and how many wait."""

    admitted: bool
    delay_s: int = 0
    ahead: int = 0


class Gate:
    def __init__(self, window: int, hold_s: float) -> None:
        assert window >= 0
        self.window = window
        self._hold_s = hold_s
        self._loading: dict[str, float] = {}
        self._waiting: dict[str, float] = {}  # in order of arrival: value is when last heard of

    @property
    def loading(self) -> int:
        return len(self._loading)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def full(self, now_s: float) -> bool:
        """Whether one more machine would have to wait."""
        self._forget(now_s)
        return self.window > 0 and len(self._loading) >= self.window

    def held(self) -> frozenset[str]:
        """Return the machines that were let in and are not done."""
        return frozenset(self._loading)

    def ask(self, mac: str, now_s: float) -> Verdict:
        """Decide for a machine that asks at this moment.

        One that was let in already is let in again: it started anew.
        """
        self._forget(now_s)
        if self.window == 0:
            return Verdict(True)
        known = mac in self._waiting
        ahead = list(self._waiting).index(mac) if known else len(self._waiting)
        if mac in self._loading or len(self._loading) + ahead < self.window:
            self._waiting.pop(mac, None)
            self._loading[mac] = now_s
            return Verdict(True)
        if known or len(self._waiting) < QUEUE_MAX:
            self._waiting[mac] = now_s
        return Verdict(False, DELAY_S, ahead)

    def done(self, mac: str) -> None:
        """Free a machine's place: its system runs."""
        self._loading.pop(mac, None)

    def _forget(self, now_s: float) -> None:
        for mac in [m for m, since in self._loading.items() if now_s - since >= self._hold_s]:
            del self._loading[mac]
        for mac in [m for m, heard in self._waiting.items() if now_s - heard >= PATIENCE_S]:
            del self._waiting[mac]
