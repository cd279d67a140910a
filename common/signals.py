"""SIGTERM and SIGINT as events of a trio program."""

from __future__ import annotations

import signal
from collections.abc import Callable

import trio

__all__ = ["on_signal"]


async def on_signal(
    act: Callable[[signal.Signals], None],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Call *act* at each SIGTERM and SIGINT; started when they are listened to.

    Ends by cancellation only: while a program stops, further signals do not kill it half way.
    """
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            act(signal.Signals(number))
