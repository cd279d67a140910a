"""Rights: what a user may do to which nodes.

Pure.  A grant is what one token stands for; `tokens.py` keeps them, `service.py` asks here before
it does or shows anything.

A node that a user may not see does not exist for him: it is left out of lists, and a deployment
with no node of his is not found.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from common.errors import Code, KaError

__all__ = ["ALL_NODES", "Grant", "Right"]

ALL_NODES = "*"


class Right(enum.Enum):
    VIEW = "view"
    """See nodes, deployments and their logs."""
    DEPLOY = "deploy"
    """Overwrite disks, go on, cancel; and see."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token stands for."""

    user: str
    rights: frozenset[Right]
    nodes: frozenset[str] | None
    """None: all there are and will be."""

    def may(self, right: Right, node: str) -> bool:
        allowed = right in self.rights or (right is Right.VIEW and Right.DEPLOY in self.rights)
        return allowed and (self.nodes is None or node in self.nodes)

    def require(self, right: Right, nodes: Iterable[str]) -> None:
        """Raise EACCES, naming the first node that this is not allowed for."""
        for node in nodes:
            if not self.may(right, node):
                raise KaError(Code.EACCES, f"{self.user} may not {right.value} {node}")
