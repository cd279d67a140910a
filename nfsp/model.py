"""What the file system is made of: inodes, dentries, layouts, the cluster map; and their records.

Pure.  The mds stores these records, the wire carries them unchanged, the client and fsck decode
them.  Tuples, not classes with behaviour: they are created by the thousand.

Records are msgpack lists in field order (docs/on-disk-format.md#records).  A field is only ever
added at the end; `RECORD_VERSION` changes when an old reader would misread a record.
"""

from __future__ import annotations

import stat
from typing import NamedTuple, NewType

from common import codec
from common.errors import Code, KaError

__all__ = [
    "BLOCK_SIZE",
    "CHUNK_SIZE_DEFAULT",
    "NAME_SIZE_MAX",
    "ROOT",
    "Chain",
    "ClusterMap",
    "Dentry",
    "Inode",
    "InodeId",
    "Iod",
    "IodId",
    "Layout",
    "Remains",
    "SessionId",
    "Superblock",
    "following",
    "shard_of",
]

InodeId = NewType("InodeId", int)
IodId = NewType("IodId", int)
SessionId = NewType("SessionId", int)

ROOT = InodeId(1)
SHARD_SHIFT = 48
"""Bits of an inode number below its shard: 2^48 inodes per shard, 2^15 shards, 63 bits in all."""

NAME_SIZE_MAX = 255
SYMLINK_SIZE_MAX = 4095
LINK_COUNT_MAX = 1 << 31
DIRECTORY_SIZE = 4096
"""What every directory says of its size; nobody counts on it."""
FIRST_COOKIE = 3
"""1 and 2 are `.` and `..` for those who list them."""
XATTR_NAME_SIZE_MAX = 255
XATTR_VALUE_SIZE_MAX = 65536
FILE_SIZE_MAX = (1 << 63) - 1
COLUMN_SIZE_MAX = 15 << 40
"""Bytes of one column of a file: with their sums they fit into the 16 TiB of an ext4 file."""
COOKIE_MAX = (1 << 63) - 1
TIME_NS_MIN, TIME_NS_MAX = -(1 << 63), (1 << 63) - 1
"""From 1677 to 2262."""
CLOCK_GRAIN_NS = 20_000_000
"""No kernel's tick is longer than 10 ms."""
ID_MAX = (1 << 32) - 1
"""Users, groups, device numbers."""

BLOCK_SIZE = 32 * 1024
"""Bytes under one checksum; the unit of reads from an iod."""
CHUNK_SIZE_MIN = 64 * 1024
CHUNK_SIZE_DEFAULT = 4 * 1024 * 1024
CHUNK_SIZE_MAX = 8 * 1024 * 1024
"""A chunk's sums fit into its 4 KiB header: 8 bytes for each 32 KiB block."""
STRIPE_WIDTH_MAX = 255

RECORD_VERSION = 1


class Layout(NamedTuple):
    """Where a file's bytes live: a frozen rule, stored in its inode.

    Chunk i belongs to column i % stripe_width; column c lives on chain chains[c].
    """

    chunk_size: int
    stripe_width: int
    replicas: int
    chains: tuple[int, ...]


class Inode(NamedTuple):
    """A file, directory or special file.  `generation` is always 0: numbers are never reused."""

    ino: int
    mode: int
    """Type and permission bits, as st_mode."""
    uid: int
    gid: int
    rdev: int
    nlink: int
    size: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    btime_ns: int
    change: int
    """Raised by 1 with every change of this record."""
    layout: Layout | None
    """Regular files: where the bytes are.  Directories: what new files inherit, if set."""
    parent: int
    """Directories only (0 otherwise): where `..` leads."""
    next_cookie: int
    """Directories only: the readdir cookie the next entry gets."""
    target: bytes
    """Symbolic links only."""
    xattr_count: int = 0
    """How many extended attributes are stored: 0 spares everyone the search for them."""

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @classmethod
    def directory(
        cls, ino: int, parent: int, mode: int, now_ns: int, *, uid: int = 0, gid: int = 0
    ) -> Inode:
        """Return an empty directory without a layout of its own."""
        return cls(
            ino=ino,
            mode=stat.S_IFDIR | (mode & 0o7777),
            uid=uid,
            gid=gid,
            rdev=0,
            nlink=2,
            size=DIRECTORY_SIZE,
            atime_ns=now_ns,
            mtime_ns=now_ns,
            ctime_ns=now_ns,
            btime_ns=now_ns,
            change=1,
            layout=None,
            parent=parent,
            next_cookie=FIRST_COOKIE,
            target=b"",
        )

    def encode(self) -> bytes:
        return codec.encode((RECORD_VERSION, *self))

    @classmethod
    def decode(cls, data: bytes) -> Inode:
        """Return the inode in a record; raises KaError ENGINE_DAMAGED."""
        fields = _fields(data, 1 + len(cls._fields), "inode")
        if fields[0] != RECORD_VERSION:
            raise KaError(Code.WRONG_VERSION, f"inode record of version {fields[0]}")
        if fields[13] is not None:
            fields[13] = _layout(fields[13])
        return cls(*fields[1:])


class Remains(NamedTuple):
    """What a purge or trim record says of the chunks that are to go."""

    layout: Layout
    size: int
    """Purge: no chunk holds bytes at or behind it.  Trim: all bytes at or behind it go."""

    def encode(self) -> bytes:
        return codec.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Remains:
        """Return what a record says; raises KaError ENGINE_DAMAGED."""
        layout, size = _fields(data, 2, "chunk queue")
        return cls(_layout(layout), size)


class Dentry(NamedTuple):
    """A name in a directory."""

    name: bytes
    ino: int
    kind: int
    """The file type bits of st_mode, shifted right by 12 (DT_* of readdir)."""
    cookie: int
    """The readdir offset of this entry for life: at least 3, unique in its directory."""


class Iod(NamedTuple):
    """A data server as the cluster map knows it."""

    iod: int
    address: str
    """tcp: `host:port`."""
    socket: str
    """unix socket path, or empty; used when it exists on the client's own host."""
    state: str
    """`up`, `draining` or `gone` (placement uses `up` only)."""


class Chain(NamedTuple):
    """A replica group: writes enter at the first iod, the last one acknowledges."""

    chain: int
    epoch: int
    iods: tuple[int, ...]


class ClusterMap(NamedTuple):
    """Who stores what.  A request made under an older epoch is refused by an iod."""

    epoch: int
    iods: tuple[Iod, ...]
    chains: tuple[Chain, ...]

    def encode(self) -> bytes:
        return codec.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> ClusterMap:
        epoch, iods, chains = _fields(data, 3, "cluster map")
        try:
            return cls(
                epoch,
                tuple(Iod(*iod) for iod in iods),
                tuple(Chain(chain, at, tuple(members)) for chain, at, members in chains),
            )
        except (TypeError, ValueError):
            raise KaError(Code.ENGINE_DAMAGED, "unreadable cluster map record") from None


class Superblock(NamedTuple):
    """What mkfs writes once."""

    format: int
    fs_uuid: bytes
    """16 bytes; the `fsid=` of kernel NFS exports on every gateway."""
    cluster_id: str
    shard: int
    created_ns: int
    layout: Layout
    """What files get when no directory above says otherwise; chains may be empty: all."""

    def encode(self) -> bytes:
        return codec.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Superblock:
        fields = _fields(data, len(cls._fields), "superblock")
        fields[5] = _layout(fields[5])
        return cls(*fields)


def following(before_ns: int, now_ns: int) -> int:
    """Return the time of a change at *now_ns* to something last changed at *before_ns*.

    The clock is coarse, but what changed must look changed: within a tick times count on.  A
    time further ahead was set by somebody and gives way.
    """
    ahead_ns = before_ns - now_ns
    return before_ns + 1 if 0 <= ahead_ns < CLOCK_GRAIN_NS else now_ns


def shard_of(ino: int) -> int:
    """Return the shard that owns an inode number."""
    return ino >> SHARD_SHIFT


def _fields(data: bytes, count: int, what: str) -> list[codec.Value]:
    try:
        value = codec.decode(data)
    except KaError as error:
        raise KaError(Code.ENGINE_DAMAGED, f"unreadable {what} record: {error.message}") from None
    if type(value) is not list or len(value) < count:
        raise KaError(Code.ENGINE_DAMAGED, f"unreadable {what} record")
    del value[count:]  # fields added by a newer version of the format
    return value


def _layout(value: codec.Value) -> Layout:
    try:
        chunk_size, stripe_width, replicas, chains = value
        return Layout(chunk_size, stripe_width, replicas, tuple(chains))
    except (TypeError, ValueError):
        raise KaError(Code.ENGINE_DAMAGED, "unreadable layout in a record") from None
