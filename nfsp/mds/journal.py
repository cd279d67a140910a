"""The journal's format: segment headers, durable marks and records as bytes.

Pure.  journal_files does the reading and writing.  A *segment* is a file of fixed size: a header
in its first sector, a durable mark in its second, records back to back from byte 4096.  One use
of a segment is a *generation*.  It has a random *tag* that each of its records repeats, so what
an earlier use left behind is never taken for content, not even if a user of the file system put
bytes there that look like a record.

Invariants
  * every structure begins with the XXH3-64 of all that follows in it;
  * a record is read only where its tag, its sequence number (predecessor + 1) and its sum are
    right; the first place where one of them is not ends the segment;
  * integers are little endian.

Layout, crash points and an example: docs/on-disk-format.md#metadata-store.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from common.checksum import digest
from common.errors import Code, KaError
from nfsp.mds.engine import KEY_SIZE_MAX, Batch

__all__ = [
    "MARK_OFFSET",
    "RECORDS_OFFSET",
    "Record",
    "SegmentHeader",
    "decode_header",
    "decode_mark",
    "encode_header",
    "encode_mark",
    "encode_record",
    "has_record_after",
    "read_records",
]

VERSION = 1
MARK_OFFSET = 512
"""A sector of its own: rewriting the mark cannot tear the header."""
RECORDS_OFFSET = 4096

_SUM = struct.Struct("<Q")
_HEADER = struct.Struct("<4sIQQ8s16s")  # magic, version, generation, first sequence, tag, store
_MARK = struct.Struct("<4sIQ16s")  # magic, version, durable sequence, store
_RECORD = struct.Struct("<I4s8sQQ")  # body size, magic, tag, sequence, epoch
_PAIR = struct.Struct("<HI")  # key size, value size

HEADER_SIZE = _SUM.size + _HEADER.size
MARK_SIZE = _SUM.size + _MARK.size
RECORD_HEADER_SIZE = _SUM.size + _RECORD.size
assert HEADER_SIZE <= MARK_OFFSET
assert MARK_OFFSET + MARK_SIZE <= RECORDS_OFFSET

_HEADER_MAGIC = b"KaJS"
_MARK_MAGIC = b"KaJM"
_RECORD_MAGIC = b"KaJR"
_TOMBSTONE = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What a segment is being used for."""

    generation: int
    """Counts the uses of all segments; the higher one holds the later records."""
    first_sequence: int
    """The sequence number that its first record has or will have."""
    tag: bytes
    """8 random bytes, repeated in each record."""
    store: bytes
    """Identity of the store, 16 bytes."""


@dataclass(frozen=True, slots=True)
class Record:
    """One applied batch."""

    sequence: int
    epoch: int
    batch: dict[bytes, bytes | None]


def encode_header(header: SegmentHeader) -> bytes:
    """Return the first bytes of a segment."""
    return _summed(
        _HEADER.pack(
            _HEADER_MAGIC,
            VERSION,
            header.generation,
            header.first_sequence,
            header.tag,
            header.store,
        )
    )


def decode_header(data: bytes) -> SegmentHeader | None:
    """Return a segment's header, or None where there is none or it was torn."""
    body = _verified(data[:HEADER_SIZE], HEADER_SIZE)
    if body is None or not body.startswith(_HEADER_MAGIC):
        return None
    _, version, generation, first_sequence, tag, store = _HEADER.unpack(body)
    _require_version(version)
    return SegmentHeader(generation, first_sequence, tag, store)


def encode_mark(durable_sequence: int, store: bytes) -> bytes:
    """Return the mark that says: up to here the journal is on stable storage."""
    return _summed(_MARK.pack(_MARK_MAGIC, VERSION, durable_sequence, store))


def decode_mark(data: bytes, store: bytes) -> int:
    """Return the durable sequence of a mark of *store*; 0 where there is none."""
    body = _verified(data[:MARK_SIZE], MARK_SIZE)
    if body is None or not body.startswith(_MARK_MAGIC):
        return 0
    _, version, durable_sequence, owner = _MARK.unpack(body)
    _require_version(version)
    return int(durable_sequence) if owner == store else 0


def encode_record(batch: Batch, *, tag: bytes, sequence: int, epoch: int) -> bytes:
    """Return the record of *batch*.  Raises EINVAL for a key of a forbidden size."""
    pair = _PAIR.pack
    parts: list[bytes] = [b""]
    size = 0
    for key, value in batch.items():
        key_size = len(key)
        if not 0 < key_size <= KEY_SIZE_MAX:
            raise KaError(Code.EINVAL, f"a key must have 1 to {KEY_SIZE_MAX} bytes", size=key_size)
        if value is None:
            parts += (pair(key_size, _TOMBSTONE), key)
            size += 6 + key_size
        else:
            parts += (pair(key_size, len(value)), key, value)
            size += 6 + key_size + len(value)
    parts[0] = _RECORD.pack(size, _RECORD_MAGIC, tag, sequence, epoch)
    return _summed(b"".join(parts))


def read_records(segment: bytes, *, tag: bytes, first_sequence: int) -> tuple[list[Record], int]:
    """Return the records of a whole segment and the offset where they end."""
    records: list[Record] = []
    offset = RECORDS_OFFSET
    while True:
        record, following = _read_record(
            segment, offset, tag=tag, sequence=first_sequence + len(records)
        )
        if record is None:
            return records, offset
        records.append(record)
        offset = following


def has_record_after(segment: bytes, offset: int, *, tag: bytes) -> bool:
    """Tell whether remains of a record with *tag* lie at or behind *offset*.

    After a loss of power a later record may be whole where an earlier one is not.  Left alone,
    it would come back to life once its predecessor's place is filled again.
    """
    return segment.find(_RECORD_MAGIC + tag, offset) >= 0


def _read_record(
    segment: bytes, offset: int, *, tag: bytes, sequence: int
) -> tuple[Record | None, int]:
    body = offset + RECORD_HEADER_SIZE
    if body > len(segment):
        return None, offset
    size, magic, its_tag, its_sequence, epoch = _RECORD.unpack_from(segment, offset + _SUM.size)
    end = body + size
    if (magic, its_tag, its_sequence) != (_RECORD_MAGIC, tag, sequence):
        return None, offset
    if end > len(segment) or _verified(segment[offset:end], end - offset) is None:
        return None, offset
    return Record(sequence, epoch, _read_batch(segment, body, end)), end


def _read_batch(segment: bytes, offset: int, end: int) -> dict[bytes, bytes | None]:
    batch: dict[bytes, bytes | None] = {}
    unpack = _PAIR.unpack_from
    while offset < end:
        key_size, value_size = unpack(segment, offset)
        offset += _PAIR.size
        key = segment[offset : offset + key_size]
        offset += key_size
        if value_size == _TOMBSTONE:
            batch[key] = None
        else:
            batch[key] = segment[offset : offset + value_size]
            offset += value_size
    # The sum was right, so only a bug of the writer can bring us here.
    assert offset == end
    return batch


def _summed(body: bytes) -> bytes:
    return _SUM.pack(digest(body)) + body


def _verified(data: bytes, size: int) -> bytes | None:
    """Return what the leading sum covers, or None if data are short or the sum is wrong."""
    if len(data) < size:
        return None
    body = data[_SUM.size :]
    return body if digest(body) == _SUM.unpack_from(data)[0] else None


def _require_version(version: int) -> None:
    if version != VERSION:
        raise KaError(
            Code.WRONG_VERSION,
            f"the metadata journal has format version {version}, this program reads {VERSION}",
        )
