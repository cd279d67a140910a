"""Node sets: `node[001-128]` to names and back.  With karun/nodes.py the importer of ClusterShell.

The syntax is ClusterShell's, which users of clush know: ranges with padding and steps, several
dimensions, and the operators `,` (union) `!` (difference) `&` (intersection) `^` (symmetric
difference).  Names come out in natural order, each once.

Groups (`@racks`) and wildcards ask files and programs of the site: they need a resolver, which
karun/nodes.py makes.  Without one they are refused, because ClusterShell would take them for names.
A name that begins with a dash is refused always: programs that get it as an argument would read it
as an option.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ClusterShell.Defaults import DEFAULTS
from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet, NodeSetException

from common.errors import Code, KaError

__all__ = ["check_ranges", "expand", "fold"]

NODE_COUNT_MAX = 100_000

_NAME = re.compile(r"[A-Za-z0-9_.:][A-Za-z0-9_.:-]*")
_SET = re.compile(r"[A-Za-z0-9_.:\-\[\],/!&^ ]*")
_SET_OF_GROUPS = re.compile(r"[A-Za-z0-9_.:\-\[\],/!&^ @*?+=~#]*")
_BRACKETS = re.compile(r"\[([^\]]*)\]")
_RANGE = re.compile(r"([0-9]+)-([0-9]+)")

DEFAULTS.fold_axis = ()  # whatever a defaults.conf on this machine says


def expand(text: str, resolver: Any = None) -> list[str]:
    """Return the names in a node set, in natural order; raises KaError USAGE.

    *resolver*, ClusterShell's, knows what the groups are; its own errors are let through.
    """
    if (_SET if resolver is None else _SET_OF_GROUPS).fullmatch(text) is None:
        raise KaError(Code.USAGE, f"not a node set (such as node[1-16]): {text[:80]!r}")
    check_ranges(text)
    nodes = _parse([text] if text.strip() else [], resolver)
    if len(nodes) > NODE_COUNT_MAX:
        raise _too_many(text)
    return [_checked(name) for name in nodes]


def check_ranges(text: str) -> None:
    """Refuse ranges of absurd size, every index of which ClusterShell would hold in memory."""
    for low, high in _RANGE.findall(" ".join(_BRACKETS.findall(text))):
        if len(high) > 18 or int(high) - int(low[:19]) > NODE_COUNT_MAX:
            raise _too_many(text)


def fold(names: Iterable[str]) -> str:
    """Return the shortest node set with just these names; raises KaError USAGE."""
    return str(_parse([_checked(name) for name in names]))


def _parse(parts: list[str], resolver: Any = None) -> NodeSet:
    try:
        return NodeSet.fromlist(parts, resolver=resolver or RESOLVER_NOGROUP)
    except (NodeSetException, ValueError) as error:
        raise KaError(Code.USAGE, f"not a node set: {error}") from None


def _checked(name: str) -> str:
    if _NAME.fullmatch(name) is None:
        raise KaError(Code.USAGE, f"not a node name: {name[:80]!r}")
    return name


def _too_many(text: str) -> KaError:
    return KaError(Code.USAGE, f"more than {NODE_COUNT_MAX} nodes: {text[:80]!r}")
