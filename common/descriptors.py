"""How many files and connections a process may have open: as many as the administrator allows.

The soft limit, 1024, is made for programs that use select; ours have some for each node.
"""

from __future__ import annotations

import resource

__all__ = ["raise_descriptor_limit"]


def raise_descriptor_limit() -> None:
    """Raise this process's soft limit to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
