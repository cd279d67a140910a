"""Start and control processes on many nodes.

    async with karun.Run(["node1", "node2"]) as run:
        outcomes = await run.command(["uname", "-r"])

This is the face for other packages; the names come from karun/api.py when they are asked for,
because the agent on a node imports this package too, and must not load all of that.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from karun.api import (
        Copied,
        CopyOptions,
        Crew,
        Joined,
        Limits,
        Outcome,
        Program,
        Run,
        Sink,
        Step,
        connector,
    )

__all__ = [
    "Copied", "CopyOptions", "Crew", "Joined", "Limits", "Outcome", "Program", "Run", "Sink",
    "Step", "connector",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"karun has no {name}")
    from karun import api

    return getattr(api, name)
