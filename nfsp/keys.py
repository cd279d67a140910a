"""The metadata key space: one ordered map holds the whole name space of a shard.

Pure.  Big-endian numbers, so that byte order is number order and a directory, a session or a
queue is one range.  docs/on-disk-format.md#keys is this table in words.

    i <ino>                  inode record
    d <parent> <name>        dentry: [ino, kind, cookie]
    c <parent> <cookie>      the same entry in readdir order: [name, ino, kind]
    x <ino> <name>           extended attribute: the value's bytes
    o <ino>                  unlinked but still open: []
    p <ino>                  purge queue: [layout, size] of a deleted file whose chunks remain;
                             the size is 2^63 - 1 when chunks may reach beyond the recorded one
    t <ino>                  trim queue: [layout, size]: chunks behind size are to be dropped
    s <session>              client session
    r <session> <slot>       last mutation of a slot: [sequence, answer]
    w <session> <ino>        opened for writing: []: chunks may reach beyond the recorded size;
                             session 0: left by an expired session while others wrote on
    m <name>                 superblock, cluster map, counters (the next number: an integer)
"""

from __future__ import annotations

import struct

__all__ = [
    "CLUSTER_MAP",
    "NEXT_INO",
    "NEXT_SESSION",
    "SUPERBLOCK",
    "after",
    "cookie",
    "dentry",
    "inode",
    "orphan",
    "prefix_end",
    "purge",
    "session",
    "slot",
    "trim",
    "writer",
    "xattr",
]

SUPERBLOCK = b"msuperblock"
CLUSTER_MAP = b"mclustermap"
NEXT_INO = b"mnextino"
NEXT_SESSION = b"mnextsession"

_q = struct.Struct(">Q").pack
_qq = struct.Struct(">QQ").pack
_qh = struct.Struct(">QH").pack


def inode(ino: int) -> bytes:
    return b"i" + _q(ino)


def dentry(parent: int, name: bytes) -> bytes:
    return b"d" + _q(parent) + name


def cookie(parent: int, cookie: int) -> bytes:
    return b"c" + _qq(parent, cookie)


def xattr(ino: int, name: bytes) -> bytes:
    return b"x" + _q(ino) + name


def orphan(ino: int) -> bytes:
    return b"o" + _q(ino)


def purge(ino: int) -> bytes:
    """All chunks of a deleted file wait here for removal."""
    return b"p" + _q(ino)


def trim(ino: int) -> bytes:
    """Chunks behind a file's recorded size wait here for removal."""
    return b"t" + _q(ino)


def session(session: int) -> bytes:
    return b"s" + _q(session)


def slot(session: int, slot: int) -> bytes:
    return b"r" + _qh(session, slot)


def writer(session: int, ino: int) -> bytes:
    return b"w" + _qq(session, ino)


def prefix_end(prefix: bytes) -> bytes:
    """Return the first key after all keys that start with *prefix* (not all 0xff)."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes((stem[-1] + 1,))


def after(key: bytes) -> bytes:
    """Return the smallest key larger than *key*."""
    return key + b"\0"
