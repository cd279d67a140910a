"""Which nodes a command is for: node sets, groups, files of names, exclusions.

The rules and files are ClusterShell's, which users of clush know: `-w node[1-9],@rack1`,
`@source:group`, `@*` (all), wildcards (`node*`), `-x`, `-w -` (standard input), `-w ^FILE`;
groups.conf, groups.conf.d and groups.d are read where ClusterShell reads them.  What `map`, `all`
and `list` in groups.conf say is run as a command of the site's keeper, as clush does.

Invariants
  * every name is returned once, in natural order: the position is the node's rank from then on;
  * an unknown group, an unreadable file and an empty set are one line, before anything is started.

Not here: what a node set looks like (common/nodeset.py); inside, karun counts ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ClusterShell.Defaults import config_paths
from ClusterShell.NodeSet import ILLEGAL_GROUP_CHARS
from ClusterShell.NodeUtils import (
    GroupResolverConfig,
    GroupResolverConfigError,
    GroupResolverError,
    GroupResolverIllegalCharError,
    GroupResolverSourceError,
    GroupSourceError,
    GroupSourceNoUpcall,
)

from common import nodeset
from common.errors import Code, KaError

__all__ = ["Groups", "Names", "select"]

FILE_SIZE_MAX = 8 << 20
"""Of a file of node names: a hundred thousand long ones."""


class _Resolver(GroupResolverConfig):  # type: ignore[misc]  # ClusterShell has no types
    """ClusterShell's resolver, which does not take an unknown group for an empty one."""

    def group_nodes(self, group: str, namespace: str | None = None) -> list[str]:
        found: list[str] = super().group_nodes(group, namespace)
        for text in found:
            nodeset.check_ranges(text)
        if not found and not self._is_known(group, namespace):
            where = f" in source {namespace}" if namespace else ""
            raise KaError(Code.USAGE, f"no group @{group}{where}")
        return found

    def _is_known(self, group: str, namespace: str | None) -> bool:
        try:
            return group in self.grouplist(namespace)
        except GroupSourceNoUpcall:
            return True  # the source cannot list its groups; its answer stands


class Groups:
    """The groups of this site, from *files* or from where ClusterShell looks; read when needed."""

    def __init__(self, files: Sequence[Path] | None = None) -> None:
        paths = config_paths("groups.conf") if files is None else [str(path) for path in files]
        self._resolver: Any = _Resolver(paths, ILLEGAL_GROUP_CHARS)

    def expand(self, text: str) -> list[str]:
        """Return the names in a node set with groups; raises KaError USAGE."""
        try:
            return nodeset.expand(text, self._resolver)
        except GroupResolverConfigError as error:
            raise KaError(Code.USAGE, f"groups.conf: {_line(error)}") from None
        except GroupResolverSourceError as error:
            source = str(error)
            where = "no group source" if source == "<default>" else f"no group source {source}"
            raise KaError(
                Code.USAGE, f"{where} for {text[:80]!r} (see groups.conf of ClusterShell)"
            ) from None
        except GroupResolverIllegalCharError as error:
            raise KaError(Code.USAGE, f"a group's name has a forbidden {_line(error)}") from None
        except GroupSourceError as error:
            raise KaError(Code.USAGE, f"group source of {text[:80]!r}: {_line(error)}") from None
        except (GroupResolverError, OSError) as error:
            raise KaError(Code.USAGE, f"groups of {text[:80]!r}: {_line(error)}") from None

    def everyone(self) -> list[str]:
        """Return all nodes that the default source knows; raises KaError USAGE."""
        found = self.expand("@*")
        if not found:
            raise KaError(Code.USAGE, "the default group source has no nodes (`all` or `map`)")
        return found


class Names:
    """Ranks to names, and ranks to a node set: the edge between what karun counts and prints."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, rank: int) -> str:
        return self._names[rank]

    def fold(self, ranks: Iterable[int]) -> str:
        """Return the shortest node set for some ranks."""
        chosen = [self._names[rank] for rank in ranks]
        return chosen[0] if len(chosen) == 1 else nodeset.fold(chosen)


def select(
    where: Sequence[str],
    *,
    exclude: Sequence[str] = (),
    in_groups: Sequence[str] = (),
    hostfiles: Sequence[str] = (),
    everyone: bool = False,
    groups: Groups | None = None,
    read_stdin: Callable[[], bytes] = lambda: sys.stdin.buffer.read(FILE_SIZE_MAX + 1),
) -> list[str]:
    """Return the nodes that -w, -g, --hostfile and -a name and -x does not, in natural order.

    Raises KaError USAGE when a part cannot be read, or nothing is left.
    """
    if not (where or in_groups or hostfiles or everyone):
        raise KaError(Code.USAGE, "no nodes: name some by -w, -g, -a or --hostfile")
    site = groups or Groups()
    chosen: set[str] = set(site.everyone()) if everyone else set()
    for text in where:
        chosen.update(_expand(text, site, read_stdin))
    for text in in_groups:
        chosen.update(site.expand("@" + text.removeprefix("@")))
    for path in hostfiles:
        chosen.update(_from_file(path, site))
    given = len(chosen)
    for text in exclude:
        chosen.difference_update(_expand(text, site, read_stdin))
    if not chosen:
        why = "-x takes away all of them" if given else "-w names an empty set"
        raise KaError(Code.USAGE, f"no nodes: {why}")
    return nodeset.expand(nodeset.fold(chosen))


def _expand(text: str, site: Groups, read_stdin: Callable[[], bytes]) -> Iterator[str]:
    if text == "-":
        yield from _from_text(read_stdin(), "standard input", site)
    elif text.startswith("^"):
        yield from _from_file(text[1:], site)
    else:
        yield from site.expand(text)


def _from_file(path: str, site: Groups) -> Iterator[str]:
    try:
        with open(path, "rb") as file:
            content = file.read(FILE_SIZE_MAX + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise KaError(Code.USAGE, f"cannot read nodes from {path!r}: {why}") from None
    yield from _from_text(content, path, site)


def _from_text(content: bytes, source: str, site: Groups) -> Iterator[str]:
    """Yield the names in words that stand in lines; a `#` begins a comment."""
    if len(content) > FILE_SIZE_MAX:
        raise KaError(Code.USAGE, f"{source}: more than {FILE_SIZE_MAX >> 20} MiB of node names")
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise KaError(Code.USAGE, f"{source}: not text, let alone node names") from None
    plain: list[str] = []
    for line in lines:
        for word in line.partition("#")[0].split():
            # A name a line is the usual file: all of them at once, for speed.
            if word.replace("-", "").replace(".", "").isalnum() and not word.startswith("-"):
                plain.append(word)
            else:
                yield from site.expand(word)
    if plain:
        yield from nodeset.expand(",".join(plain))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
