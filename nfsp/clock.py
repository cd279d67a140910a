"""The clock of stored times: the kernel's coarse one, as local file systems use it.

The kernel fills in the time of a `touch` itself, from its coarse clock, up to a tick behind the
exact one.  Were other times taken from the exact clock, a file made and then touched would get
older by it.

Not here: time-outs and leases, which count on `time.monotonic` or trio's clock.
"""

from __future__ import annotations

import time

__all__ = ["now_ns"]

_CLOCK_REALTIME_COARSE = 5
"""Linux's number; the time module does not name it."""


def now_ns() -> int:
    """Return the time of day, as exact as the kernel's tick."""
    return time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
