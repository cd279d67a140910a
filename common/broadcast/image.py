"""An image: the files that a transfer carries, as a table and one run of bytes.  Pure.

The table names every entry with its attributes; the *content* is what the files hold, one after
the other in the table's order, without their holes, and is cut into chunks wherever they fall.  A
receiver knows from the table which chunk belongs where, so what it has already, under the same
names, need not travel, however the places in the content have shifted.

A single file, a stream and a device are tables of one entry, whose path is empty.

A table is not trusted (`decode_table`): entries come after their directory, no path leaves the
root, nothing is below anything but a directory, a hard link is to an earlier file.  So a receiver
that walks without following links stays inside its destination.
"""

from __future__ import annotations

import bisect
import enum
import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from common import codec
from common.errors import Code, KaError

__all__ = [
    "STAGE_NAME",
    "TABLE_SIZE_MAX",
    "Content",
    "Entry",
    "EntryKind",
    "Piece",
    "decode_table",
    "encode_table",
    "holes",
    "image_id",
]

FORMAT = 1
STAGE_NAME = b".ka-part"
"""At the destination, what is not complete yet is below a directory whose name begins so."""
TABLE_SIZE_MAX = 256 * 1024 * 1024
NAME_SIZE_MAX = 255
TARGET_SIZE_MAX = 4095
FILE_SIZE_MAX = 1 << 62


class EntryKind(enum.Enum):
    FILE = "f"
    DIRECTORY = "d"
    SYMLINK = "l"
    HARD_LINK = "h"
    CHARACTER = "c"
    BLOCK = "b"
    FIFO = "p"


_KINDS = {kind.value: kind for kind in EntryKind}


class Entry(NamedTuple):
    path: bytes
    """Below the root, components joined by "/"; empty for the root."""
    kind: EntryKind
    mode: int
    """Permissions, with set-id and sticky bits."""
    uid: int
    gid: int
    mtime_ns: int
    size: int = 0
    ranges: tuple[tuple[int, int], ...] = ()
    """(offset, length) of what is not a hole, in order."""
    target: bytes = b""
    """Of a symbolic link; of a hard link the path of an earlier file."""
    device: int = 0
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    """Access control lists among them."""


class Piece(NamedTuple):
    """A part of the content that lies together in one file."""

    entry: int
    offset: int
    length: int


class Content:
    """Where the bytes of the content are."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._starts: list[int] = []
        self._places: list[tuple[int, int, int]] = []
        self.size = 0
        for index, entry in enumerate(entries):
            for offset, length in entry.ranges:
                self._starts.append(self.size)
                self._places.append((index, offset, length))
                self.size += length

    def piece(self, offset: int, length: int) -> Piece | None:
        """Return where content[offset : offset + length] is, if it lies together."""
        at = bisect.bisect_right(self._starts, offset) - 1
        entry, start, size = self._places[at]
        inside = offset - self._starts[at]
        return Piece(entry, start + inside, length) if inside + length <= size else None

    def pieces(self, offset: int, length: int) -> Iterator[Piece]:
        """Yield the pieces of content[offset : offset + length], in order."""
        assert offset + length <= self.size
        at = bisect.bisect_right(self._starts, offset) - 1
        while length:
            entry, start, size = self._places[at]
            inside = offset - self._starts[at]
            count = min(length, size - inside)
            yield Piece(entry, start + inside, count)
            offset += count
            length -= count
            at += 1


def holes(entry: Entry) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of what an entry's ranges leave out, in order."""
    end = 0
    for offset, length in (*entry.ranges, (entry.size, 0)):
        if offset > end:
            yield end, offset - end
        end = offset + length


def encode_table(entries: Sequence[Entry]) -> bytes:
    """Return the form that travels; raises KaError E2BIG for more than a table can hold."""
    rows = [
        (*entry._replace(kind=entry.kind.value),)  # type: ignore[arg-type]
        for entry in entries
    ]
    data = codec.encode((FORMAT, rows))
    if len(data) > TABLE_SIZE_MAX:
        raise KaError(Code.E2BIG, f"too many files for one transfer: {len(entries)}")
    return data


def image_id(name: str, table: bytes) -> str:
    """Return what a manifest says of the table: it binds the two."""
    return f"{hashlib.blake2b(table, digest_size=20).hexdigest()} {name[:200]}"


def decode_table(data: bytes, expected_id: str) -> list[Entry]:
    """Return the entries; raises KaError PROTOCOL for a table that must not be unpacked."""
    digest = hashlib.blake2b(data, digest_size=20).hexdigest()
    if digest != expected_id.partition(" ")[0]:
        raise KaError(Code.PROTOCOL, "the table of files is not that of the manifest")
    match codec.decode(data):
        case [int(version), list(rows)] if version == FORMAT and rows:
            return _checked([_entry(row) for row in rows])
    raise KaError(Code.PROTOCOL, "not a table of files")


def _entry(row: object) -> Entry:
    match row:
        case [
            bytes(path), str(kind), int(mode), int(uid), int(gid), int(mtime_ns),
            int(size), list(ranges), bytes(target), int(device), list(xattrs),
        ] if kind in _KINDS:  # fmt: skip
            return Entry(
                path, _KINDS[kind], mode & 0o7777, uid, gid, mtime_ns, size,
                tuple(map(_range, ranges)), target, device, tuple(map(_xattr, xattrs)),
            )  # fmt: skip
    raise KaError(Code.PROTOCOL, "not an entry of a table of files")


def _range(item: object) -> tuple[int, int]:
    match item:
        case [int(offset), int(length)]:
            return offset, length
    raise KaError(Code.PROTOCOL, "not a range of a file")


def _xattr(item: object) -> tuple[bytes, bytes]:
    match item:
        case [bytes(name), bytes(value)] if name and b"\0" not in name:
            return name, value
    raise KaError(Code.PROTOCOL, "not an extended attribute")


def _checked(entries: list[Entry]) -> list[Entry]:
    seen: dict[bytes, EntryKind] = {}
    for index, entry in enumerate(entries):
        _check_path(entry, index, seen)
        _check_ranges(entry)
        if entry.kind is EntryKind.HARD_LINK and seen.get(entry.target) is not EntryKind.FILE:
            raise _refusal("a hard link to what is not an earlier file", entry)
        if entry.kind is EntryKind.SYMLINK and not 0 < len(entry.target) <= TARGET_SIZE_MAX:
            raise _refusal("a symbolic link to nowhere", entry)
        if b"\0" in entry.target or min(entry.uid, entry.gid, entry.device, entry.size) < 0:
            raise _refusal("impossible attributes", entry)
        seen[entry.path] = entry.kind
    return entries


def _check_path(entry: Entry, index: int, seen: dict[bytes, EntryKind]) -> None:
    path = entry.path
    if index == 0:
        if path or entry.kind not in (EntryKind.FILE, EntryKind.DIRECTORY):
            raise _refusal("the table does not begin with its root", entry)
        return
    parent, _, name = path.rpartition(b"/")
    if not 0 < len(name) <= NAME_SIZE_MAX or name in (b".", b"..") or b"\0" in name:
        raise _refusal("a path that leaves the destination", entry)
    if path in seen or path.startswith(STAGE_NAME):
        raise _refusal("a path that is taken", entry)
    if seen.get(parent) is not EntryKind.DIRECTORY or path.startswith(b"/"):
        raise _refusal("a path below what is not a directory", entry)


def _check_ranges(entry: Entry) -> None:
    if (entry.ranges and entry.kind is not EntryKind.FILE) or entry.size > FILE_SIZE_MAX:
        raise _refusal("content of what holds none", entry)
    end = 0
    for offset, length in entry.ranges:
        if offset < end or length <= 0:
            raise _refusal("ranges that overlap", entry)
        end = offset + length
    if end > entry.size:
        raise _refusal("content beyond the end", entry)


def _refusal(reason: str, entry: Entry) -> KaError:
    path = entry.path[:200].decode("utf-8", "backslashreplace")
    return KaError(Code.PROTOCOL, f"refused: {reason}", path=path)
