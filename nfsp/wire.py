"""Every message between client, mds and iod.  Pure: shapes only (docs/protocol.md#messages).

A request is answered by the reply class named in its docstring, or by an error frame.  Inode
records (`inode: bytes`) travel as they are stored: `model.Inode.decode` reads them.

Mutations of the name space begin with `slot` and `sequence`: a client session has a fixed number
of slots, each carries one mutation at a time, numbered from 1.  The mds stores the answer with
the commit, so that a repeated (slot, sequence) gets the first answer again.

iod requests name a chunk by (ino, column, row) and carry the cluster map's epoch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from common.messages import Catalogue

MDS = Catalogue("mds")
IOD = Catalogue("iod")

# ---------------------------------------------------------------- sessions


@MDS.message(1)
class SessionOpen(NamedTuple):
    """Start a client session -> `SessionReply`."""

    host: str
    pid: int
    mountpoint: str
    durable: bool
    """Every mutation is on stable storage before it is answered (exported mounts)."""
    slot_count: int


@MDS.message(2)
class SessionResume(NamedTuple):
    """Continue a session on a new connection -> `SessionReply`, or SESSION_UNKNOWN.

    `opens` is the whole truth about what the client has open: the mds forgets the rest.  A client
    whose session has run out tells the new one, too, what it has open.
    """

    session: int
    opens: list[Any]
    """[ino, count, writable] each."""


@MDS.message(3)
class SessionRenew(NamedTuple):
    """Keep the session alive -> `SessionReply`."""


@MDS.message(4)
class SessionClose(NamedTuple):
    """End the session: all its files are closed -> `Done`."""


@MDS.message(5)
class SessionReply(NamedTuple):
    session: int
    lease_ttl_ms: int
    """Counted by the client from its send; without a renewal the session then ends."""
    superblock: bytes
    cluster_map: bytes
    stale: list[Any]
    """Of the opens in a `SessionResume`: inodes that the client must not use any more, because
    they were deleted, or are being cut to the recorded size, since its last session ran out."""


@MDS.message(6)
class Done(NamedTuple):
    """The answer of requests that have nothing to say."""


# ---------------------------------------------------------------- reading the name space


@MDS.message(10)
class Lookup(NamedTuple):
    """Find an entry -> `InodeReply` or ENOENT.  `.` finds the inode itself, `..` the parent.

    Both work for any inode number ever given out: NFS handles outlive every cache.
    """

    parent: int
    name: bytes


@MDS.message(11)
class GetAttr(NamedTuple):
    """Read an inode -> `InodeReply`; ESTALE when there is none."""

    ino: int


@MDS.message(12)
class InodeReply(NamedTuple):
    inode: bytes


@MDS.message(13)
class ReadDir(NamedTuple):
    """List entries with cookies above `cookie` -> `ReadDirReply`."""

    ino: int
    cookie: int
    count_max: int


@MDS.message(14)
class ReadDirReply(NamedTuple):
    entries: list[Any]
    """[name, cookie, inode record] each."""
    eof: bool


@MDS.message(15)
class GetXattr(NamedTuple):
    """-> `XattrReply` or ENODATA."""

    ino: int
    name: bytes


@MDS.message(16)
class XattrReply(NamedTuple):
    value: bytes


@MDS.message(17)
class ListXattr(NamedTuple):
    """-> `NamesReply`."""

    ino: int


@MDS.message(18)
class NamesReply(NamedTuple):
    names: list[Any]


@MDS.message(19)
class StatFs(NamedTuple):
    """-> `StatFsReply`."""


@MDS.message(20)
class StatFsReply(NamedTuple):
    total: int
    free: int
    available: int
    inodes: int


@MDS.message(21)
class EntryReply(NamedTuple):
    """What an entry's making or removal left behind: saves the client from asking."""

    inode: bytes
    """The entry's inode; empty when the entry was removed."""
    directory: bytes
    """The directory; empty when nothing in it changed."""


# ---------------------------------------------------------------- opening and closing


@MDS.message(30)
class Open(NamedTuple):
    """Note that the session has the inode open -> `InodeReply`.

    Opens are counted by session; `Close` says how many have ended.
    """

    ino: int
    writable: bool


@MDS.message(31)
class Close(NamedTuple):
    """A NOTIFY without answer: so many of the session's opens of the inode have ended."""

    ino: int
    open_count: int


# ---------------------------------------------------------------- mutations


@MDS.message(40)
class Create(NamedTuple):
    """Make a file, directory, symbolic link or special file -> `EntryReply`.

    EEXIST when the name exists, unless `open` is wanted and not `exclusive`: then the existing
    regular file is opened and returned.
    """

    slot: int
    sequence: int
    parent: int
    name: bytes
    mode: int
    uid: int
    gid: int
    umask: int
    rdev: int
    target: bytes
    open: bool
    exclusive: bool


@MDS.message(41)
class Link(NamedTuple):
    """Add a name to an inode -> `EntryReply`."""

    slot: int
    sequence: int
    ino: int
    parent: int
    name: bytes


@MDS.message(42)
class Unlink(NamedTuple):
    """Remove a name that is not a directory's -> `EntryReply`."""

    slot: int
    sequence: int
    parent: int
    name: bytes


@MDS.message(43)
class Rmdir(NamedTuple):
    """Remove an empty directory -> `EntryReply`."""

    slot: int
    sequence: int
    parent: int
    name: bytes


@MDS.message(44)
class Rename(NamedTuple):
    """Move an entry, replacing what is there as POSIX says -> `Done`.

    `flags`: 0, RENAME_NOREPLACE (1) or RENAME_EXCHANGE (2).
    """

    slot: int
    sequence: int
    parent: int
    name: bytes
    new_parent: int
    new_name: bytes
    flags: int


SET_MODE = 1
SET_UID = 2
SET_GID = 4
SET_SIZE = 8
SET_ATIME = 16
SET_MTIME = 32
SET_ATIME_NOW = 64
SET_MTIME_NOW = 128


@MDS.message(45)
class SetAttr(NamedTuple):
    """Change attributes named by `valid` (SET_*) -> `InodeReply`.

    A smaller size is in force, and the chunks behind it are gone, when the answer arrives.
    """

    slot: int
    sequence: int
    ino: int
    valid: int
    mode: int
    uid: int
    gid: int
    size: int
    atime_ns: int
    mtime_ns: int


@MDS.message(46)
class SetXattr(NamedTuple):
    """`flags`: 0, XATTR_CREATE (1: EEXIST if it exists), XATTR_REPLACE (2: ENODATA) -> `Done`."""

    slot: int
    sequence: int
    ino: int
    name: bytes
    value: bytes
    flags: int


@MDS.message(47)
class RemoveXattr(NamedTuple):
    """-> `Done` or ENODATA."""

    slot: int
    sequence: int
    ino: int
    name: bytes


@MDS.message(48)
class Wrote(NamedTuple):
    """Data up to `size_min` have been written to the iods -> `InodeReply`.

    The size becomes at least `size_min`; mtime becomes `mtime_ns`.  `durable`: answered when
    this and all earlier changes are on stable storage.
    """

    slot: int
    sequence: int
    ino: int
    size_min: int
    mtime_ns: int
    durable: bool


@MDS.message(49)
class Sync(NamedTuple):
    """Answered when every mutation answered before is on stable storage -> `Done`."""


# ---------------------------------------------------------------- care


@MDS.message(60)
class Status(NamedTuple):
    """-> `StatusReply`."""


@MDS.message(61)
class StatusReply(NamedTuple):
    status: bytes
    """A msgpack map of names and numbers; docs/operations.md#status names them."""


@MDS.message(62)
class SnapshotOpen(NamedTuple):
    """Pin a consistent view of all records, one per connection -> `Done`."""


@MDS.message(63)
class SnapshotScan(NamedTuple):
    """Read raw records from `start` on, those that fit -> `RecordsReply`."""

    start: bytes
    end: bytes
    count_max: int


@MDS.message(64)
class RecordsReply(NamedTuple):
    records: list[Any]
    """[key, value] each; fewer than asked for means the end."""


@MDS.message(65)
class SnapshotClose(NamedTuple):
    """-> `Done`."""


@MDS.message(66)
class Repair(NamedTuple):
    """fsck's mending: put and delete raw records atomically, if `expected` still holds -> `Done`.

    `expected`: [key, value or None] pairs that must be as the checker saw them, else EBUSY.
    """

    expected: list[Any]
    records: list[Any]
    """[key, value or None] each; None deletes."""


# ---------------------------------------------------------------- iod


@IOD.message(1)
class IodDone(NamedTuple):
    """The answer of requests that have nothing to say."""

    boot: bytes = b""
    """Of a `Write`: names this boot of the iod's machine.  With it goes what is not synced."""


@IOD.message(2)
class Write(NamedTuple):
    """Store the payload at `offset` of a chunk -> `IodDone`.

    `sums`: 8 bytes, little-endian, for each block touched: the block sum of the payload's part
    inside that block.  `sync`: answered when it is on stable storage.  `chain_epoch` and
    `version` order the writes of a replicated chain; 0 where there is one replica.
    """

    epoch: int
    ino: int
    column: int
    row: int
    offset: int
    chunk_size: int
    sums: bytes
    sync: bool
    chain_epoch: int = 0
    version: int = 0


@IOD.message(3)
class Read(NamedTuple):
    """Read whole blocks of one chunk -> `ReadReply` with the stored bytes as payload.

    `offset` and `length` are multiples of the block size.  `verified`: the iod checks the sums
    itself and answers from memory (used after a mismatch, to tell damage from a race).
    """

    epoch: int
    ino: int
    column: int
    row: int
    offset: int
    length: int
    chunk_size: int
    verified: bool = False


@IOD.message(4)
class ReadReply(NamedTuple):
    sums: bytes
    """8 bytes, little-endian, for each block asked for; 0: never written, reads as zeros.

    The payload may be shorter than asked for: the rest is zeros.  Bytes of absent blocks in it
    are to be ignored.
    """


@IOD.message(5)
class SyncChunks(NamedTuple):
    """Put chunk files on stable storage -> `IodDone`, or DATA_LOST.

    A sync of what another boot of the machine was given would succeed, and prove nothing.
    """

    files: list[Any]
    """[ino, column] pairs."""
    boot: bytes = b""
    """In which boot the data were written; empty: nobody knows."""


@IOD.message(6)
class Trim(NamedTuple):
    """Drop everything of a chunk file at or behind a place -> `IodDone`."""

    epoch: int
    ino: int
    column: int
    row: int
    offset: int
    chunk_size: int


@IOD.message(7)
class Zero(NamedTuple):
    """Make a range of a chunk read as zeros, giving space back -> `IodDone`."""

    epoch: int
    ino: int
    column: int
    row: int
    offset: int
    length: int
    chunk_size: int


@IOD.message(8)
class Remove(NamedTuple):
    """Delete chunk files; those that do not exist are fine -> `IodDone`."""

    epoch: int
    files: list[Any]


@IOD.message(9)
class ListChunks(NamedTuple):
    """List chunk files in order of (ino, column), after a place -> `ListChunksReply`."""

    after_ino: int
    after_column: int
    count_max: int


@IOD.message(10)
class ListChunksReply(NamedTuple):
    files: list[Any]
    """[ino, column, file size, bytes allocated] each; fewer than asked for means the end."""


@IOD.message(11)
class Extents(NamedTuple):
    """Which blocks of a chunk file are present, from `row` on -> `ExtentsReply`."""

    ino: int
    column: int
    chunk_size: int
    row: int
    row_count_max: int


@IOD.message(12)
class ExtentsReply(NamedTuple):
    extents: list[Any]
    """[row, offset, length] each, in order, of present blocks."""
    next_row: int
    """Where to go on; -1: that was all."""


@IOD.message(13)
class Verify(NamedTuple):
    """Check every block of a chunk file -> `VerifyReply`."""

    ino: int
    column: int


@IOD.message(14)
class VerifyReply(NamedTuple):
    findings: list[Any]
    """One line each; empty: all is well."""


@IOD.message(15)
class IodStatFs(NamedTuple):
    """-> `IodStatFsReply`."""


@IOD.message(16)
class IodStatFsReply(NamedTuple):
    total: int
    free: int
    available: int


@IOD.message(17)
class Fence(NamedTuple):
    """From the mds: refuse requests made under an older epoch than this -> `IodDone`."""

    epoch: int


@IOD.message(18)
class IodStatus(NamedTuple):
    """-> `IodStatusReply`."""


@IOD.message(19)
class IodStatusReply(NamedTuple):
    status: bytes
    """A msgpack map of names and numbers; docs/operations.md#status names them."""


@IOD.message(20)
class Locate(NamedTuple):
    """Tell a reader on the same host where one chunk lies on the disk -> `LocateReply`."""

    epoch: int
    ino: int
    column: int
    row: int
    chunk_size: int


@IOD.message(21)
class LocateReply(NamedTuple):
    path: bytes
    """Of the chunk file; empty: there is none."""
    file_ino: int
    """Its inode number in the local file system."""
    offset: int
    """Where the chunk's data begin in it."""
    sums: bytes
    """As in `ReadReply`, for every block of the chunk.

    Nothing is held for the reader: only data that fit their sums are the chunk's.
    """
