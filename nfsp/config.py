"""cluster.toml: who is in the cluster, where they listen and store, and how they behave.

One file serves every daemon and every mount; paths in it are relative to it.  Loaded by
`common.config`, which refuses unknown keys.  docs/operations.md lists every key.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from common.config import SIZE, load, read_key
from common.endpoint import parse_address
from common.errors import Code, KaError
from nfsp.model import BLOCK_SIZE, CHUNK_SIZE_DEFAULT, CHUNK_SIZE_MAX, CHUNK_SIZE_MIN

__all__ = ["Cluster", "ClusterConfig", "IodConfig", "MdsConfig", "MountConfig", "load_cluster"]

Size = Annotated[int, SIZE]

SESSION_TTL_MIN_S = 1.0
"""Three renewals must fit, on a busy machine too."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """[cluster]"""

    id: str
    """Peers of another id are refused."""
    key_file: Path
    """64 hexadecimal digits, mode 0600: who holds it belongs to the cluster."""
    name: str = "nfsp"
    """Shown as the mount's source."""
    chunk_size: Size = CHUNK_SIZE_DEFAULT
    """For new files where no directory says otherwise; read by mkfs."""
    stripe_width: int = 0
    """Likewise; 0: all iods."""
    user: str = ""
    """Daemons started as root become this user; empty: they stay who they are."""

    def validate(self) -> None:
        if self.chunk_size & (self.chunk_size - 1) or not (
            CHUNK_SIZE_MIN <= self.chunk_size <= CHUNK_SIZE_MAX
        ):
            raise KaError(
                Code.USAGE,
                f"chunk_size must be a power of two from {CHUNK_SIZE_MIN} to {CHUNK_SIZE_MAX}",
            )
        assert CHUNK_SIZE_MIN % BLOCK_SIZE == 0


@dataclass(frozen=True, slots=True)
class MdsConfig:
    """[[mds]]"""

    id: int
    """The shard it serves."""
    address: str
    data: Path
    socket: str = ""
    """A unix socket beside the TCP address, for clients on the same host."""
    metrics: str = ""
    """host:port of a Prometheus endpoint; empty: none."""
    session_ttl_s: float = 60.0
    """A mount that is silent this long has lost its session."""
    journal_size: Size = 32 << 20
    """Of each of the two journal files: bounds replay at start-up; read by mkfs."""
    cache_entries: int = 200_000
    """Changed records held in memory until a checkpoint has written them: the mds's memory."""

    def validate(self) -> None:
        _check_addresses(self.address, self.metrics)
        if self.session_ttl_s < SESSION_TTL_MIN_S:
            raise KaError(Code.USAGE, f"session_ttl_s must be at least {SESSION_TTL_MIN_S}")


@dataclass(frozen=True, slots=True)
class IodConfig:
    """[[iod]]"""

    id: int
    address: str
    data: Path
    socket: str = ""
    metrics: str = ""
    reserve: Size = 64 << 20
    """Bytes kept free on the local file system: new data are refused below."""

    def validate(self) -> None:
        _check_addresses(self.address, self.metrics)


@dataclass(frozen=True, slots=True)
class MountConfig:
    """[mount]: defaults of `nfsp mount`; options of the command line win."""

    timeout_s: float = 30.0
    """How long a call waits for a server that cannot be reached before it fails with EIO."""
    attr_timeout_s: float = 1.0
    """How long the kernel may believe attributes and entries."""
    dirty_size: Size = 64 << 20
    """Written data on their way to the iods; more makes writers wait."""
    readahead: Size = 8 << 20
    """Kernel read-ahead; needs root, otherwise the kernel's 128 KiB stay."""

    def validate(self) -> None:
        for name in ("timeout_s", "attr_timeout_s"):
            if not getattr(self, name) >= 0:  # nor may it be NaN
                raise KaError(Code.USAGE, f"{name} must not be negative")
        if not self.dirty_size:
            raise KaError(Code.USAGE, "dirty_size must be positive")


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """The whole file."""

    cluster: Cluster
    mds: tuple[MdsConfig, ...]
    iod: tuple[IodConfig, ...]
    mount: MountConfig = MountConfig()

    def validate(self) -> None:
        if len(self.mds) != 1:
            raise KaError(Code.USAGE, "exactly one [[mds]] is supported")
        for section, ids in (("mds", self.mds), ("iod", self.iod)):
            numbers = [item.id for item in ids]
            if len(set(numbers)) != len(numbers) or not numbers or min(numbers) < 0:
                raise KaError(Code.USAGE, f"[[{section}]]: ids must be unique and not negative")

    def iod_config(self, number: int) -> IodConfig:
        for iod in self.iod:
            if iod.id == number:
                return iod
        raise KaError(Code.USAGE, f"no [[iod]] with id {number}")

    def mds_config(self, number: int) -> MdsConfig:
        for mds in self.mds:
            if mds.id == number:
                return mds
        raise KaError(Code.USAGE, f"no [[mds]] with id {number}")


def _check_addresses(address: str, metrics: str) -> None:
    parse_address(address)
    if metrics:
        parse_address(metrics)


def load_cluster(path: Path) -> tuple[ClusterConfig, bytes]:
    """Return the configuration in *path* and the cluster key; raises KaError USAGE."""
    if not path.exists():
        raise KaError(
            Code.USAGE, f"no cluster configuration: {path}; name one with -c or $NFSP_CLUSTER"
        )
    config = load(path, ClusterConfig)
    return config, read_key(config.cluster.key_file)
