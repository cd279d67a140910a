"""The signals that ask a program to end, as events of a trio program."""

from __future__ import annotations

import signal
from collections.abc import Callable

import trio

__all__ = ["ending", "on_signal"]


def ending() -> tuple[signal.Signals, ...]:
    """Return them; SIGHUP, which comes when a terminal is closed, unless `nohup` ignores it."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return signal.SIGTERM, signal.SIGINT
    return signal.SIGTERM, signal.SIGINT, signal.SIGHUP


async def on_signal(
    act: Callable[[signal.Signals], None],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Call *act* at each of `ending`; started when they are listened to.

    Ends by cancellation only: while a program stops, further signals do not kill it half way.
    """
    with trio.open_signal_receiver(*ending()) as signals:
        task_status.started()
        async for number in signals:
            act(signal.Signals(number))
