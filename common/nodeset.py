"""Node sets: `node[001-128]` to names and back.  The only importer of ClusterShell.

The syntax is ClusterShell's, which users of clush know: ranges with padding and steps, several
dimensions, and the operators `,` (union) `!` (difference) `&` (intersection) `^` (symmetric
difference).  Names come out in natural order, each once.

Not here: groups (`@racks`) and wildcards, which would ask files and programs of the site; they
are refused, because ClusterShell without a resolver takes them for names.  A name that begins
with a dash is refused as well: programs that get it as an argument would read it as an option.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ClusterShell.Defaults import DEFAULTS
from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet, NodeSetException

from common.errors import Code, KaError

__all__ = ["expand", "fold"]

NODE_COUNT_MAX = 100_000

_NAME = re.compile(r"[A-Za-z0-9_.:][A-Za-z0-9_.:-]*")
_SET = re.compile(r"[A-Za-z0-9_.:\-\[\],/!&^ ]*")
_BRACKETS = re.compile(r"\[([^\]]*)\]")
_RANGE = re.compile(r"([0-9]+)-([0-9]+)")

DEFAULTS.fold_axis = ()  # whatever a defaults.conf on this machine says


def expand(text: str) -> list[str]:
    """Return the names in a node set, in natural order; raises KaError USAGE."""
    if _SET.fullmatch(text) is None:
        raise KaError(Code.USAGE, f"not a node set (such as node[1-16]): {text[:80]!r}")
    for low, high in _RANGE.findall(" ".join(_BRACKETS.findall(text))):
        # ClusterShell holds every index of a range in memory.
        if len(high) > 18 or int(high) - int(low[:19]) > NODE_COUNT_MAX:
            raise _too_many(text)
    nodes = _parse([text] if text.strip() else [])
    if len(nodes) > NODE_COUNT_MAX:
        raise _too_many(text)
    return [_checked(name) for name in nodes]


def fold(names: Iterable[str]) -> str:
    """Return the shortest node set with just these names; raises KaError USAGE."""
    return str(_parse([_checked(name) for name in names]))


def _parse(parts: list[str]) -> NodeSet:
    try:
        return NodeSet.fromlist(parts, resolver=RESOLVER_NOGROUP)
    except (NodeSetException, ValueError) as error:
        raise KaError(Code.USAGE, f"not a node set: {error}") from None


def _checked(name: str) -> str:
    if _NAME.fullmatch(name) is None:
        raise KaError(Code.USAGE, f"not a node name: {name[:80]!r}")
    return name


def _too_many(text: str) -> KaError:
    return KaError(Code.USAGE, f"more than {NODE_COUNT_MAX} nodes: {text[:80]!r}")
