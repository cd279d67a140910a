"""Placement: which chains a new file's bytes go to, and layouts as text.

Pure.  A *rule* is a layout in which `stripe_width` 0 means "as wide as possible" and empty
`chains` means "any"; directories and the superblock hold rules.  A file holds the result: as many
chains as it is wide.  Where a file's stripe starts turns with its inode number, so that small
files, which fill only the first column, spread over all iods.

Only chains whose iods are all `up` and as many as the rule's replicas are given new files.

The text (the xattr `user.nfsp.layout`): `chunk_size=1048576 stripe_width=3 replicas=1
chains=1,2,3`.  Words may come in any order and be left out; `chains=` empty means any.

Not here: free space of the iods; moving files that exist.
"""

from __future__ import annotations

from common.errors import Code, KaError
from nfsp.model import (
    BLOCK_SIZE,
    CHUNK_SIZE_MAX,
    CHUNK_SIZE_MIN,
    STRIPE_WIDTH_MAX,
    ClusterMap,
    Layout,
)

__all__ = ["Placement", "check_rule", "format_layout", "parse_layout"]

_TEXT_SIZE_MAX = 4096
_REPLICAS_MAX = 8
_CHAIN_MAX = (1 << 32) - 1


class Placement:
    """Chooses chains under one cluster map; made anew when the map changes."""

    def __init__(self, default: Layout, cluster_map: ClusterMap) -> None:
        self.default = default
        """The rule for files with no rule above them."""
        up = {iod.iod for iod in cluster_map.iods if iod.state == "up"}
        self._replicas = {chain.chain: len(chain.iods) for chain in cluster_map.chains}
        self._usable = tuple(
            chain.chain for chain in cluster_map.chains if chain.iods and up.issuperset(chain.iods)
        )
        self._pools: dict[Layout, tuple[int, int, tuple[int, ...]]] = {}

    def choose(self, rule: Layout, ino: int) -> Layout:
        """Return the layout of file *ino* under *rule*; ENOSPC when no chain is usable."""
        pool = self._pools.get(rule)
        if pool is None:
            pool = self._pools_add(rule)
        count, width, twice = pool
        start = ino % count
        return Layout(rule.chunk_size, width, rule.replicas, twice[start : start + width])

    def _pools_add(self, rule: Layout) -> tuple[int, int, tuple[int, ...]]:
        chains = [
            chain
            for chain in self._usable
            if self._replicas[chain] == rule.replicas and (not rule.chains or chain in rule.chains)
        ]
        if not chains:
            raise KaError(Code.ENOSPC, "no data server for new files is up")
        width = min(rule.stripe_width or len(chains), len(chains), STRIPE_WIDTH_MAX)
        if len(self._pools) >= 1024:  # rules come from users: keep the memory bounded
            self._pools.clear()
        pool = (len(chains), width, tuple(chains + chains[:width]))
        self._pools[rule] = pool
        return pool

    def check(self, rule: Layout) -> None:
        """Raise EINVAL for a rule that no cluster, or not this cluster, can follow."""
        check_rule(rule)
        for chain in rule.chains:
            if chain not in self._replicas:
                raise KaError(Code.EINVAL, f"layout: there is no chain {chain}")
            if self._replicas[chain] != rule.replicas:
                raise KaError(
                    Code.EINVAL, f"layout: chain {chain} keeps {self._replicas[chain]} replicas"
                )


def check_rule(rule: Layout) -> None:
    """Raise EINVAL for numbers out of range."""
    chains = rule.chains
    if not CHUNK_SIZE_MIN <= rule.chunk_size <= CHUNK_SIZE_MAX or rule.chunk_size % BLOCK_SIZE:
        raise KaError(
            Code.EINVAL,
            f"layout: chunk_size is a multiple of {BLOCK_SIZE} "
            f"from {CHUNK_SIZE_MIN} to {CHUNK_SIZE_MAX}",
        )
    if not 0 <= rule.stripe_width <= STRIPE_WIDTH_MAX:
        raise KaError(Code.EINVAL, f"layout: stripe_width is at most {STRIPE_WIDTH_MAX}")
    if not 1 <= rule.replicas <= _REPLICAS_MAX:
        raise KaError(Code.EINVAL, f"layout: replicas is from 1 to {_REPLICAS_MAX}")
    if len(set(chains)) != len(chains) or len(chains) > STRIPE_WIDTH_MAX:
        raise KaError(Code.EINVAL, f"layout: at most {STRIPE_WIDTH_MAX} chains, none twice")
    if chains and rule.stripe_width > len(chains):
        raise KaError(Code.EINVAL, "layout: stripe_width is more than the chains named")


def format_layout(layout: Layout) -> bytes:
    """Return a layout as text."""
    chains = ",".join(map(str, layout.chains))
    return (
        f"chunk_size={layout.chunk_size} stripe_width={layout.stripe_width} "
        f"replicas={layout.replicas} chains={chains}"
    ).encode()


def parse_layout(text: bytes, default: Layout) -> Layout:
    """Return the rule in *text*; what it leaves out is *default*'s.  Raises EINVAL.

    Chains named without a width are all used.
    """
    if len(text) > _TEXT_SIZE_MAX:
        raise KaError(Code.EINVAL, "layout: too long")
    words: dict[bytes, bytes] = {}
    for word in text.rstrip(b"\0\n").split():
        name, equals, value = word.partition(b"=")
        if not equals or name not in _NAMES or name in words:
            raise KaError(Code.EINVAL, f"layout: `{word.decode('ascii', 'replace')}`?")
        words[name] = value
    rule = default
    if b"chains" in words:
        chains = tuple(_number(item) for item in words[b"chains"].split(b",") if words[b"chains"])
        rule = rule._replace(chains=chains, stripe_width=len(chains))
    if b"chunk_size" in words:
        rule = rule._replace(chunk_size=_number(words[b"chunk_size"]))
    if b"stripe_width" in words:
        rule = rule._replace(stripe_width=_number(words[b"stripe_width"]))
    if b"replicas" in words:
        rule = rule._replace(replicas=_number(words[b"replicas"]))
    check_rule(rule)
    return rule


_NAMES = frozenset((b"chunk_size", b"stripe_width", b"replicas", b"chains"))


def _number(text: bytes) -> int:
    # isdigit: int() also takes signs, blanks and underscores
    if not text.isdigit() or len(text) > 10 or int(text) > _CHAIN_MAX:
        raise KaError(Code.EINVAL, f"layout: `{text.decode('ascii', 'replace')}` is no number")
    return int(text)
